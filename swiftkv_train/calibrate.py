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

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from swiftkv_models.rope import rotate
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.metrics import finite
from swiftkv_train.shared_projections import compensated_queries, fast_frequencies, shared_keys, shared_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from swiftkv_models import LlamaSwiftKVForCausalLM
    from swiftkv_models.llama import TrunkOutput
    from swiftkv_train.data import Batch

Weighting: TypeAlias = Literal["head", "layer", "none"]
# Bytes of attention scores at a time: on CPU what stays in its caches.
CPU_SCORE_BYTES, DEVICE_SCORE_BYTES = 16 << 20, 512 << 20
LOGIT_ROWS = 512  # tokens whose logits exist at a time
SENSITIVITY_TOKENS = 8192  # that are enough for the small matrices M of `shared_projections`
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


@dataclass
class Moments:
    """fp64 sums over tokens, of every tail layer; the last three are empty for layers that share no K/V."""

    inputs: list[torch.Tensor]  # X'MX [P, D, D]
    products: list[torch.Tensor]  # X'MY [P, D, 2 G C / P]
    sums: list[torch.Tensor]  # of m Y [P, 2 G C / P]
    squares: list[torch.Tensor]  # of m Y^2 [P, 2 G C / P]
    weights: list[torch.Tensor]  # of m [P]
    queries: list[torch.Tensor]  # of the squares of the base's queries [H C], not weighted
    tokens: torch.Tensor  # number of them [1]
    attended: list[torch.Tensor]  # Z'Z of what attention makes of X [P, D, D]; not by weighting 'none'
    attended_products: list[torch.Tensor]  # Z'Y with what it makes of the base's V [G, D, C]; by 'head' only
    sensitivities: list[torch.Tensor]  # of g g', g the gradient of log p there [G, C, C]; 0: not known

    def tensors(self) -> list[torch.Tensor]:
        parts = (self.inputs, self.products, self.sums, self.squares, self.weights, self.queries, [self.tokens])
        return [
            tensor for part in (*parts, self.attended, self.attended_products, self.sensitivities) for tensor in part
        ]


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


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, documents: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of causal attention within documents: which, and their fp32 weights [B, G, H / G, rows, tokens so far].

    query [B, H, T, C] and key [B, G, T, C] are rotated; documents [B, T] number the documents packed in a row.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    rows = max(1, score_bytes(query.device.type) // (4 * batch * heads * length))
    transposed = key.transpose(2, 3).unsqueeze(2)  # [B, G, 1, C, T]
    for start in range(0, length, rows):
        part = slice(start, min(start + rows, length))
        queries = query[:, :, part].unflatten(1, (groups, -1))  # [B, G, R, t, C]
        scores = (queries @ transposed[..., : part.stop]).float() * size**-0.5
        visible = (documents[:, part, None] == documents[:, None, : part.stop]).tril(start)
        scores.masked_fill_(~visible[:, None, None], float("-inf"))
        yield part, torch.softmax(scores, dim=-1)


def attention_received(query: torch.Tensor, key: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """How much of their queries' attention (`attention_weights`) each token gets [B, T, G], as a mean over the H / G
    query heads."""
    received = torch.zeros(key.shape[:3], dtype=torch.float32, device=query.device)
    for part, weights in attention_weights(query, key, documents):
        received[:, :, : part.stop] += weights.mean(2).sum(2)
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

    sharing = [len(group) > 1 for group in config.tail_groups for _ in group]
    size = attention.head_dim

    def zeros(*shape: int, of: list[bool] | None = None) -> list[torch.Tensor]:
        wanted = of or [True] * tail
        return [torch.zeros(*(shape if some else (0,)), dtype=torch.float64, device=device) for some in wanted]

    moments = Moments(
        inputs=zeros(parts, width, width),
        products=zeros(parts, width, outputs),
        sums=zeros(parts, outputs),
        squares=zeros(parts, outputs),
        weights=zeros(parts),
        queries=zeros(attention.q_proj.out_features),
        tokens=torch.zeros(1, dtype=torch.float64, device=device),
        attended=zeros(parts, width, width, of=[some and weighting != "none" for some in sharing]),
        attended_products=zeros(groups, width, size, of=[some and weighting == "head" for some in sharing]),
        sensitivities=zeros(groups, size, size, of=sharing),
    )
    with ProjectionRecorder(model) as recorder:
        for batch in batches:
            position_ids = batch.position_ids.to(device)
            trunk = model.model.run_trunk(batch.input_ids.to(device), position_ids=position_ids, use_cache=False)
            model.model.run_tail(trunk, base=True)
            mask = batch.token_mask.to(device)
            real = mask.flatten()
            inputs = model.model.norm_swiftkv(trunk.hidden_states)
            if config.attention_bias:
                inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
            states = inputs.flatten(0, 1)[real]
            moments.tokens += len(states)
            for layer, found in enumerate(recorder.outputs):
                if moments.attended[layer].numel():
                    _add_attended(moments, layer, inputs, found, trunk, mask)
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
    received = attention_received(*_rotated(found, trunk)).flatten(0, 1)
    return received if weighting == "head" else received.mean(1, keepdim=True)


def _rotated(found: dict[str, torch.Tensor], trunk: TrunkOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's query, key and documents, as `attention_weights` takes them."""
    cos, sin = trunk.position_embeddings
    heads = (found[name].unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for name in ("q_proj", "k_proj"))
    query, key = (rotate(states, cos, sin) for states in heads)
    return query, key, (trunk.position_ids == 0).cumsum(1)


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


def _add_attended(
    moments: Moments,
    layer: int,
    inputs: torch.Tensor,
    found: dict[str, torch.Tensor],
    trunk: TrunkOutput,
    real: torch.Tensor,
) -> None:
    """One batch's share of a layer's Z'Z and Z'Y: inputs [B, T, D], real tokens [B, T]."""
    precise = torch.float32 if inputs.dtype.itemsize == 2 else torch.float64
    query, key, documents = _rotated(found, trunk)
    values = found["v_proj"].unflatten(-1, (key.shape[1], -1))  # [B, T, G, C]
    for part, weights in attention_weights(query, key, documents):
        weights, wanted = weights.to(inputs.dtype), real[:, part]
        for head in range(key.shape[1]):
            rows = weights[:, head].transpose(1, 2)  # [B, t, R, s]
            attended, outputs = (
                torch.einsum("btrs,bsd->btrd", rows, seen[:, : part.stop])[wanted].flatten(0, 1).to(precise)
                for seen in (inputs, values[:, :, head])
            )
            moments.attended[layer][head % len(moments.attended[layer])] += attended.T @ attended
            if moments.attended_products[layer].numel():
                moments.attended_products[layer][head] += attended.T @ outputs


def accumulate_sensitivities(
    moments: Moments,
    model: LlamaSwiftKVForCausalLM,
    batches: Iterable[Batch],
    device: torch.device | str,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Sum g g' of the layers that share K/V: g is the gradient of the log-likelihood of the batches' own next tokens at
    what the base's attention puts out for a token."""
    layers = model.model.layers[model.config.num_key_value_layers :]
    outputs: dict[int, torch.Tensor] = {}
    wanted = [index for index, total in enumerate(moments.sensitivities) if total.numel()]
    handles = [
        layers[index].self_attn.o_proj.register_forward_pre_hook(
            lambda _module, inputs, index=index: outputs.update({index: inputs[0]})
        )
        for index in wanted
    ]
    try:
        for batch in batches:
            input_ids, mask = batch.input_ids.to(device), batch.loss_mask.to(device)
            with torch.no_grad():
                trunk = model.model.run_trunk(input_ids, position_ids=batch.position_ids.to(device), use_cache=False)
            trunk.hidden_states.requires_grad_()
            with torch.enable_grad():
                states = model.model.run_tail(trunk, base=True).last_hidden_state[mask]
            following = input_ids.roll(-1, dims=1)[mask]
            slopes = likelihood_gradient(states, model.lm_head.weight, partial(_rows_of, following))
            found = torch.autograd.grad(states, [outputs[index] for index in wanted], slopes)
            real = batch.token_mask.to(device)
            for index, gradient in zip(wanted, found, strict=True):
                total = moments.sensitivities[index]
                groups, size = total.shape[:2]
                rows = gradient[real].double().unflatten(-1, (groups, -1, size))  # [N, G, R, C]
                total += torch.einsum("ngrc,ngre->gce", rows, rows)
            if advance is not None:
                advance(input_ids.numel())
    finally:
        for handle in handles:
            handle.remove()


def _rows_of(ids: torch.Tensor, part: torch.Tensor, _probabilities: torch.Tensor) -> torch.Tensor:
    return ids[part]


@torch.no_grad()
def likelihood_gradient(
    states: torch.Tensor, head: torch.Tensor, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Of the sum of log p(y) with respect to the final states [N, D], p being softmax(head states).

    y [rows] is what `choose` makes of the numbers of some rows, and their p [rows, V]. Raises FloatingPointError where
    there is no p.
    """
    gradients = torch.empty_like(states)
    for part in torch.arange(len(states), device=states.device).split(LOGIT_ROWS):
        change = torch.softmax(torch.nn.functional.linear(states[part], head).float(), dim=-1)
        if not all_finite([change]):
            raise FloatingPointError("the base predicts nothing")
        chosen = choose(part, change).unsqueeze(1)
        change.neg_().scatter_add_(1, chosen, torch.ones_like(chosen, dtype=change.dtype))
        gradients[part] = change.to(head.dtype) @ head
    return gradients


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
    inputs = moments.inputs[layer] / moments.weights[layer].view(-1, 1, 1)
    if moments.attended[layer].numel():
        inputs = moments.attended[layer] / moments.tokens
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
