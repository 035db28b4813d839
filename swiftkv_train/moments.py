"""The sums that a calibration's closed form is made of (see `calibrate`), from passes of the base over some tokens.

One pass sums X'MX and X'MY, and for layers that share K/V what their attention makes of X; a shorter one, with a
backward pass, what the base's predictions feel of an error there.

    N tokens   D hidden size (+ 1 with biases)   G K/V heads   C head size   P parts of a layer: G, or 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from swiftkv_models.rope import rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from swiftkv_models import LlamaSwiftKVForCausalLM
    from swiftkv_models.llama import TrunkOutput
    from swiftkv_train.data import Batch

Weighting: TypeAlias = Literal["head", "layer", "none"]
# Bytes of attention scores at a time: on CPU what stays in its caches.
CPU_SCORE_BYTES, DEVICE_SCORE_BYTES = 16 << 20, 512 << 20
LOGIT_ROWS = 512  # tokens whose logits exist at a time
SENSITIVITY_TOKENS = 8192  # that are enough for the small matrices g g'


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
        """All that hold something."""
        parts = (self.inputs, self.products, self.sums, self.squares, self.weights, self.queries, [self.tokens])
        shared = (self.attended, self.attended_products, self.sensitivities)
        return [tensor for part in (*parts, *shared) for tensor in part if tensor.numel()]


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


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
