"""One K and one V projection for the layers of an AcrossKV group, in closed form from the projections of each.

K. The layers of a group, its members, attend with queries of their own, so what a shared K lacks for member j its
queries may make up: by all that commutes with RoPE, which is one complex number per K/V head and frequency (dimensions
f and f + C/2 are a complex number, which a position rotates). If k_j ~ c_j k, then q_j* k_j ~ (c_j* q_j)* k, and member
j gets the queries c_j* q_j. For every head and frequency the best k of all members at once is the leading singular
direction of their rows r_j k_j in the metric of the calibration inputs, E|k_j x|^2 = k_j X'X k_j*, r_j being the root
mean square of member j's queries there:

    u = leading eigenvector of [r_i r_j  k_i X'X k_j*]_ij        k = sum_j u_j* r_j k_j        c_j = u_j / r_j

V. o_proj is frozen and leaves no such freedom, but it tells which errors matter. With O_j the o_proj columns of the
query heads that a K/V head serves, sum_j |O_j (V_j - V)|^2 is least for V = (sum_j O_j'O_j)^-1 sum_j O_j'O_j V_j.

    g members   D inputs (+ 1 with biases)   H query heads   G K/V heads   C head size   F = C / 2 frequencies
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared_keys(keys: Tensor, inputs: Tensor, query_rms: Tensor) -> tuple[Tensor, Tensor]:
    """The shared K [D, G, C] of members' keys [g, D, G, C], and c [g, G, F] complex. On average |c| is 1.

    inputs is X'X [D, D], query_rms r [g, G, F].
    """
    rows = complex_halves(keys) * query_rms.unsqueeze(1)  # [g, D, G, F]
    seen = torch.einsum("de,jehf->jdhf", inputs.to(rows.dtype), rows.conj())
    gram = torch.einsum("idhf,jdhf->hfij", rows, seen)
    leading = torch.linalg.eigh(gram).eigenvectors[..., -1]  # [G, F, g]
    shared = torch.einsum("hfj,jdhf->dhf", leading.conj(), rows)
    factors = leading.permute(2, 0, 1) / query_rms
    scale = factors.abs().mean(0)
    return real_halves(shared * scale), factors / scale


def shared_values(values: Tensor, output_weights: Tensor) -> Tensor:
    """The shared V [D, G, C] of members' values [g, D, G, C]; output_weights [g, D, H, C] are their o_proj's."""
    heads = output_weights.unflatten(2, (values.shape[2], -1))  # [g, D, G, R, C]
    metrics = torch.einsum("jdhrc,jdhre->jhce", heads, heads)
    total = metrics.sum(0)
    size = total.shape[-1]
    total = total + 1e-6 * total.diagonal(dim1=1, dim2=2).mean() * torch.eye(
        size, dtype=total.dtype, device=total.device
    )
    weighted = torch.einsum("jhce,jdhe->hcd", metrics, values)
    return torch.linalg.solve(total, weighted).permute(2, 0, 1)


def compensated_queries(weight: Tensor, factors: Tensor) -> Tensor:
    """q_proj's weight [H C, D] or bias [H C] for queries c* q, with a member's factors c [G, F]; on c's device."""
    groups, frequencies = factors.shape
    weight = weight.to(factors.device, torch.float64)
    rows = weight.view(groups, -1, 2 * frequencies, *weight.shape[1:])  # [G, R, C, ...]
    first, second = rows.chunk(2, dim=2)
    real, imaginary = (
        part.view(groups, 1, frequencies, *[1] * (weight.ndim - 1)) for part in (factors.real, factors.imag)
    )
    turned = torch.cat([real * first + imaginary * second, real * second - imaginary * first], dim=2)
    return turned.reshape(weight.shape)


def complex_halves(tensor: Tensor) -> Tensor:
    """[..., C] as [..., C / 2] complex: what RoPE rotates."""
    return torch.complex(*tensor.double().chunk(2, dim=-1))


def real_halves(tensor: Tensor) -> Tensor:
    """The inverse of `complex_halves`."""
    return torch.cat([tensor.real, tensor.imag], dim=-1)
