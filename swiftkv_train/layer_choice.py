"""Which layers should keep K/V of their own: the predicted loss of every l and of every grouping, from one pass.

One pass of the base over some tokens sums what every closed-form projection needs: X_l, the input of layer l's k_proj,
is what `norm_swiftkv` would give for that l, so X_l'X_l and X_l'Y_i determine the K and V that it has for any layer
i >= l, alone or in any group (`shared_projections`), and Y_i'Y_i tells what they leave unexplained. From these
residuals, a layer loses, relative to the residual stream that it adds to,

    e_i = (1 / |h_i|^2) sum over heads of  tr(O' O R_V) + min(1, s^2) tr(O' O S_V)
    s^2 = 1/(2 C) sum over RoPE's frequencies of |q_f|^2 |r_f|^2

R_V is the covariance of V's residual and S_V that of V itself, O the head's columns of o_proj, s^2 the variance of an
attention score's error (r_f is K's residual as a complex number, whose phase against q's is taken as random). The loss
of a form is the sum over its tail layers. It is no KL: errors are taken as independent, and what attention averages out
is not known. It ranks forms (tests, benchmarks/quality), and `relative` is over that of the recipe's own.

The best grouping with n K/Vs in a tail is a shortest path over its layers: no other is looked at.

    L layers   D hidden size (+ 1 with biases)   H query heads   G K/V heads   C head size   N tokens
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from swiftkv_train.data import load_training_data
from swiftkv_train.errors import UserError
from swiftkv_train.loading import load_tokenizer, pad_token_id
from swiftkv_train.plan.inference import cache_bytes_per_token, prefill_flops
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe
from swiftkv_train.shared_projections import complex_halves, real_halves, shared_keys, shared_values
from swiftkv_train.student import build_model, training_attention

if TYPE_CHECKING:
    from swiftkv_models import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM
    from swiftkv_train.data import Batch

UNIFORM_GROUPS = (1, 2, 4)
LARGEST_GROUP = 8
MOST_BYTES = 4 << 30  # of sums; more candidates for l than fit are thinned out


@dataclass
class LayerSums:
    """Sums over N tokens, in fp32 where the base computes in half precision and else fp64."""

    candidates: list[int]  # values of l
    inputs: dict[int, torch.Tensor]  # l -> X_l'X_l [D, D]
    products: dict[int, torch.Tensor]  # l -> X_l'Y_i of layers i >= l [D, L - l, 2, G, C]
    squares: list[torch.Tensor]  # Y_i'Y_i [2, G, C, C]
    sums: list[torch.Tensor]  # of Y_i [2, G, C]
    queries: list[torch.Tensor]  # of the squares of queries [H, C]
    inverse_power: list[float]  # of 1 / |h|^2, h the stream after layer i's attention
    tokens: int = 0


def sum_bytes(config: LlamaSwiftKVConfig, candidates: Sequence[int], itemsize: int) -> int:
    width = config.hidden_size + int(config.attention_bias)
    outputs = 2 * config.num_key_value_heads * config.head_dim  # type: ignore[operator]
    return itemsize * sum(width * (width + (config.num_hidden_layers - l) * outputs) for l in candidates)  # noqa: E741


def candidate_layers(config: LlamaSwiftKVConfig, itemsize: int) -> list[int]:
    """All values of l, or as many, evenly spaced and the recipe's own among them, as have room for their sums."""
    own, layers = config.num_key_value_layers, config.num_hidden_layers
    for stride in range(1, layers):
        found = [layer for layer in range(1, layers) if (layer - own) % stride == 0]
        if sum_bytes(config, found, itemsize) <= MOST_BYTES:
            return found
    return [own]


@torch.no_grad()
def accumulate(
    model: LlamaSwiftKVForCausalLM,
    batches: Iterable[Batch],
    device: torch.device | str,
    advance: Callable[[int], None] | None = None,
) -> LayerSums:
    """Run the base (hence `base_projections`) over `batches` and sum up."""
    config = model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert isinstance(groups, int)
    assert isinstance(size, int)
    precise = torch.float32 if model.dtype.itemsize == 2 else torch.float64
    layers, width = config.num_hidden_layers, config.hidden_size + int(config.attention_bias)
    candidates = candidate_layers(config, precise.itemsize)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=precise, device=device)

    sums = LayerSums(
        candidates,
        inputs={first: zeros(width, width) for first in candidates},
        products={first: zeros(width, layers - first, 2, groups, size) for first in candidates},
        squares=[zeros(2, groups, size, size) for _ in range(layers)],
        sums=[zeros(2, groups, size) for _ in range(layers)],
        queries=[zeros(heads, size) for _ in range(layers)],
        inverse_power=[0.0] * layers,
    )
    found: dict[tuple[int, str], torch.Tensor] = {}
    with _recording(model, found):
        for batch in batches:
            position_ids = batch.position_ids.to(device)
            trunk = model.model.run_trunk(batch.input_ids.to(device), position_ids=position_ids, use_cache=False)
            model.model.run_tail(trunk, base=True)
            real = batch.token_mask.to(device)
            _add(sums, found, real, precise, biased=config.attention_bias)
            if advance is not None:
                advance(batch.input_ids.numel())
    return sums


@contextmanager
def _recording(model: LlamaSwiftKVForCausalLM, found: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """Within it, `found` holds what the base's layers last took and gave, by layer and name."""
    handles = []

    def watch(module: torch.nn.Module, index: int, taken: str, given: str) -> None:
        def hook(_module: Any, inputs: Any, output: torch.Tensor) -> None:
            found.update({(index, name): tensor for name, tensor in ((taken, inputs[0]), (given, output)) if name})

        handles.append(module.register_forward_hook(hook))

    for index, layer in enumerate(model.model.layers):
        attention: Any = layer.self_attn
        watch(attention.k_proj, index, "x", "k")
        watch(attention.v_proj, index, "", "v")
        watch(attention.q_proj, index, "", "q")
        watch(layer.post_attention_layernorm, index, "h", "")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    sums: LayerSums, found: dict[tuple[int, str], torch.Tensor], real: torch.Tensor, precise: torch.dtype, biased: bool
) -> None:
    layers, (_, groups, size) = len(sums.squares), sums.sums[0].shape
    outputs = []
    for layer in range(layers):
        keys, values, queries, stream = (found[layer, name][real].to(precise) for name in "kvqh")
        targets = torch.stack([keys, values], dim=1).unflatten(2, (groups, size))  # [N, 2, G, C]
        sums.squares[layer] += torch.einsum("nkgc,nkge->kgce", targets, targets)
        sums.sums[layer] += targets.sum(0)
        sums.queries[layer] += queries.square().sum(0).view(-1, size)
        sums.inverse_power[layer] += float((1 / stream.square().sum(-1)).sum())
        outputs.append(targets.flatten(1))
    all_outputs = torch.cat(outputs, dim=1)
    columns = outputs[0].shape[1]
    for first in sums.candidates:
        inputs = found[first, "x"][real].to(precise)
        if biased:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        sums.inputs[first] += inputs.T @ inputs
        sums.products[first] += (inputs.T @ all_outputs[:, first * columns :]).view_as(sums.products[first])
    sums.tokens += int(real.sum())


class Predictor:
    """Predicted losses from the sums of a pass; results are kept, for groups of one form are groups of many."""

    def __init__(self, model: LlamaSwiftKVForCausalLM, sums: LayerSums, ridge: float):
        self.model, self.sums, self.ridge = model, sums, ridge
        self.config = model.config
        self._projections: dict[int, torch.Tensor] = {}
        self._losses: dict[tuple[int, int, int], float] = {}

    def loss(self, first: int, groups: Sequence[Sequence[int]]) -> float:
        """Of the form with l = `first` and these groups of the tail's layers."""
        return sum(self.group_loss(first, group[0], len(group)) for group in groups)

    def group_loss(self, first: int, leader: int, size: int) -> float:
        """What the layers from `leader` on, `size` of them with one K/V, add to the loss."""
        key = (first, leader, size)
        if key not in self._losses:
            self._losses[key] = self._group_loss(first, list(range(leader, leader + size)))
        return self._losses[key]

    @torch.no_grad()
    def _group_loss(self, first: int, members: list[int]) -> float:
        solutions = self._solutions(first)[:, [layer - first for layer in members]]  # [D, g, 2, G, C]
        keys, values = (solutions[:, :, kind].transpose(0, 1) for kind in (0, 1))  # [g, D, G, C]
        if len(members) > 1:
            rms = torch.stack([self._query_power(layer) for layer in members]).sqrt().clamp_min(1e-12)  # [g, G, F]
            shared, factors = shared_keys(keys, self._inputs(first), rms)
            weights = torch.stack([self._outputs(layer).permute(1, 0, 2) for layer in members])  # [g, D, H, C]
            common = shared_values(values, weights)
            turned = [real_halves(complex_halves(shared) * factor) for factor in factors]
            keys, values = torch.stack(turned), common.expand(len(members), *common.shape)
        return sum(
            self._layer_loss(first, layer, key, value) for layer, key, value in zip(members, keys, values, strict=True)
        )

    def _layer_loss(self, first: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> float:
        """e_i of K and V projections [D, G, C] from X_l."""
        tokens, size = self.sums.tokens, keys.shape[-1]
        left_keys, left_values = (
            self._residual(first, layer, kind, projection) for kind, projection in ((0, keys), (1, values))
        )
        power = left_keys.diagonal(dim1=1, dim2=2).clamp_min(0)  # [G, C]
        frequencies = sum(power.chunk(2, dim=1))
        variance = (self._query_power(layer) * frequencies).sum(1) / (2 * size)  # [G], a mean over a group's heads
        mean = self.sums.sums[layer][1].double() / tokens
        spread = self.sums.squares[layer][1].double() / tokens - mean.unsqueeze(2) * mean.unsqueeze(1)
        outputs = self._outputs(layer).unflatten(0, (len(keys[0]), -1))  # [G, R, D, C]
        metric = torch.einsum("grdc,grde->gce", outputs, outputs)
        lost = (metric * left_values).sum((1, 2)) + variance.clamp_max(1.0) * (metric * spread).sum((1, 2))
        return float(lost.sum()) * self.sums.inverse_power[layer] / tokens

    def _residual(self, first: int, layer: int, kind: int, projection: torch.Tensor) -> torch.Tensor:
        """E[(y - W'x)(y - W'x)'] of every head [G, C, C]."""
        target = self.sums.products[first][:, layer - first, kind].double() / self.sums.tokens  # [D, G, C]
        cross = torch.einsum("dgc,dge->gce", projection, target)
        explained = torch.einsum("dgc,df,fge->gce", projection, self._inputs(first), projection)
        return self.sums.squares[layer][kind].double() / self.sums.tokens - cross - cross.transpose(1, 2) + explained

    def _inputs(self, first: int) -> torch.Tensor:
        return self.sums.inputs[first].double() / self.sums.tokens

    def _solutions(self, first: int) -> torch.Tensor:
        """Ridge solutions of all layers from l on [D, L - l, 2, G, C]."""
        if first not in self._projections:
            inputs, products = self._inputs(first), self.sums.products[first].double() / self.sums.tokens
            width = self.config.hidden_size
            penalty = torch.zeros_like(inputs[0])
            penalty[:width] = self.ridge * inputs.diagonal()[:width].mean()
            factor = torch.linalg.cholesky(inputs + torch.diag_embed(penalty))
            self._projections = {first: torch.cholesky_solve(products.flatten(1), factor).view_as(products)}
        return self._projections[first]

    def _query_power(self, layer: int) -> torch.Tensor:
        """E|q_f|^2 of the frequencies of RoPE, a mean over a K/V head's query heads [G, F]."""
        groups = self.sums.sums[0].shape[1]
        squares = self.sums.queries[layer].double().unflatten(0, (groups, -1)).mean(1) / self.sums.tokens
        first, second = squares.chunk(2, dim=1)
        return first + second

    def _outputs(self, layer: int) -> torch.Tensor:
        """o_proj by query head [H, D, C]."""
        attention: Any = self.model.model.layers[layer].self_attn
        size = self.sums.sums[0].shape[2]
        return attention.o_proj.weight.double().unflatten(1, (-1, size)).transpose(0, 1)

    def best_groups(self, first: int) -> list[tuple[list[list[int]], float]]:
        """For 1, 2, ... K/Vs in the tail, the grouping (of LARGEST_GROUP layers at most) with the least loss."""
        last = self.config.num_hidden_layers
        best: dict[tuple[int, int], tuple[float, int]] = {(0, last): (0.0, 0)}  # K/Vs, from layer -> loss, group size
        for count in range(1, last - first + 1):
            for leader in range(first, last):
                ways = [
                    (self.group_loss(first, leader, size) + best[count - 1, leader + size][0], size)
                    for size in range(1, min(LARGEST_GROUP, last - leader) + 1)
                    if (count - 1, leader + size) in best
                ]
                if ways:
                    best[count, leader] = min(ways)
        found = []
        for count in range(1, last - first + 1):
            if (count, first) not in best:
                continue
            groups, leader, left = [], first, count
            while left:
                size = best[left, leader][1]
                groups.append(list(range(leader, leader + size)))
                leader, left = leader + size, left - 1
            found.append((groups, best[count, first][0]))
        return found


def predictions(
    model: LlamaSwiftKVForCausalLM, sums: LayerSums, ridge: float, context: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Of every l with groups of 1, 2 and 4, and of the best groupings at the model's own l: what it costs and saves.

    `context`: the tokens of a prompt that its share of the base's FLOPs is counted at.
    """
    config, predictor = model.config, Predictor(model, sums, ridge)
    own = predictor.loss(config.num_key_value_layers, config.tail_groups)

    def row(first: int, groups: list[list[int]], size: int | None, loss: float) -> dict[str, Any]:
        form, base = copy.copy(config), copy.copy(config)
        form.num_key_value_layers, form.key_value_group_size, form.key_value_groups = first, 1, groups
        base.num_key_value_layers, base.key_value_group_size, base.key_value_groups = config.num_hidden_layers, 1, None
        return {
            "num_key_value_layers": first,
            **({"key_value_groups": groups} if size is None else {"key_value_group_size": size}),
            "prefill_ratio": prefill_flops(form, context) / prefill_flops(base, context),
            "cache_ratio": cache_bytes_per_token(form, 1) / cache_bytes_per_token(base, 1),
            "loss": loss,
            "relative": loss / own if own else float("nan"),
        }

    uniform = []
    for first in sums.candidates:
        for size in UNIFORM_GROUPS:
            tail = range(first, config.num_hidden_layers)
            groups = [list(tail[at : at + size]) for at in range(0, len(tail), size)]
            if size <= len(tail):
                uniform.append(row(first, groups, size, predictor.loss(first, groups)))
        advance(1)
    first = config.num_key_value_layers
    grouped = [row(first, groups, None, loss) for groups, loss in predictor.best_groups(first)]
    return {"tokens": sums.tokens, "context": context, "own": own, "uniform": uniform, "grouped": grouped}


def predict(recipe: Recipe) -> dict[str, Any]:
    """`predictions` for a recipe's base, from its calibration's tokens and for prompts of its sequence length."""
    report = Reporter()
    length, rows = recipe.data.sequence_length, recipe.training.micro_batch_size
    device: Any = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = build_model(recipe)
    tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    data = load_training_data(
        recipe.data, tokenizer, model.config.vocab_size, pad_token_id(tokenizer), base=recipe.model, report=report
    )
    model.requires_grad_(False)
    model.to(device)
    sequences = max(1, recipe.calibration.tokens // length)
    batches = (data.batch_of(range(start, min(start + rows, sequences))) for start in range(0, sequences, rows))
    with training_attention(model), report.bar("look", total=sequences * length, unit="tokens") as advance:
        sums = accumulate(model, batches, device, advance)
    try:
        with report.bar("predict", total=len(sums.candidates), unit="values of l") as advance:
            found = predictions(model, sums, recipe.calibration.ridge, length, advance)
    except torch.linalg.LinAlgError:
        raise UserError(
            f"calibration: {sums.tokens} tokens do not determine the fit at ridge {recipe.calibration.ridge}; raise "
            "calibration.tokens or calibration.ridge"
        ) from None
    form = {"num_hidden_layers": model.config.num_hidden_layers, **recipe.rewrite.form()}
    return {"base": recipe.model.base, **form, **found}
