"""Ideas that took a change of the code and did not win: each for one run beside the recipe as it is.

    python benchmarks/quality/ideas.py RECIPE [IDEA ...] [key=value ...] [--points 1] [--tokens 2048]
        [--runs outputs/quality/ideas] [--output FILE.json]

A variant is the recipe's own distillation with one thing put in another's place; without names all ideas are run. What
came of it is in README.md beside this file. An idea is run in one go: the run of one that was stopped half-way has to
be removed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from swiftkv_train.bench import finish, run_script
from swiftkv_train.bench.quality import TEST, compared, settings_of, variant_of
from swiftkv_train.calibrate import ridge_solution
from swiftkv_train.data import Batch
from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.moments import Moments, ProjectionRecorder
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import load_recipe


@dataclass
class Idea:
    what: str
    change: Callable[[Distillation], None] = lambda run: None  # of a run that is ready for its first step
    overrides: Sequence[str] = ()
    of_groups: dict[str, Callable[..., Any]] = field(default_factory=dict)  # functions of the closed form of shared K/V


class Trial(Distillation):
    """A distillation with the idea in it that its run directory is named after."""

    def __init__(self, recipe: Recipe, **options: Any):
        super().__init__(recipe, **options)
        if self.step not in (0, recipe.training.steps):
            raise UserError(f"{self.run.path} holds an idea that was stopped half-way; remove it to begin again")
        self.idea = IDEAS[self.run.path.name]

    def prepare(self) -> None:
        with ExitStack() as replaced:
            for name, function in self.idea.of_groups.items():
                replaced.enter_context(patch(f"swiftkv_train.{name}", function))
            super().prepare()
        if self.step == 0:
            self.idea.change(self)


# Losses ---------------------------------------------------------------------------------------------------------------


def token_loss(loss: Callable[[Tensor, Tensor, Tensor], Tensor], run: Distillation) -> None:
    """`loss` of base's and student's log-probabilities [N, V] and the next tokens [N], a number each, for the KL."""
    module = run.strategy.unwrapped

    def losses(input_ids: Tensor, position_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        decoder, head = module.model.model, module.model.lm_head
        with torch.no_grad():
            trunk = decoder.run_trunk(input_ids, position_ids=position_ids, use_cache=False)
            base = decoder.run_tail(trunk, base=True)
            wanted = head(base.last_hidden_state[loss_mask]).float().log_softmax(-1)
        student = decoder.run_tail(trunk)
        found = head(student.last_hidden_state[loss_mask]).float().log_softmax(-1)
        difference = (student.last_layer_input - base.last_layer_input)[loss_mask].float()
        total = loss(wanted, found, input_ids.roll(-1, dims=1)[loss_mask]).sum()
        total = total + module.loss.hidden_mse * difference.square().mean(-1).sum()
        return total, kl(wanted, found.detach()).sum()

    module.losses = losses


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [N, V]."""
    return (p.exp() * (p - q)).sum(-1)


def jensen_shannon(base: Tensor, student: Tensor, _: Tensor) -> Tensor:
    """Four times the divergence, which near the base is the KL."""
    middle = torch.logaddexp(base, student) - torch.log(torch.tensor(2.0))
    return 2 * (kl(base, middle) + kl(student, middle))


def with_reverse(base: Tensor, student: Tensor, _: Tensor) -> Tensor:
    return 0.8 * kl(base, student) + 0.2 * kl(student, base)


def with_cross_entropy(base: Tensor, student: Tensor, next_ids: Tensor) -> Tensor:
    return kl(base, student) - 0.1 * student.gather(-1, next_ids[:, None])[:, 0]


def by_entropy(power: float, base: Tensor, student: Tensor, _: Tensor) -> Tensor:
    """Tokens weighed by a power of the base's entropy, 1 on average."""
    weight = (-(base.exp() * base).sum(-1)).clamp_min(1e-2) ** power
    return weight / weight.mean() * kl(base, student)


def layer_outputs(weight: float, run: Distillation) -> None:
    """Add the relative squared distance of every tail layer's output from the base's."""
    module, outputs = run.strategy.unwrapped, []
    for layer in module.model.model.layers[module.model.config.num_key_value_layers :]:
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    plain = module.losses

    def losses(input_ids: Tensor, position_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs.clear()
        total, kl_part = plain(input_ids, position_ids, loss_mask)
        layers = len(outputs) // 2  # of the base first
        for base, student in zip(outputs[:layers], outputs[layers:], strict=True):
            wanted, found = base[loss_mask].float(), student[loss_mask].float()
            total = total + weight * ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).sum()
        return total, kl_part

    module.losses = losses


# Optimizers -----------------------------------------------------------------------------------------------------------


class ScaledAdamW(torch.optim.AdamW):
    """Groups have a `scale` of the learning rate, which is set anew before every step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= group["scale"]
        return super().step(closure)


class Together:
    """Two optimizers of different tensors as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return list(itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers))

    @property
    def state(self) -> dict[Any, Any]:
        return {name: state for optimizer in self.optimizers for name, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


def twice(kinds: str, run: Distillation) -> None:
    """Twice the learning rate for projections of these kinds."""
    groups: dict[float, list[Any]] = {1.0: [], 2.0: []}
    for name, parameter in run.strategy.parameters().items():
        groups[2.0 if any(f"{kind}_proj" in name for kind in kinds) else 1.0].append(parameter)
    training = run.recipe.training
    run.strategy.optimizer = ScaledAdamW(
        [{"params": parameters, "scale": scale} for scale, parameters in groups.items()],
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
    )


def muon(run: Distillation) -> None:
    """Orthogonalised momentum for the projections, with steps as large as AdamW's."""
    training, parameters = run.recipe.training, run.strategy.parameters().values()
    matrices, vectors = ([p for p in parameters if (p.ndim == 2) is wanted] for wanted in (True, False))
    run.strategy.optimizer = Together(
        torch.optim.Muon(matrices, lr=training.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, lr=training.learning_rate, betas=training.betas, weight_decay=0.0),
    )


def mean_of_weights(run: Distillation) -> None:
    """The mean over the last fifth of the steps for the last step's weights."""
    plain, steps, sums, seen = run.train_step, run.recipe.training.steps, {}, 0

    def train_step() -> dict[str, float]:
        nonlocal seen
        row = plain()
        if run.step > 0.8 * steps:
            seen += 1
            for name, parameter in run.strategy.parameters().items():
                sums[name] = sums.get(name, 0) + parameter.detach()
                if run.step == steps:
                    parameter.data = sums[name] / seen
        return row

    run.train_step = train_step


# Data -----------------------------------------------------------------------------------------------------------------


def all_turns(run: Distillation) -> None:
    """Loss on what users say too."""
    plain = run.data.batch

    def batch(start: int, count: int) -> Batch:
        found = plain(start, count)
        goes_on = (found.position_ids.roll(-1, dims=1) != 0) & found.token_mask & found.token_mask.roll(-1, dims=1)
        goes_on[:, -1] = False
        return replace(found, loss_mask=goes_on)

    run.data.batch = batch


PROMPT = 16  # tokens of the data that the student goes on from


def on_policy(run: Distillation) -> None:
    """In the last fifth of the steps, what the student says after the first tokens of the data."""
    plain, training = run.data.batch, run.recipe.training
    first, length = round(0.8 * training.steps) * training.batch_size, run.recipe.data.sequence_length
    said: list[Tensor] = []

    def batch(start: int, count: int) -> Batch:
        if start < first:
            return plain(start, count)
        if not said:
            model, prompts = run.strategy.model, plain(first, training.steps * training.batch_size - first).input_ids
            half = run.strategy.unwrapped.autocast
            with plain_attention(model), torch.autocast(model.device.type, half, enabled=half is not None):
                ids = model.generate(
                    prompts[:, :PROMPT],
                    attention_mask=torch.ones_like(prompts[:, :PROMPT]),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=length - PROMPT,
                    max_new_tokens=length - PROMPT,
                )
            said.extend(ids)
        ids = torch.stack(said[start - first : start - first + count])
        everything = torch.ones_like(ids, dtype=torch.bool)
        scored = everything.clone()
        scored[:, : PROMPT - 1] = scored[:, -1] = False
        positions = torch.arange(length).expand_as(ids).contiguous()
        return Batch(ids, positions, scored, everything, torch.zeros(len(ids), dtype=torch.long))

    run.data.batch = batch


class plain_attention:
    """Attention that takes a cache, for a while."""

    def __init__(self, model: Any):
        self.model, self.before = model, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.set_attn_implementation("sdpa")

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.before)


# Calibration ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def queries_fitted(run: Distillation) -> None:
    """The tail's queries too: from the student's own states onto the base's queries, over the calibration's tokens."""
    model, recipe, rows = run.strategy.model, run.recipe, run.recipe.training.micro_batch_size
    layers = model.model.layers[model.config.num_key_value_layers :]
    states: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.q_proj_swiftkv.register_forward_pre_hook(
            lambda _module, inputs, index=index: states.update({index: inputs[0].detach()})
        )
        for index, layer in enumerate(layers)
    ]
    width = model.config.hidden_size
    moments = torch.zeros(len(layers), width, width, dtype=torch.float64)
    products = torch.zeros(len(layers), width, layers[0].self_attn.q_proj.out_features, dtype=torch.float64)
    sequences = max(1, recipe.calibration.tokens // recipe.data.sequence_length)
    half = run.strategy.unwrapped.autocast
    with ProjectionRecorder(model) as recorder:
        for start in range(0, sequences, rows):
            batch = run.data.batch_of(range(start, min(start + rows, sequences)))
            with torch.autocast(model.device.type, half, enabled=half is not None):
                trunk = model.model.run_trunk(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
                model.model.run_tail(trunk, base=True)
                model.model.run_tail(trunk)
            for index, layer in enumerate(layers):
                inputs = states[index][batch.token_mask].float()
                left = recorder.outputs[index]["q_proj"][batch.token_mask].float()
                left = left - inputs @ layer.self_attn.q_proj_swiftkv.weight.float().T
                moments[index] += inputs.T @ inputs
                products[index] += inputs.T @ left
    for handle in handles:
        handle.remove()
    for layer, change in zip(layers, ridge_solution(moments, products, recipe.calibration.ridge, width), strict=True):
        layer.self_attn.q_proj_swiftkv.weight.add_(change.T.to(torch.float32))


@torch.no_grad()
def folded_norms(run: Distillation) -> None:
    """Copied K and V times each layer's own scale of its input over that of `norm_swiftkv`."""
    model = run.strategy.model
    layers, common = model.model.layers, model.model.norm_swiftkv.weight
    for group in model.config.tail_groups:
        for kind in ("k_proj", "v_proj"):
            members = [
                getattr(layers[index].self_attn, kind).weight.float() * (layers[index].input_layernorm.weight / common)
                for index in group
            ]
            getattr(layers[group[0]].self_attn, f"{kind}_swiftkv").weight.copy_(torch.stack(members).mean(0))


def mean_of_members(
    _model: Any, _moments: Any, members: list[int], solutions: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    keys, values = zip(*(solutions[layer] for layer in members), strict=True)
    return torch.stack(keys).mean(0), torch.stack(values).mean(0)


def of_rows(moments: Moments, layer: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a shared V is fitted to: the members' V of tokens, not of what attention makes of them."""
    inputs = moments.inputs[layer] / moments.weights[layer].view(-1, 1, 1)
    return inputs, torch.einsum("gde,egc->dgc", inputs.expand(values.shape[1], -1, -1), values)


IDEAS = {
    "as_it_is": Idea("none"),
    "seed_1": Idea("another seed", overrides=["training.seed=1", "data.seed=1"]),
    "seed_2": Idea("a third seed", overrides=["training.seed=2", "data.seed=2"]),
    "copied": Idea("copied K and V", overrides=["rewrite.init=copy"]),
    "copied_folded": Idea("the same, times the layer's own norm", folded_norms, ["rewrite.init=copy"]),
    "beta_0.95": Idea("Adam's second beta 0.95", overrides=["training.betas=[0.9, 0.95]"]),
    "hidden_states_x4": Idea("four times the weight of the hidden states", overrides=["loss.hidden_mse=0.016"]),
    "layer_outputs_0.02": Idea("distance of every tail layer's output, x 0.02", partial(layer_outputs, 0.02)),
    "layer_outputs_0.1": Idea("distance of every tail layer's output, x 0.1", partial(layer_outputs, 0.1)),
    "jensen_shannon": Idea("Jensen-Shannon divergence for the KL", partial(token_loss, jensen_shannon)),
    "reverse_kl": Idea("four parts KL, one part reverse KL", partial(token_loss, with_reverse)),
    "cross_entropy": Idea("a tenth of cross-entropy", partial(token_loss, with_cross_entropy)),
    "entropy": Idea("tokens by the root of the base's entropy", partial(token_loss, partial(by_entropy, 0.5))),
    "certainty": Idea("tokens by one over that root", partial(token_loss, partial(by_entropy, -0.5))),
    "values_x2": Idea("twice the learning rate for V", partial(twice, "v")),
    "queries_keys_x2": Idea("twice the learning rate for Q and K", partial(twice, "qk")),
    "muon": Idea("Muon for AdamW", muon),
    "mean_of_weights": Idea("at the peak, then the mean", mean_of_weights, ["training.decay=0.01"]),
    "all_turns": Idea("loss on users' turns too", all_turns),
    "on_policy": Idea("a last fifth of what the student says", on_policy),
    "queries_fitted": Idea("queries fitted by the calibration too", queries_fitted),
    "mean_of_members": Idea("a group's K/V: the mean of its members'", of_groups={"calibrate._share": mean_of_members}),
    "frequencies_alone": Idea(
        "a group's K: every frequency by itself",
        of_groups={"calibrate.fast_frequencies": lambda frequencies, _: len(frequencies)},
    ),
    "no_likelihood": Idea(
        "a group's V: o_proj's outputs count all alike",
        of_groups={"calibrate.accumulate_sensitivities": lambda *_: None},
    ),
    "rows": Idea(
        "a group's V: fitted to tokens' V, not to what attention makes of them",
        of_groups={"calibrate._wanted": of_rows},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The study's ideas, each beside the recipe as it is.")
    parser.add_argument("arguments", nargs="+", metavar="RECIPE [IDEA ...] [key=value ...]")
    parser.add_argument("--points", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=Path, default=Path("outputs/quality/ideas"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_intermixed_args()
    file, *rest = given.arguments
    overrides = [argument for argument in rest if "=" in argument]
    names = [argument for argument in rest if "=" not in argument]
    grouped = load_recipe(file, overrides).rewrite
    alone = grouped.key_value_group_size == 1 and grouped.key_value_groups is None
    if unknown := next((name for name in names if name not in IDEAS), None):
        raise UserError(f"there is no idea {unknown}; there are {', '.join(IDEAS)}")
    if idle := next((name for name in names if alone and IDEAS[name].of_groups), None):
        raise UserError(f"{idle} is about layers that share K/V, which recipe {file} has none of")
    names = names or [name for name, idea in IDEAS.items() if not (alone and idea.of_groups)]
    recipes, settings = {}, {}
    for name in dict.fromkeys(["as_it_is", *names]):
        changes = [*overrides, *IDEAS[name].overrides]
        recipes[name] = variant_of(file, changes, given.runs / name, given.points, given.tokens, TEST)
        settings[name] = {"idea": IDEAS[name].what, **settings_of(recipes[name])}
    options = f"--points {given.points} --tokens {given.tokens} --runs {given.runs}"
    command = " ".join(["python benchmarks/quality/ideas.py", *given.arguments, options])
    finish(compared(recipes, settings, command, TEST, Trial), given.output, as_json=False)


if __name__ == "__main__":
    run_script(main)
