"""One K and one V projection for the layers of an AcrossKV group, in closed form from what each of them wants.

K. The layers of a group, its members, attend with queries of their own, so what a shared K lacks for member j its
queries may make up: where k_j ~ T_j k, with queries T_j'q_j. T_j has to commute with RoPE, which turns dimensions f and
f + C/2, a complex number, by frequency f times the position:

- a fast frequency leaves one complex number, k_j ~ c_j k and queries c_j* q_j;
- frequencies so slow that they turn no token of the model's context by more than a radian against another hardly turn
  at all: together they are one block, and any real matrix of it will do.

The best k of all members at once are the leading singular directions of their rows W_j k_j in the metric of the
calibration inputs, E|k_j x|^2 = k_j X'X k_j', W_j being the root mean squares of member j's queries.

V. o_proj is frozen and leaves no such freedom; but it tells, with all that comes after, which errors matter. What
attention puts out for a query is V'z, where z = sum_s a_s x_s are its inputs weighed by attention, in place of y. With
g the gradient of log p at that output, and taken as independent of z (as K-FAC does, arXiv 1503.05671),

    sum_j E[(g_j'(V'z_j - y_j))^2] ~ sum_j tr(M_j (V'Z_j V - 2 V'C_j)) + ..,   M = E g g'   Z = E z z'   C = E z y'

is least where sum_j Z_j V M_j = sum_j C_j M_j. That is solved by conjugate gradients. Where all members have one Z, and
C_j = Z V_j, it is a mean of theirs that needs no Z: V sum_j M_j = sum_j V_j M_j.

    g members   D inputs (+ 1 with biases)   H query heads   G K/V heads   C head size   F = C / 2 frequencies
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS, PRECISION = 200, 1e-8  # of conjugate gradients: at most; of the residual, relative


def fast_frequencies(inverse_frequencies: Tensor, context: int) -> int:
    """How many of RoPE's, which fall, turn the ends of `context` tokens by more than a radian against each other."""
    return int((inverse_frequencies * context > 1).sum())


def shared_keys(keys: Tensor, inputs: Tensor, query_rms: Tensor, fast: int) -> tuple[Tensor, Tensor]:
    """The shared K [D, G, C] of members' keys [g, D, G, C], and T [g, G, C, C], of size 1 on average.

    inputs is X'X [D, D], query_rms the weights [g, G, F], `fast` the number of frequencies that are (the first ones).
    """
    (members, width, groups, size), frequencies = keys.shape, query_rms.shape[2]
    shared = keys.new_empty(width, groups, size)
    turns = keys.new_zeros(members, groups, size, size)

    if fast:
        of_fast = torch.arange(fast, device=keys.device)
        rms = query_rms[..., :fast]
        rows = complex_halves(keys)[..., :fast] * rms.unsqueeze(1)  # [g, D, G, f]
        seen = torch.einsum("de,jehf->jdhf", inputs.to(rows.dtype), rows.conj())
        gram = torch.einsum("idhf,jdhf->hfij", rows, seen)
        leading = torch.linalg.eigh(gram).eigenvectors[..., -1]  # [G, f, g]
        factors = leading.permute(2, 0, 1) / rms
        scale = factors.abs().mean(0)
        best = torch.einsum("hfj,jdhf->dhf", leading.conj(), rows) * scale
        factors = factors / scale
        for (row, column), part in (
            ((of_fast, of_fast), factors.real),
            ((of_fast, of_fast + frequencies), -factors.imag),
            ((of_fast + frequencies, of_fast), factors.imag),
            ((of_fast + frequencies, of_fast + frequencies), factors.real),
        ):
            turns[:, :, row, column] = part
        shared[..., of_fast], shared[..., of_fast + frequencies] = best.real, best.imag

    if fast < frequencies:
        half = torch.arange(fast, frequencies, device=keys.device)
        slow = torch.cat([half, half + frequencies])
        weights = query_rms[..., fast:].repeat(1, 1, 2).unsqueeze(-1)  # [g, G, s, 1]
        stacked = (keys[..., slow].permute(0, 2, 3, 1) * weights).transpose(0, 1).flatten(1, 2)  # [G, g s, D]
        directions = torch.linalg.eigh(stacked @ inputs @ stacked.mT).eigenvectors[..., -len(slow) :]  # [G, g s, s]
        blocks = directions.unflatten(1, (members, -1)).transpose(0, 1) / weights  # [g, G, s, s]
        scale = blocks.square().sum(-1).mean(-1).sqrt().mean(0).view(-1, 1, 1)  # [G, 1, 1]
        shared[..., slow] = (directions.mT @ stacked * scale).permute(2, 0, 1)
        turns[:, :, slow.unsqueeze(1), slow] = blocks / scale
    return shared, turns


def shared_values(inputs: Tensor, products: Tensor, metrics: Tensor) -> Tensor:
    """The V [D, G, C] with sum_j Z_j V M_j = sum_j C_j M_j for every K/V head.

    inputs Z [g, G, D, D] (or [g, 1, D, D], the same for all heads), positive definite; products C [g, D, G, C];
    metrics M [g, G, C, C].
    """
    metrics = _with_least(metrics)
    heads = [
        _solution(inputs[:, head % inputs.shape[1]], products[:, :, head], metrics[:, head])
        for head in range(products.shape[2])
    ]
    return torch.stack(heads, dim=1)


def mean_values(values: Tensor, metrics: Tensor) -> Tensor:
    """`shared_values` of members with V [g, D, G, C] and one Z: the V [D, G, C] with V sum_j M_j = sum_j V_j M_j."""
    metrics = _with_least(metrics)
    wanted = torch.einsum("jhce,jdhe->hcd", metrics, values)
    return torch.linalg.solve(metrics.sum(0), wanted).permute(2, 0, 1)


def _with_least(metrics: Tensor) -> Tensor:
    """Metrics in which directions that nothing asks for count a little."""
    least = 1e-6 * metrics.diagonal(dim1=2, dim2=3).mean((0, 2))
    return metrics + torch.diag_embed(least.unsqueeze(1).expand(metrics.shape[1:3]))


def _solution(inputs: Tensor, products: Tensor, metrics: Tensor) -> Tensor:
    """V [D, C] of one head. Preconditioned by what is right where all Z are alike: (sum Z)^-1 and (sum M)^-1."""
    left, right = (torch.linalg.cholesky(each.sum(0)) for each in (inputs, metrics))

    def precondition(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).mT, right).mT * len(inputs)

    wanted = (products @ metrics).sum(0)
    found = torch.zeros_like(wanted)
    residual, step, before = wanted, torch.zeros_like(wanted), 1.0
    for _ in range(ITERATIONS):
        if float(residual.norm()) <= PRECISION * float(wanted.norm()):
            break
        direction = precondition(residual)
        now = float((residual * direction).sum())
        step = direction + (now / before) * step
        seen = (inputs @ step @ metrics).sum(0)
        length = now / float((step * seen).sum())
        found, residual, before = found + length * step, residual - length * seen, now
    return found


def compensated_queries(weight: Tensor, turns: Tensor) -> Tensor:
    """q_proj's weight [H C, D] or bias [H C] for queries T'q, with a member's T [G, C, C]; on T's device."""
    groups, size = turns.shape[:2]
    weight = weight.to(turns.device, torch.float64)
    rows = weight.view(groups, -1, size, *weight.shape[1:])  # [G, R, C, ...]
    return torch.einsum("gce,grc...->gre...", turns.to(torch.float64), rows).reshape(weight.shape)


def complex_halves(tensor: Tensor) -> Tensor:
    """[..., C] as [..., C / 2] complex: what RoPE rotates."""
    return torch.complex(*tensor.double().chunk(2, dim=-1))
