"""Calibrated start: the tail's K/V projections in closed form.

Every tail layer's K/V input is one tensor X = norm_swiftkv(h_l) [N, D], and the trunk is the same in base and student.
So the best linear projections onto the base's own K and V (before RoPE), Y = [K, V] [N, 2 G C] of a layer, are the
ridge solution W' = (X'X + r I)^-1 X'Y with r = ridge x mean diagonal of X'X. One pass over the tokens accumulates X'X
once and X'Y per layer in fp64; nothing else is kept. With biases X gets a column of ones, which the ridge leaves alone.
The layers of an AcrossKV group share the mean of their solutions.

The fit's R^2 per layer (1: the projection is exact) says how much of a layer's K/V the shared state still holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from swiftkv_models import LlamaSwiftKVForCausalLM
    from swiftkv_train.data import Batch


@dataclass
class LayerFit:
    """How well a tail layer's K and V are linear in the shared state, on the calibration tokens."""

    layer: int
    r2_keys: float
    r2_values: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Moments:
    """fp64 sums over tokens: X'X [D, D], and per tail layer X'Y [D, 2 G C], sum of Y and of Y^2 [2 G C]."""

    inputs: torch.Tensor
    products: list[torch.Tensor]
    sums: list[torch.Tensor]
    squares: list[torch.Tensor]
    tokens: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [self.inputs, *self.products, *self.sums, *self.squares, self.tokens]


class KeyValueRecorder:
    """Collects what the base's own k_proj and v_proj of the tail put out while it runs."""

    def __init__(self, model: LlamaSwiftKVForCausalLM):
        self.outputs: list[dict[str, torch.Tensor]] = []
        self.handles = []
        for layer in model.model.layers[model.config.num_key_value_layers :]:
            found: dict[str, torch.Tensor] = {}
            self.outputs.append(found)
            for name in ("k_proj", "v_proj"):
                module = getattr(layer.self_attn, name)
                self.handles.append(module.register_forward_hook(self._keep(found, name)))

    @staticmethod
    def _keep(found: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            found[name] = output

        return hook

    def targets(self, layer: int) -> torch.Tensor:
        found = self.outputs[layer]
        return torch.cat([found["k_proj"].flatten(0, -2), found["v_proj"].flatten(0, -2)], dim=-1)

    def __enter__(self) -> KeyValueRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def accumulate_moments(
    model: LlamaSwiftKVForCausalLM,
    batches: Iterable[Batch],
    device: torch.device | str,
    advance: Callable[[int], None] | None = None,
) -> Moments:
    """Run the base over `batches` (its own tail, hence `base_projections`) and sum what the fit needs.

    Padding counts as one more document: its positions are left out. `advance` is told the tokens of every batch.
    """
    config = model.config
    width = config.hidden_size + int(config.attention_bias)
    attention = model.model.layers[-1].self_attn
    outputs = attention.k_proj.out_features + attention.v_proj.out_features
    tail = config.num_hidden_layers - config.num_key_value_layers

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    moments = Moments(
        zeros(width, width),
        [zeros(width, outputs) for _ in range(tail)],
        [zeros(outputs) for _ in range(tail)],
        [zeros(outputs) for _ in range(tail)],
        zeros(1),
    )
    with KeyValueRecorder(model) as recorder:
        for batch in batches:
            trunk = model.model.run_trunk(
                batch.input_ids.to(device), position_ids=batch.position_ids.to(device), use_cache=False
            )
            model.model.run_tail(trunk, base=True)
            real = batch.token_mask.to(device).flatten()
            states = model.model.norm_swiftkv(trunk.hidden_states).flatten(0, 1)[real].double()
            if config.attention_bias:
                states = torch.cat([states, states.new_ones(len(states), 1)], dim=-1)
            moments.inputs += states.T @ states
            moments.tokens += len(states)
            for layer in range(tail):
                targets = recorder.targets(layer)[real].double()
                moments.products[layer] += states.T @ targets
                moments.sums[layer] += targets.sum(0)
                moments.squares[layer] += targets.square().sum(0)
            if advance is not None:
                advance(batch.input_ids.numel())
    return moments


@torch.no_grad()
def solve(model: LlamaSwiftKVForCausalLM, moments: Moments, ridge: float) -> list[LayerFit]:
    """Put the ridge solutions into the `k_proj_swiftkv` and `v_proj_swiftkv` of `model`.

    Returns the fit of every tail layer.
    """
    config = model.config
    width = config.hidden_size
    strength = ridge * moments.inputs.diagonal()[:width].mean()
    penalty = torch.zeros_like(moments.inputs.diagonal())
    penalty[:width] = strength
    factor = torch.linalg.cholesky(moments.inputs + torch.diag(penalty))
    first = config.num_key_value_layers
    solutions, fits = [], []
    for offset, products in enumerate(moments.products):
        solution = torch.cholesky_solve(products, factor)  # [D (+1), 2 G C]
        solutions.append(solution)
        # residual = Y'Y - 2 W'X'Y + W'X'X W, per output; total about the mean
        explained = 2 * (solution * products).sum(0) - (solution * (moments.inputs @ solution)).sum(0)
        residual = moments.squares[offset] - explained
        total = moments.squares[offset] - moments.sums[offset].square() / moments.tokens
        half = len(residual) // 2
        r2 = [1 - float(residual[part].sum() / total[part].sum()) for part in (slice(0, half), slice(half, None))]
        fits.append(LayerFit(first + offset, *r2))
    for leader in range(first, config.num_hidden_layers):
        members = [
            index for index in range(leader, config.num_hidden_layers) if config.key_value_leader(index) == leader
        ]
        if not members:
            continue
        shared = torch.stack([solutions[index - first] for index in members]).mean(0)
        attention = model.model.layers[leader].self_attn
        half = shared.shape[1] // 2
        for projection, part in (
            (attention.k_proj_swiftkv, shared[:, :half]),
            (attention.v_proj_swiftkv, shared[:, half:]),
        ):
            projection.weight.copy_(part[:width].T)
            if config.attention_bias:
                projection.bias.copy_(part[width])
    return fits
