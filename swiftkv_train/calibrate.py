"""Calibrated start: the tail's K/V projections in closed form.

Every tail layer's K/V input is one tensor X = norm_swiftkv(h_l) [N, D], and the trunk is the same in base and student.
So the best linear projections onto the base's own K and V (before RoPE), Y = [K, V] of a K/V head [N, 2 C], are the
ridge solution

    W' = (X'MX + r I)^-1 X'MY       M = diag(m), r = ridge x mean diagonal of X'MX

where m is the attention that a token receives from the queries of that head in the base, relative to the mean of all
tokens: an error in what nobody looks at costs nothing, and one in an attention sink costs every token after it. One
pass over the tokens accumulates X'MX and X'MY in fp64; nothing else is kept. With biases X gets a column of ones, which
the ridge leaves alone. The layers of an AcrossKV group then get one K and one V of their solutions (see
`shared_projections`).

`weighting` says what has an M of its own: every head of every layer ('head'), every layer ('layer': a mean over its
heads, for less memory), or nothing ('none': M = I). The fit's R^2 per layer (1: the projection is exact), weighted in
the same way, says how much of a layer's K/V the shared state still holds.

    N tokens   D hidden size (+ 1 with biases)   G K/V heads   C head size   P parts of a layer: G, or 1
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from swiftkv_models.rope import rotate
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.metrics import finite
from swiftkv_train.shared_projections import compensated_queries, shared_keys, shared_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from swiftkv_models import LlamaSwiftKVForCausalLM
    from swiftkv_models.llama import TrunkOutput
    from swiftkv_train.data import Batch

Weighting: TypeAlias = Literal["head", "layer", "none"]
# Bytes of attention scores at a time: on CPU what stays in its caches.
CPU_SCORE_BYTES, DEVICE_SCORE_BYTES = 16 << 20, 512 << 20


@dataclass
class LayerFit:
    """How well a tail layer's K and V are linear in the shared state, on the calibration tokens."""

    layer: int
    r2_keys: float
    r2_values: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: keys or values that are all the same have no R^2."""
        return finite(asdict(self))


@dataclass
class Moments:
    """fp64 sums over tokens, of every tail layer."""

    inputs: list[torch.Tensor]  # X'MX [P, D, D]
    products: list[torch.Tensor]  # X'MY [P, D, 2 G C / P]
    sums: list[torch.Tensor]  # of m Y [P, 2 G C / P]
    squares: list[torch.Tensor]  # of m Y^2 [P, 2 G C / P]
    weights: list[torch.Tensor]  # of m [P]
    queries: list[torch.Tensor]  # of the squares of the base's queries [H C], not weighted
    tokens: torch.Tensor  # number of them [1]

    def tensors(self) -> list[torch.Tensor]:
        parts = (self.inputs, self.products, self.sums, self.squares, self.weights, self.queries, [self.tokens])
        return [tensor for part in parts for tensor in part]


class ProjectionRecorder:
    """Collects what the base's own q_proj, k_proj and v_proj of the tail put out while it runs."""

    def __init__(self, model: LlamaSwiftKVForCausalLM):
        self.outputs: list[dict[str, torch.Tensor]] = []
        self.handles = []
        for layer in model.model.layers[model.config.num_key_value_layers :]:
            found: dict[str, torch.Tensor] = {}
            self.outputs.append(found)
            for name in ("q_proj", "k_proj", "v_proj"):
                module = getattr(layer.self_attn, name)
                self.handles.append(module.register_forward_hook(self._keep(found, name)))

    @staticmethod
    def _keep(found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            found[name] = output

        return hook

    def __enter__(self) -> ProjectionRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def score_bytes(device_type: str) -> int:
    return CPU_SCORE_BYTES if device_type == "cpu" else DEVICE_SCORE_BYTES


def attention_received(query: torch.Tensor, key: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """How much of their queries' causal attention each token gets [B, T, G], as a mean over the H / G query heads.

    query [B, H, T, C] and key [B, G, T, C] are rotated; documents [B, T] number the documents packed in a row.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    received = torch.zeros(batch, groups, length, dtype=torch.float32, device=query.device)
    rows = max(1, score_bytes(query.device.type) // (4 * batch * heads * length))
    transposed = key.transpose(2, 3).unsqueeze(2)  # [B, G, 1, C, T]
    for start in range(0, length, rows):
        part = slice(start, min(start + rows, length))
        queries = query[:, :, part].unflatten(1, (groups, -1))  # [B, G, R, t, C]
        scores = (queries @ transposed[..., : part.stop]).float() * size**-0.5
        visible = (documents[:, part, None] == documents[:, None, : part.stop]).tril(start)
        scores.masked_fill_(~visible[:, None, None], float("-inf"))
        received[:, :, : part.stop] += torch.softmax(scores, dim=-1).mean(2).sum(2)
    return received.transpose(1, 2)


@torch.no_grad()
def accumulate_moments(
    model: LlamaSwiftKVForCausalLM,
    batches: Iterable[Batch],
    device: torch.device | str,
    advance: Callable[[int], None] | None = None,
    weighting: Weighting = "head",
) -> Moments:
    """Run the base over `batches` (its own tail, hence `base_projections`) and sum what the fit needs.

    Padding counts as one more document: its positions are left out. `advance` is told the tokens of every batch.
    """
    config = model.config
    width = config.hidden_size + int(config.attention_bias)
    attention: Any = model.model.layers[-1].self_attn
    groups = attention.k_proj.out_features // attention.head_dim
    parts = groups if weighting == "head" else 1
    outputs = 2 * attention.k_proj.out_features // parts
    tail = config.num_hidden_layers - config.num_key_value_layers

    def zeros(*shape: int) -> list[torch.Tensor]:
        return [torch.zeros(*shape, dtype=torch.float64, device=device) for _ in range(tail)]

    moments = Moments(
        inputs=zeros(parts, width, width),
        products=zeros(parts, width, outputs),
        sums=zeros(parts, outputs),
        squares=zeros(parts, outputs),
        weights=zeros(parts),
        queries=zeros(attention.q_proj.out_features),
        tokens=torch.zeros(1, dtype=torch.float64, device=device),
    )
    with ProjectionRecorder(model) as recorder:
        for batch in batches:
            position_ids = batch.position_ids.to(device)
            trunk = model.model.run_trunk(batch.input_ids.to(device), position_ids=position_ids, use_cache=False)
            model.model.run_tail(trunk, base=True)
            real = batch.token_mask.to(device).flatten()
            states = model.model.norm_swiftkv(trunk.hidden_states).flatten(0, 1)[real]
            if config.attention_bias:
                states = torch.cat([states, states.new_ones(len(states), 1)], dim=-1)
            moments.tokens += len(states)
            for layer, found in enumerate(recorder.outputs):
                weights = _weights(found, trunk, weighting)[real]
                targets = torch.stack([found[name].flatten(0, 1)[real] for name in ("k_proj", "v_proj")], dim=1)
                _add_layer(moments, layer, states, targets, weights)
                moments.queries[layer] += found["q_proj"].flatten(0, 1)[real].double().square().sum(0)
            if advance is not None:
                advance(batch.input_ids.numel())
    return moments


def _weights(found: dict[str, torch.Tensor], trunk: TrunkOutput, weighting: Weighting) -> torch.Tensor:
    """m [B T, P] of a layer's tokens, padding among them. The mean of a document is 1: every query gives out 1."""
    if weighting == "none":
        return torch.ones(trunk.hidden_states.shape[:2].numel(), 1, device=trunk.hidden_states.device)
    cos, sin = trunk.position_embeddings
    heads = (found[name].unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for name in ("q_proj", "k_proj"))
    query, key = (rotate(states, cos, sin) for states in heads)
    received = attention_received(query, key, (trunk.position_ids == 0).cumsum(1)).flatten(0, 1)
    return received if weighting == "head" else received.mean(1, keepdim=True)


def _add_layer(
    moments: Moments, layer: int, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> None:
    """One batch's share of a layer: states [N, D], targets [N, 2, G C] (K and V), weights [N, P] of its real tokens."""
    # For products, which are added up in fp64: numbers of half precision gain nothing by more, and cost much.
    precise = torch.float32 if states.dtype.itemsize == 2 else torch.float64
    inputs, wanted = states.to(precise), targets.to(precise)
    for part, outputs in enumerate(wanted.chunk(weights.shape[1], dim=2)):
        weight, outputs = weights[:, part : part + 1].to(precise), outputs.flatten(1)
        weighted = inputs * weight
        moments.inputs[layer][part] += weighted.T @ inputs
        moments.products[layer][part] += weighted.T @ outputs
        moments.sums[layer][part] += (weight * outputs).sum(0, dtype=torch.float64)
        moments.squares[layer][part] += (weight * outputs.square()).sum(0, dtype=torch.float64)
        moments.weights[layer][part] += weight.sum(dtype=torch.float64)


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


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


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
    shared, factors = shared_keys(keys, inputs, query_rms)
    for attention, factor in zip(attentions, factors, strict=True):
        attention.q_proj_swiftkv.weight.copy_(compensated_queries(attention.q_proj.weight, factor))
        if attention.q_proj.bias is not None:
            attention.q_proj_swiftkv.bias.copy_(compensated_queries(attention.q_proj.bias, factor))
    outputs = torch.stack([attention.o_proj.weight for attention in attentions]).to(values)
    return shared, shared_values(values, outputs.unflatten(2, (-1, size)))
