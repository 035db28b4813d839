"""Calibrated start: the tail's K/V projections in closed form.

Every tail layer's K/V input is one tensor X = norm_swiftkv(h_l) [N, D], and the trunk is the same in base and student.
So the best linear projections onto the base's own K and V (before RoPE), Y = [K, V] of a K/V head [N, 2 C], are the
ridge solution

    W' = (X'MX + r I)^-1 X'MY       M = diag(m), r = ridge x mean diagonal of X'MX

where m is the attention that a token receives from the queries of that head in the base, relative to the mean of all
tokens: an error in what nobody looks at costs nothing, and one in an attention sink costs every token after it. One
pass over the tokens accumulates X'MX and X'MY in fp64; nothing else is kept. With biases X gets a column of ones, which
the ridge leaves alone. The layers of an AcrossKV group then get one K and one V of their solutions, for which the pass
also sums what their attention makes of X, and a shorter one what the base's predictions feel of it (see
`shared_projections`).

`weighting` says what has an M of its own: every head of every layer ('head'), every layer ('layer': a mean over its
heads, for less memory), or nothing ('none': M = I). The fit's R^2 per layer (1: the projection is exact), weighted in
the same way, says how much of a layer's K/V the shared state still holds.

    N tokens   D hidden size (+ 1 with biases)   G K/V heads   C head size   P parts of a layer: G, or 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from swiftkv_train.data import Batch, TrainingData
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.metrics import finite
from swiftkv_train.moments import SENSITIVITY_TOKENS, Moments, accumulate_moments, accumulate_sensitivities, all_finite
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe
from swiftkv_train.shared_projections import compensated_queries, fast_frequencies, shared_keys, shared_values
from swiftkv_train.student import layer_by_layer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from swiftkv_models import LlamaSwiftKVForCausalLM

# Towards a layer's own V, relative to the mean diagonal of Z: averages over attention say little of what they average.
ATTENDED_RIDGE = 1e-2


@dataclass
class LayerFit:
    """How well a tail layer's K and V are linear in the shared state, on the calibration tokens."""

    layer: int
    r2_keys: float
    r2_values: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: keys or values that are all the same have no R^2."""
        return finite(asdict(self))


def calibrate(
    model: LlamaSwiftKVForCausalLM, data: TrainingData, recipe: Recipe, accelerator: Accelerator, report: Reporter
) -> list[LayerFit]:
    """Set the tail's K/V projections to their closed-form start, every process reading its share of the tokens."""
    length, rows = recipe.data.sequence_length, recipe.training.micro_batch_size
    sequences = max(1, recipe.calibration.tokens // length)
    ranks = accelerator.num_processes
    mine = range(accelerator.process_index, sequences, ranks)

    def batches(numbers: Sequence[int]) -> Iterator[Batch]:
        for start in range(0, len(numbers), rows):
            yield data.batch_of(numbers[start : start + rows])

    on_device = model.device.type == accelerator.device.type
    place = nullcontext() if on_device else layer_by_layer(accelerator.device, model)
    with report.bar("calibrate", total=len(mine) * length, unit="tokens") as advance, place:
        moments = accumulate_moments(model, batches(mine), accelerator.device, advance, recipe.calibration.weighting)
    sharing = any(len(group) > 1 for group in model.config.tail_groups)
    if sharing and on_device:  # what comes and goes in parts has no backward pass
        few = [index for index in mine if index < max(1, SENSITIVITY_TOKENS // length)]
        with report.bar("sensitivity", total=len(few) * length, unit="tokens") as advance:
            try:
                accumulate_sensitivities(moments, model, batches(few), accelerator.device, advance)
            except FloatingPointError:
                raise not_finite(recipe.model.base) from None
    if ranks > 1:
        for tensor in moments.tensors():
            tensor.copy_(accelerator.reduce(tensor, reduction="sum"))
    if not all_finite(moments.tensors()):
        raise not_finite(recipe.model.base)
    try:
        return solve(model, moments, recipe.calibration.ridge)
    except torch.linalg.LinAlgError:
        raise undetermined(int(moments.tokens), recipe.calibration.ridge) from None


@torch.no_grad()
def solve(model: LlamaSwiftKVForCausalLM, moments: Moments, ridge: float) -> list[LayerFit]:
    """Put the ridge solutions into the `k_proj_swiftkv` and `v_proj_swiftkv` of `model`; groups also change their Q.

    Returns the fit of every tail layer.
    """
    config = model.config
    first, last = config.num_key_value_layers, config.num_hidden_layers
    solutions, fits = {}, []
    for layer in range(first, last):
        solution, r2_keys, r2_values = _solve_layer(model, moments, layer - first, ridge)
        solutions[layer] = solution
        fits.append(LayerFit(layer, r2_keys, r2_values))
    for members in config.tail_groups:
        leader = members[0]
        keys, values = solutions[leader] if len(members) == 1 else _share(model, moments, members, solutions)
        attention = model.model.layers[leader].self_attn
        for projection, shared in ((attention.k_proj_swiftkv, keys), (attention.v_proj_swiftkv, values)):
            outputs = shared.flatten(1)  # [D, G C]
            projection.weight.copy_(outputs[: config.hidden_size].T)
            if config.attention_bias:
                projection.bias.copy_(outputs[config.hidden_size])
    return fits


def ridge_solution(inputs: torch.Tensor, products: torch.Tensor, ridge: float, width: int) -> torch.Tensor:
    """(X'MX + r I)^-1 X'MY of X'MX [P, D, D] and X'MY [P, D, outputs]; r leaves what is beyond `width` alone.

    Raises torch.linalg.LinAlgError where that does not exist.
    """
    penalty = torch.zeros_like(inputs[:, 0])
    penalty[:, :width] = ridge * inputs.diagonal(dim1=1, dim2=2)[:, :width].mean(1, keepdim=True)
    return torch.cholesky_solve(products, torch.linalg.cholesky(inputs + torch.diag_embed(penalty)))


def not_finite(base: str) -> RunError:
    """What a user is told where a base's activations are not."""
    return RunError(
        f"model {base}: its activations on the calibration's tokens are not finite (nan or infinity in its weights, "
        "or an overflow in model.dtype)"
    )


def undetermined(tokens: int, ridge: float) -> UserError:
    """What a user is told then."""
    return UserError(
        f"calibration: {tokens} tokens do not determine the fit at ridge {ridge}; raise calibration.tokens or "
        "calibration.ridge"
    )


def _solve_layer(
    model: LlamaSwiftKVForCausalLM, moments: Moments, layer: int, ridge: float
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, float]:
    """A layer's K and V solutions [D, G, C], and their R^2."""
    inputs, products, width = moments.inputs[layer], moments.products[layer], model.config.hidden_size
    solution = ridge_solution(inputs, products, ridge, width)
    # residual = Y'MY - 2 W'X'MY + W'X'MX W, per output; total about the mean
    explained = 2 * (solution * products).sum(1) - (solution * (inputs @ solution)).sum(1)
    residual = moments.squares[layer] - explained
    total = moments.squares[layer] - moments.sums[layer].square() / moments.weights[layer].unsqueeze(1)
    r2 = [1 - float(left.sum() / of.sum()) for left, of in zip(residual.chunk(2, 1), total.chunk(2, 1), strict=True)]
    size = model.model.layers[-1].self_attn.head_dim
    keys, values = (half.transpose(0, 1).reshape(half.shape[1], -1, size) for half in solution.chunk(2, 2))
    return (keys, values), r2[0], r2[1]


def _share(
    model: LlamaSwiftKVForCausalLM,
    moments: Moments,
    members: list[int],
    solutions: dict[int, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One K and one V [D, G, C] for the layers of a group, whose queries then make up for what K lacks."""
    attentions: list[Any] = [model.model.layers[layer].self_attn for layer in members]
    offsets = [layer - model.config.num_key_value_layers for layer in members]
    keys, values = (torch.stack([solutions[layer][kind] for layer in members]) for kind in (0, 1))
    groups, size = keys.shape[2:]
    squares = torch.stack([moments.queries[offset] for offset in offsets]) / moments.tokens
    of_heads = squares.view(len(members), groups, -1, size).mean(2)  # [g, G, C]
    query_rms = sum(of_heads.chunk(2, dim=-1)).sqrt().clamp_min(1e-12)  # type: ignore[union-attr]
    inputs = torch.stack([moments.inputs[offset].sum(0) / moments.weights[offset].sum() for offset in offsets]).mean(0)
    fast = fast_frequencies(model.model.rotary_emb.inv_freq, model.config.max_position_embeddings)
    shared, turns = shared_keys(keys, inputs, query_rms, fast)
    for attention, turn in zip(attentions, turns, strict=True):
        attention.q_proj_swiftkv.weight.copy_(compensated_queries(attention.q_proj.weight, turn))
        if attention.q_proj.bias is not None:
            attention.q_proj_swiftkv.bias.copy_(compensated_queries(attention.q_proj.bias, turn))
    metrics = [
        _metric(attention, moments.sensitivities[offset]) for attention, offset in zip(attentions, offsets, strict=True)
    ]
    attended, products = zip(*map(partial(_wanted, moments), offsets, values), strict=True)
    return shared, shared_values(torch.stack(attended), torch.stack(products), torch.stack(metrics))


def _wanted(moments: Moments, layer: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Z [P, D, D] and C [D, G, C] of a layer, per token, with a ridge towards its own V [D, G, C]. C is what Z makes of
    that V where no other was summed up, and Z is X'MX where none was."""
    attended = moments.attended[layer].numel() > 0
    weights = moments.weights[layer].view(-1, 1, 1)
    inputs = moments.attended[layer] / moments.tokens if attended else moments.inputs[layer] / weights
    ridge = ATTENDED_RIDGE * inputs.diagonal(dim1=1, dim2=2).mean(1)
    inputs = inputs + torch.diag_embed(ridge.unsqueeze(1).expand(inputs.shape[:2]))
    if moments.attended_products[layer].numel():
        products = moments.attended_products[layer].transpose(0, 1) / moments.tokens
        return inputs, products + ridge.view(1, -1, 1) * values
    return inputs, torch.einsum("gde,egc->dgc", inputs.expand(values.shape[1], -1, -1), values)


def _metric(attention: Any, sensitivity: torch.Tensor) -> torch.Tensor:
    """M [G, C, C] of a layer: what the predictions feel of an error there or, not known, what o_proj makes of it."""
    if sensitivity.any():
        return sensitivity
    groups, size = sensitivity.shape[:2]
    heads = attention.o_proj.weight.to(sensitivity).unflatten(1, (groups, -1, size))  # [D, G, R, C]
    return torch.einsum("dgrc,dgre->gce", heads, heads)
