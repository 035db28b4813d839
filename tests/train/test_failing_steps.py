"""A step that goes wrong is not made: what it leaves behind, and how the run goes on."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from debug_recipe import comparable, metrics
from swiftkv_train.cli import main
from swiftkv_train.distill import Distillation, distill
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.divergence import FEWEST
from swiftkv_train.errors import RunError
from swiftkv_train.run_directory import RunDirectory
from swiftkv_train.runs import list_runs


def test_a_run_whose_loss_is_nan_stops_and_can_be_resumed(make_recipe, monkeypatch):
    changes = {"training__checkpoint_every": 1, "training__keep_last": 9, "training__micro_batch_size": 8}
    assert distill(make_recipe(training__output_dir="whole", **changes), quiet=True) == 0
    recipe = make_recipe(training__output_dir="spoilt", **changes)
    losses, seen = DistillationModule.losses, []

    def nan_at_the_third(self, *inputs):
        seen.append(inputs)
        total, kl = losses(self, *inputs)
        return (total * math.nan, kl) if len(seen) == 3 else (total, kl)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "losses", nan_at_the_third)
        with pytest.raises(RunError) as error:
            distill(recipe, quiet=True)
    file = RunDirectory("spoilt").path / "failed-batch-000003.safetensors"
    assert str(error.value) == (
        f"the loss is nan at step 3, which is discarded; its batch (of chats, prose) is in {file}: look at it, "
        "or go on from step 2 with --resume --allow-changed and a lower training.learning_rate (now 0.003)"
    )
    for name, tensor in zip(("input_ids", "position_ids", "loss_mask"), seen[2], strict=True):
        assert torch.equal(load_file(file)[name], tensor)
    facts = json.loads(file.with_suffix(".json").read_text())
    assert (facts["step"], facts["loss"], facts["grad_norm"]) == (3, "nan", None)
    assert sorted(facts["sources"]) == ["chats"] * 4 + ["prose"] * 4
    (listed,) = list_runs(RunDirectory("spoilt").path)
    assert (listed.state, listed.error, listed.checkpoint_step) == ("failed", str(error.value), 2)

    assert distill(recipe, resume=True, quiet=True) == 0
    whole, spoilt = RunDirectory("whole"), RunDirectory("spoilt")
    assert comparable(metrics(spoilt.path)) == comparable(metrics(whole.path))
    expected = whole.last_checkpoint(print).weights()
    for name, tensor in spoilt.last_checkpoint(print).weights().items():
        assert torch.equal(tensor, expected[name]), name


def too_much_for_a_gpu(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def too_much_for_a_cpu(*_):
    torch.empty(3 * 2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        (
            too_much_for_a_gpu,
            ["training.micro_batch_size", "training.gradient_checkpointing", "swiftkv plan RECIPE --gpu-memory"],
        ),
        (too_much_for_a_cpu, ["another 3,221,225,472.0 GiB", "training.micro_batch_size", "--window"]),
    ],
)
def test_full_memory_is_one_line_that_says_what_takes_less(make_recipe, monkeypatch, capsys, losses, named):
    make_recipe(rewrite__init="copy", data__held_out=[])
    monkeypatch.setattr(DistillationModule, "losses", losses)
    monkeypatch.setattr(sys, "argv", ["swiftkv", "distill", "recipe.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for words in named:
        assert words in line


@pytest.fixture
def distillation(make_recipe):
    made = Distillation(make_recipe(), quiet=True)
    made.prepare()
    made.train_step()
    return made


def state_of(distillation):
    """The weights and the optimizer's moments."""
    state = distillation.strategy.optimizer.state_dict()["state"]
    moments = {f"{number}:{key}": value for number, row in state.items() for key, value in row.items()}
    return {name: tensor.clone() for name, tensor in {**distillation.strategy.module.state_dict(), **moments}.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_not_applied(distillation, value):
    before = state_of(distillation)
    spoilt = next(iter(distillation.strategy.parameters().values()))
    spoilt.register_hook(lambda gradient: gradient * value)
    with pytest.raises(RunError, match=r"the gradient norm is (nan|inf) at step 2, which is discarded"):
        distillation.train_step()
    for name, tensor in state_of(distillation).items():
        assert torch.equal(tensor, before[name]), name
    facts = json.loads((distillation.run.path / "failed-batch-000002.json").read_text())
    assert facts["grad_norm"] in ("nan", "inf")
    assert 0 < facts["loss"] < 10


def test_a_loss_that_explodes_is_not_applied(distillation):
    with torch.no_grad():
        for parameter in distillation.strategy.parameters().values():
            parameter.mul_(-20)
    distillation.divergence.losses.extend(distillation.divergence.losses[0] for _ in range(FEWEST))
    before = state_of(distillation)
    with pytest.raises(RunError, match=r"times its running median \(training\.max_loss_ratio is 10\), at step 2"):
        distillation.train_step()
    for name, tensor in state_of(distillation).items():
        assert torch.equal(tensor, before[name]), name


def test_a_resumed_run_remembers_the_losses(make_recipe):
    recipe = make_recipe()
    distill(recipe, quiet=True)
    resumed = Distillation(recipe, resume=True, quiet=True)
    resumed.prepare()
    assert list(resumed.divergence.losses) == [row["loss"] for row in metrics(resumed.run.path) if "loss" in row]
    assert len(resumed.divergence.losses) == 4


def test_utilisation_is_logged_where_the_peak_is_known(make_recipe, monkeypatch):
    distill(make_recipe(training__output_dir="unknown"), quiet=True)
    monkeypatch.setattr("swiftkv_train.distill.device_peak", lambda device, dtype: 1e12)
    distill(make_recipe(training__output_dir="known"), quiet=True)
    assert not [row for row in metrics(RunDirectory("unknown").path) if "mfu" in row]
    rows = [row for row in metrics(RunDirectory("known").path) if "loss" in row]
    for row in rows:
        assert row["mfu"] == pytest.approx(row["flops"] / (row["seconds"] * 1e12), rel=1e-12)
    # 8 sequences of 64 tokens through 0.4M parameters: some 6 FLOPs per parameter and token.
    assert 1e8 < rows[0]["flops"] < 1e11
