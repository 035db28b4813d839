"""Which layers should keep K/V of their own: the predicted loss of every l and of every grouping, from one pass.

One pass of the base over some tokens sums what every closed-form projection needs: X_l, the input of layer l's k_proj,
is what `norm_swiftkv` would give for that l, so X_l'X_l and X_l'Y_i determine the K and V that it has for any layer
i >= l, alone or in any group (`shared_projections`). Of a few more tokens the pass keeps the tensors themselves. There
a tail layer's attention over the K and V of a form, with the base's own queries, is d_i off its own, and a form costs

    1/2 E[(sum over its tail's layers of g_i'd_i)^2]        nats a token

g_i is the gradient of log p(y) at the output of layer i's attention, summed over the tokens to come, with y drawn from
what the base predicts. E[g g'] is the Fisher information, so for small errors this is the KL. They are not small, and a
token's alone: it ranks forms (benchmarks/quality/layers.json), and `relative` is over that of the recipe's own.

    L layers   D hidden size (+ 1 with biases)   H query heads   G K/V heads   C head size   N tokens   B rows of T
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from swiftkv_models.llama import uniform_groups
from swiftkv_models.rope import rotate
from swiftkv_train.calibrate import not_finite, ridge_solution, undetermined
from swiftkv_train.data import load_training_data
from swiftkv_train.loading import compute_device, load_tokenizer, pad_token_id
from swiftkv_train.moments import all_finite, likelihood_gradient
from swiftkv_train.plan.inference import cache_bytes_per_token, prefill_flops
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe
from swiftkv_train.shared_projections import fast_frequencies, mean_values, shared_keys
from swiftkv_train.student import build_model, training_attention

if TYPE_CHECKING:
    from swiftkv_models import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM
    from swiftkv_models.llama import TrunkOutput
    from swiftkv_train.data import Batch

UNIFORM_GROUPS = (1, 2, 4)
LARGEST_GROUP = 8
BEAM = 32
SAMPLE_TOKENS = 4096  # beside the calibration's
MOST_BYTES = 4 << 30  # of sums; more candidates for l than fit are thinned out


@dataclass
class Sample:
    """One batch of the base: what its layers take and give, and which keys [B, 1, 1, T, T] a token sees."""

    inputs: dict[int, torch.Tensor]  # l -> X_l [B, T, D]
    queries: list[torch.Tensor]  # rotated [B, G, H / G, T, C]
    outputs: list[torch.Tensor]  # of attention, the same shape
    gradients: list[torch.Tensor]  # of log p(y), the same shape
    rotation: tuple[torch.Tensor, torch.Tensor]
    visible: torch.Tensor
    real: torch.Tensor  # [B, T]


@dataclass
class LayerSums:
    """Sums over N tokens, in fp32 where the base computes in half precision and else fp64; and the samples."""

    candidates: list[int]  # values of l
    inputs: dict[int, torch.Tensor]  # l -> X_l'X_l [D, D]
    products: dict[int, torch.Tensor]  # l -> X_l'Y_i of layers i >= l [D, L - l, 2, G, C]
    queries: list[torch.Tensor]  # of the squares of queries [H, C]
    samples: list[Sample]
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


def accumulate(
    model: LlamaSwiftKVForCausalLM,
    batches: Iterable[Batch],
    device: torch.device | str,
    advance: Callable[[int], None] | None = None,
    samples: int = 1,
) -> LayerSums:
    """Run the base (hence `base_projections`) over `batches`: keep the first `samples`, sum up the rest."""
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
        queries=[zeros(heads, size) for _ in range(layers)],
        samples=[],
    )
    found: dict[tuple[int, str], torch.Tensor] = {}
    generator = torch.Generator(device).manual_seed(0)
    with _recording(model, found):
        for batch in batches:
            real, input_ids = batch.token_mask.to(device), batch.input_ids.to(device)
            is_sample = len(sums.samples) < samples
            trunk = _run(model, input_ids, batch.position_ids.to(device), real, generator if is_sample else None)
            with torch.no_grad():
                for index in candidates if config.attention_bias else ():
                    inputs = found[index, "x"]
                    found[index, "x"] = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
                if is_sample:
                    sums.samples.append(_sample(found, trunk, real, candidates, groups))
                else:
                    _add(sums, found, real, precise)
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
            if taken == "a" and inputs[0].requires_grad:
                inputs[0].retain_grad()

        handles.append(module.register_forward_hook(hook))

    for index, layer in enumerate(model.model.layers):
        attention: Any = layer.self_attn
        watch(attention.k_proj, index, "x", "k")
        watch(attention.v_proj, index, "", "v")
        watch(attention.q_proj, index, "", "q")
        watch(attention.o_proj, index, "a", "")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: LlamaSwiftKVForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    real: torch.Tensor,
    generator: torch.Generator | None,
) -> TrunkOutput:
    """Forward of the base; with `generator` backward of log p(y) over real tokens, y drawn from its predictions."""
    embedded = model.model.embed_tokens(input_ids).detach().requires_grad_(generator is not None)
    trunk = model.model.run_trunk(inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
    states = model.model.run_tail(trunk, base=True).last_hidden_state[real]
    if generator is None:
        return trunk
    states.backward(
        likelihood_gradient(
            states,
            model.lm_head.weight,
            lambda _, probabilities: torch.multinomial(probabilities, 1, generator=generator)[:, 0],
        )
    )
    return trunk


def _add(sums: LayerSums, found: dict[tuple[int, str], torch.Tensor], real: torch.Tensor, precise: torch.dtype) -> None:
    layers, (_, size) = len(sums.queries), sums.queries[0].shape
    outputs = []
    for layer in range(layers):
        queries = found[layer, "q"][real].to(precise)
        sums.queries[layer] += queries.square().sum(0).view(-1, size)
        outputs.append(torch.cat([found[layer, name][real].to(precise) for name in "kv"], dim=1))
    all_outputs = torch.cat(outputs, dim=1)
    columns = outputs[0].shape[1]
    for first in sums.candidates:
        inputs = found[first, "x"][real].to(precise)
        sums.inputs[first] += inputs.T @ inputs
        sums.products[first] += (inputs.T @ all_outputs[:, first * columns :]).view_as(sums.products[first])
    sums.tokens += int(real.sum())


def _sample(
    found: dict[tuple[int, str], torch.Tensor],
    trunk: TrunkOutput,
    real: torch.Tensor,
    candidates: Sequence[int],
    groups: int,
) -> Sample:
    cos, sin = trunk.position_embeddings
    size = cos.shape[-1]
    queries = []
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for layer in range(1 + max(index for index, _ in found)):
        heads = found[layer, "q"].detach().unflatten(-1, (-1, size)).transpose(1, 2)
        queries.append(rotate(heads, cos, sin).unflatten(1, (groups, -1)))
        attended = found[layer, "a"]
        assert attended.grad is not None
        for kept, tensor in ((outputs, attended.detach()), (gradients, attended.grad)):
            kept.append(tensor.unflatten(-1, (groups, -1, size)).permute(0, 2, 3, 1, 4))
    documents = (trunk.position_ids == 0).cumsum(1)
    visible = (documents[:, :, None] == documents[:, None]).tril()[:, None, None]
    inputs = {first: found[first, "x"].detach() for first in candidates}
    return Sample(inputs, queries, outputs, gradients, (cos, sin), visible, real)


Way: TypeAlias = tuple[float, list[list[int]], torch.Tensor]  # loss, groups, and g'd of the tokens


class Predictor:
    """Predicted losses from the sums of a pass. The errors of a group are kept: many forms have it."""

    def __init__(self, model: LlamaSwiftKVForCausalLM, sums: LayerSums, ridge: float):
        self.model, self.sums, self.ridge = model, sums, ridge
        self.config = model.config
        self._projections: dict[int, torch.Tensor] = {}
        self._errors: dict[tuple[int, int, int], torch.Tensor] = {}
        self._metrics: dict[int, torch.Tensor] = {}

    def loss(self, first: int, groups: Sequence[Sequence[int]]) -> float:
        """Of the form with l = `first` and these groups of the tail's layers."""
        return _mean_square(sum(self.group_errors(first, group[0], len(group)) for group in groups))

    def group_errors(self, first: int, leader: int, size: int) -> torch.Tensor:
        """g'd of every sampled token [N], of the layers from `leader` on, `size` of them with one K/V."""
        key = (first, leader, size)
        if key not in self._errors:
            self._errors[key] = self._group_errors(first, list(range(leader, leader + size)))
        return self._errors[key]

    @torch.no_grad()
    def _group_errors(self, first: int, members: list[int]) -> torch.Tensor:
        solutions = self._solutions(first)[:, [layer - first for layer in members]]  # [D, g, 2, G, C]
        keys, values = (solutions[:, :, kind].transpose(0, 1) for kind in (0, 1))  # [g, D, G, C]
        if len(members) > 1:
            rms = torch.stack([self._query_power(layer) for layer in members]).sqrt().clamp_min(1e-12)  # [g, G, F]
            fast = fast_frequencies(self.model.model.rotary_emb.inv_freq, self.config.max_position_embeddings)
            shared, turns = shared_keys(keys, self._inputs(first), rms, fast)
            keys = torch.einsum("jgce,dge->jdgc", turns, shared)  # queries T'q meet k as queries q meet T k
            common = mean_values(values, torch.stack([self._metric(layer) for layer in members]))
            values = common.expand(len(members), *common.shape)
        errors = [
            self._layer_errors(first, layer, *projections)
            for layer, *projections in zip(members, keys, values, strict=True)
        ]
        return torch.stack(errors).sum(0)

    def _layer_errors(self, first: int, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """g_i'd_i [N] of K and V projections [D, G, C] from X_l."""
        found = []
        for sample in self.sums.samples:
            inputs = sample.inputs[first]
            dtype = torch.promote_types(inputs.dtype, torch.float32)
            key, value = (torch.einsum("btd,dgc->bgtc", inputs.to(dtype), part.to(dtype)) for part in (keys, values))
            cos, sin = (table.to(dtype) for table in sample.rotation)
            scores = sample.queries[layer].to(dtype) @ rotate(key, cos, sin).unsqueeze(2).transpose(3, 4)
            scores = scores.mul_(keys.shape[-1] ** -0.5).masked_fill_(~sample.visible, float("-inf"))
            wrong = torch.softmax(scores, dim=-1) @ value.unsqueeze(2) - sample.outputs[layer]  # [B, G, H / G, T, C]
            found.append((wrong * sample.gradients[layer]).sum((1, 2, 4))[sample.real])
        return torch.cat(found).double()

    def _inputs(self, first: int) -> torch.Tensor:
        return self.sums.inputs[first].double() / self.sums.tokens

    def _solutions(self, first: int) -> torch.Tensor:
        """Ridge solutions of all layers from l on [D, L - l, 2, G, C]."""
        if first not in self._projections:
            inputs, products = self._inputs(first), self.sums.products[first].double() / self.sums.tokens
            try:
                solution = ridge_solution(inputs[None], products.flatten(1)[None], self.ridge, self.config.hidden_size)
            except torch.linalg.LinAlgError:
                raise undetermined(self.sums.tokens, self.ridge) from None
            self._projections = {first: solution.view_as(products)}
        return self._projections[first]

    def _query_power(self, layer: int) -> torch.Tensor:
        """E|q_f|^2 of the frequencies of RoPE, a mean over a K/V head's query heads [G, F]."""
        groups = self.config.num_key_value_heads
        squares = self.sums.queries[layer].double().unflatten(0, (groups, -1)).mean(1) / self.sums.tokens
        first, second = squares.chunk(2, dim=1)
        return first + second

    def _metric(self, layer: int) -> torch.Tensor:
        """g g' of what a layer's attention puts out, summed over the samples [G, C, C]."""
        if layer not in self._metrics:
            rows = [sample.gradients[layer].permute(0, 3, 1, 2, 4)[sample.real] for sample in self.sums.samples]
            gradients = torch.cat(rows).double()  # [N, G, R, C]
            self._metrics[layer] = torch.einsum("ngrc,ngre->gce", gradients, gradients)
        return self._metrics[layer]

    def best_groups(self, first: int) -> list[tuple[list[list[int]], float]]:
        """For 1, 2, ... K/Vs in the tail, a grouping (of LARGEST_GROUP layers at most) with little loss.

        A beam search from the last layer down: of the ways to put the layers from one on into n groups, the BEAM best.
        """
        last = self.config.num_hidden_layers
        nothing = torch.zeros_like(self.group_errors(first, first, 1))
        beams: dict[tuple[int, int], list[Way]] = {(last, 0): [(0.0, [], nothing)]}
        for leader in range(last - 1, first - 1, -1):
            ways: dict[int, list[Way]] = {}
            for size in range(1, min(LARGEST_GROUP, last - leader) + 1):
                group = list(range(leader, leader + size))
                for count in range(last - leader - size + 1):
                    for _, groups, errors in beams.get((leader + size, count), []):
                        total = errors + self.group_errors(first, leader, size)
                        ways.setdefault(count + 1, []).append((_mean_square(total), [group, *groups], total))
            for count, found in ways.items():
                beams[leader, count] = sorted(found, key=lambda way: way[0])[:BEAM]
        best = [beams[first, count][0] for count in range(1, last - first + 1) if (first, count) in beams]
        return [(groups, loss) for loss, groups, _ in best]


def _mean_square(errors: Any) -> float:
    return float(errors.square().mean()) / 2


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
            "relative": loss / own if own else None,
        }

    uniform = []
    for first in sums.candidates:
        for size in UNIFORM_GROUPS:
            groups = uniform_groups(first, config.num_hidden_layers, size)
            if size <= config.num_hidden_layers - first:
                uniform.append(row(first, groups, size, predictor.loss(first, groups)))
        advance(1)
    first = config.num_key_value_layers
    grouped = [row(first, groups, None, loss) for groups, loss in predictor.best_groups(first)]
    return {"tokens": sums.tokens, "context": context, "own": own, "uniform": uniform, "grouped": grouped}


def look(recipe: Recipe) -> tuple[LlamaSwiftKVForCausalLM, LayerSums]:
    """The recipe's model, not calibrated, and the sums over its calibration's tokens."""
    report = Reporter()
    length, rows = recipe.data.sequence_length, recipe.training.micro_batch_size
    device: Any = compute_device()
    model = build_model(recipe)
    tokenizer = load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    data = load_training_data(
        recipe.data, tokenizer, model.config.vocab_size, pad_token_id(tokenizer), base=recipe.model, report=report
    )
    model.requires_grad_(False)
    model.to(device)
    samples = max(1, SAMPLE_TOKENS // (rows * length))
    sequences = max(1, recipe.calibration.tokens // length) + samples * rows
    batches = (data.batch_of(range(start, min(start + rows, sequences))) for start in range(0, sequences, rows))
    with training_attention(model), report.bar("look", total=sequences * length, unit="tokens") as advance:
        try:
            sums = accumulate(model, batches, device, advance, samples)
        except FloatingPointError:
            raise not_finite(recipe.model.base) from None
    if not all_finite([*sums.inputs.values(), *sums.products.values()]):
        raise not_finite(recipe.model.base)
    return model, sums


def predict(recipe: Recipe) -> dict[str, Any]:
    """`predictions` for a recipe's base, from its calibration's tokens and for prompts of its sequence length."""
    model, sums = look(recipe)
    with Reporter().bar("predict", total=len(sums.candidates), unit="values of l") as advance:
        found = predictions(model, sums, recipe.calibration.ridge, recipe.data.sequence_length, advance)
    form = {"num_hidden_layers": model.config.num_hidden_layers, **recipe.rewrite.form()}
    return {"base": recipe.model.base, **form, **found}
