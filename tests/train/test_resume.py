"""Runs that go on from a checkpoint, in this process: exact, or refused with what changed. Kills are in tests/e2e."""

import io
import json
import random
import resource
import shutil
import signal
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import swiftkv_train.distill as distill_module
from debug_recipe import comparable, metrics
from swiftkv_train import checkpointing, strategies
from swiftkv_train.calibrate import LayerFit
from swiftkv_train.distill import Distillation, distill
from swiftkv_train.distillation_module import DistillationModule
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.export import export
from swiftkv_train.metrics import Metrics
from swiftkv_train.progress import Reporter
from swiftkv_train.run_directory import RunDirectory
from swiftkv_train.stopping import Stop


def last(run):
    return RunDirectory(run).last_checkpoint(pytest.fail)


def assert_same(run, other):
    """Rows, weights and the optimizer's state are those of `other`, to the bit."""
    assert comparable(metrics(run)) == comparable(metrics(other))
    one, two = last(run), last(other)
    assert one.step == two.step
    for mine, theirs in ((one.weights(), two.weights()), (one.optimizer_state(), two.optimizer_state())):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def place(tmp_path):
    return tmp_path


def cut_back(run, step):
    """Make a finished run what a kill leaves: its last checkpoint is of `step`, with rows after it, one of them cut."""
    for checkpoint in RunDirectory(run).checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    (run / f"checkpoints/.step-{step + 2:06d}.partial").mkdir()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_run_that_never_stopped(make_recipe, place, dtype):
    # Three micro-batches a step, two sources, a second epoch of one of them from step 4 on.
    changes = {
        "model__dtype": dtype,
        "training__steps": 8,
        "training__micro_batch_size": 3,
        "training__evaluate_every": 3,
        "training__keep_last": 10,
        "data__train__0__max_documents": 20,
    }
    assert distill(make_recipe(training__output_dir="whole", **changes), quiet=True) == 0
    recipe = make_recipe(training__output_dir="parts", **changes)
    assert distill(recipe, quiet=True) == 0
    prose = Distillation(make_recipe(training__output_dir="other", **changes), quiet=True)
    prose.prepare()
    assert 4 * 4 <= prose.data.packed[0].num_sequences < 8 * 4
    for step in (2, 4):
        cut_back(place / "parts", step)
        assert distill(recipe, resume=True, quiet=True) == 0
        assert_same(place / "parts", place / "whole")
        found = [("held_out" in row, row["step"]) for row in metrics(place / "parts")]
        assert len(set(found)) == len(found) == 8 + 4


def test_an_optimizer_that_counts_its_steps_in_an_int_resumes_exactly(make_recipe, place, monkeypatch):
    optim = pytest.importorskip("bitsandbytes").optim
    # On a CPU its tables for 8 bits are shared by all tensors, which no file takes: small tensors do without.
    adamw = partial(optim.AdamW8bit, min_8bit_size=2**20)
    monkeypatch.setattr(strategies, "_optimizer_class", lambda name, device: adamw)
    assert distill(make_recipe(training__output_dir="whole"), quiet=True) == 0
    recipe = make_recipe(training__output_dir="parts")
    assert distill(recipe, quiet=True) == 0
    cut_back(place / "parts", 2)
    assert distill(recipe, resume=True, quiet=True) == 0
    assert_same(place / "parts", place / "whole")
    steps = {float(value) for name, value in last(place / "parts").optimizer_state().items() if name.endswith(":step")}
    assert steps == {4.0}


def test_nothing_in_training_is_random(make_recipe):
    # So that checkpoints need no state of a random generator.
    distillation = Distillation(make_recipe(), quiet=True)
    distillation.prepare()

    def generators():
        return random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state().tolist()

    before = generators()
    distillation.train_step()
    distillation.evaluate()
    distillation.checkpoints.save(1, distillation.divergence)
    assert generators() == before


def test_resuming_a_finished_run_changes_nothing(make_recipe, place):
    recipe = make_recipe(training__steps=2, training__keep_last=1)
    distill(recipe, quiet=True)
    run = place / recipe.training.output_dir

    def files():
        return {
            path: (path.stat().st_ino, path.read_bytes()) for path in run.glob("checkpoints/**/*") if path.is_file()
        }

    before, rows = files(), metrics(run)
    assert distill(recipe, resume=True, quiet=True) == 0
    assert files() == before
    assert metrics(run) == rows


def test_a_run_without_a_checkpoint_begins_again(make_recipe, place, capfd):
    recipe = make_recipe(training__steps=2)
    run = place / recipe.training.output_dir
    assert distill(recipe, resume=True) == 0
    assert (
        f"resumed     {recipe.training.output_dir} holds no checkpoint yet: from the beginning"
        in capfd.readouterr().err
    )
    rows = comparable(metrics(run))
    shutil.rmtree(run / "checkpoints")
    assert distill(recipe, resume=True, quiet=True) == 0
    assert comparable(metrics(run)) == rows


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(make_recipe, place, capfd):
    recipe = make_recipe()
    distill(recipe, quiet=True)
    run = shutil.copytree(place / recipe.training.output_dir, place / "whole")
    run = place / recipe.training.output_dir
    weights = run / "checkpoints/step-000004/student.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    assert distill(recipe, resume=True) == 0
    said = capfd.readouterr().err.splitlines()
    path = f"{recipe.training.output_dir}/checkpoints/step-000004"
    assert said[0] == (
        f"damaged     {path}: student.safetensors does not match its checksum; looking for the checkpoint before"
    )
    assert any(line.startswith("resumed ") and line.endswith("step-000002, 2 steps left") for line in said)
    assert_same(run, place / "whole")


# What changed


@pytest.fixture
def finished(make_recipe, place):
    """A finished run of four steps cut back to its second, and how to resume it under changes."""
    recipe = make_recipe(training__keep_last=10)
    assert distill(recipe, quiet=True) == 0
    run = place / recipe.training.output_dir
    shutil.copytree(run, place / "whole")
    cut_back(run, 2)

    def resume(*, allow_changed=False, **changes):
        changed = make_recipe(**{"training__keep_last": 10, **changes})
        return distill(changed, resume=True, allow_changed=allow_changed)

    resume.run = run
    return resume


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__learning_rate": 0.01}, "training.learning_rate was 0.003, is now 0.01"),
        ({"training__steps": 9}, "training.steps was 4, is now 9"),
        ({"training__micro_batch_size": 2}, "training.micro_batch_size was 4, is now 2"),
        ({"data__train__0__weight": 2.0}, "data.train.0.weight was 1.0, is now 2.0"),
        ({"data__held_out__1__name": "talk"}, "data.held_out.1.name was 'chats', is now 'talk'"),
        ({"model__dtype": "bfloat16", "data__seed": 1}, "dtype was 'float32', is now 'bfloat16'; data.seed was 0, is"),
    ],
)
def test_a_changed_recipe_is_refused_by_key(finished, changes, says):
    with pytest.raises(
        UserError, match=r"step-000002 cannot be resumed: .*or go on all the same with --allow-changed"
    ) as e:
        finished(**changes)
    assert says in str(e.value)
    assert (finished.run / "metrics.jsonl").read_bytes().endswith(b'"loss": ')  # nothing was touched


def test_many_changes_stay_one_line(finished):
    changes = {f"training__{key}": 0.125 for key in ("learning_rate", "warmup", "final_learning_rate", "max_grad_norm")}
    changes |= {"loss__temperature": 3.0, "loss__hidden_mse": 0.5, "data__seed": 3, "calibration__tokens": 1}
    with pytest.raises(UserError, match="; and 2 more; restore that"):
        finished(**changes)


def test_places_and_what_is_only_told_may_change(finished, place, capfd):
    for name in ("models", "data"):
        shutil.copytree(place / name, place / f"moved/{name}")
        (place / name).unlink()
    finished.run.rename(place / "elsewhere")
    changes = {f"data__{part}__{i}__path": f"moved/data/debug/{name}.{part}.jsonl"
               for part in ("train", "held_out") for i, name in enumerate(("prose", "chats"))}  # fmt: skip
    changes |= {"model__base": "moved/models/debug", "data__cache_dir": "other-cache", "training__checkpoint_every": 1}
    assert finished(training__output_dir="elsewhere", training__keep_last=3, **changes) == 0
    assert "changed" not in capfd.readouterr().err
    assert_same(place / "elsewhere", place / "whole")
    assert [checkpoint.step for checkpoint in RunDirectory(place / "elsewhere").checkpoints()] == [2, 3, 4]
    assert RunDirectory(place / "elsewhere").recipe().model.base == "moved/models/debug"


def own_copy(place, name):
    """The linked directory as one of this test's own."""
    target = (place / name).resolve()
    (place / name).unlink()
    return shutil.copytree(target, place / name)


def test_changed_data_is_refused_by_source(finished, place, capfd):
    data = own_copy(place, "data")
    with (data / "debug/chats.train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Hello?", "response": "Goodbye."}) + "\n")
    with pytest.raises(UserError, match="step-000002 cannot be resumed: train source 'chats' changed; restore that"):
        finished()
    with (data / "debug/prose.held_out.jsonl").open("a") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    with pytest.raises(UserError, match="train source 'chats' changed; held-out source 'prose' changed; restore"):
        finished()
    capfd.readouterr()
    assert finished(allow_changed=True) == 0
    said = capfd.readouterr().err.splitlines()
    assert "changed     train source 'chats' changed" in said
    assert "changed     held-out source 'prose' changed" in said
    # What it went on with is what it is made from now.
    assert finished() == 0


def test_a_changed_base_is_refused_by_file(finished, place):
    base = own_copy(place, "models") / "debug"
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"resumed: model\.safetensors of the base changed; restore that"):
        finished()
    with pytest.raises(UserError, match=r"trained on another base: model\.safetensors of the base changed; restore"):
        export(finished.run, place / "checkpoint", report=lambda text: None)
    assert finished(allow_changed=True) == 0


def test_an_allowed_change_of_the_recipe_is_told_and_kept(finished, capfd):
    assert finished(allow_changed=True, training__steps=5, training__learning_rate=0.001) == 0
    said = capfd.readouterr().err.splitlines()
    assert "changed     training.learning_rate was 0.003, is now 0.001" in said
    assert "changed     training.steps was 4, is now 5" in said
    rows = [row for row in metrics(finished.run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["learning_rate"] < 0.001
    assert RunDirectory(finished.run).recipe().training.steps == 5
    assert finished(training__steps=5, training__learning_rate=0.001) == 0
    with pytest.raises(UserError, match="steps was 5, is now 4"):
        finished(training__learning_rate=0.001)


def test_moments_of_another_optimizer_are_refused_even_when_changes_are_allowed(finished):
    with pytest.raises(UserError, match=r"holds the state of training\.optimizer adamw, not of paged_adamw_8bit"):
        finished(allow_changed=True, training__optimizer="paged_adamw_8bit")
    assert finished() == 0


def test_adapters_are_not_merged_at_another_scale_than_they_were_trained_at(make_recipe, place, monkeypatch):
    settings = {"training__trainable": "lora", "training__lora": {"rank": 4, "alpha": 8}}
    recipe = make_recipe(**settings)
    assert distill(recipe, quiet=True) == 0
    run = place / recipe.training.output_dir
    cut_back(run, 2)

    def stopped(self):
        raise KeyboardInterrupt

    settings["training__lora"] = {"rank": 4, "alpha": 64}
    monkeypatch.setattr(Distillation, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(make_recipe(**settings), resume=True, allow_changed=True, quiet=True)
    with pytest.raises(
        UserError, match=r"step-000002 was trained before .* changed: training\.lora\.alpha was 8, is now 64"
    ):
        export(run, place / "checkpoint", report=lambda text: None)


def test_the_guard_remembers_every_loss_though_few_are_logged(make_recipe, place):
    recipe = make_recipe(training__log_every=3)
    assert distill(recipe, quiet=True) == 0
    resumed = Distillation(recipe, resume=True, quiet=True)
    resumed.prepare()
    assert len(resumed.divergence.losses) == recipe.training.steps == 4
    assert len([row for row in metrics(place / recipe.training.output_dir) if "loss" in row]) == 2


def test_a_resume_that_is_refused_leaves_the_state_as_it_was(make_recipe, place):
    recipe = make_recipe()
    assert distill(recipe, quiet=True) == 0
    state = place / recipe.training.output_dir / "state.json"
    before = state.read_text()
    with (own_copy(place, "data") / "debug/chats.train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Hello?", "response": "Goodbye."}) + "\n")
    with pytest.raises(UserError, match="cannot be resumed"):
        distill(recipe, resume=True, quiet=True)
    assert state.read_text() == before


def test_a_rewrite_of_another_shape_is_refused_even_when_changes_are_allowed(finished):
    with pytest.raises(UserError, match="does not fit this rewrite"):
        finished(allow_changed=True, rewrite__num_key_value_layers=4)
    assert finished() == 0


# A disk that refuses


@pytest.fixture
def limit_files_from(monkeypatch, small_files):
    """`with limit_files_from(step)`: when that step is made the disk begins to take no file over 60 kB."""

    @contextmanager
    def limited(first, until=None):
        real = Distillation.train_step

        def train_step(self):
            if self.step + 1 in (first, until):
                size = 60_000 if self.step + 1 == first else 2**40
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return real(self)

        with monkeypatch.context() as patch, small_files(2**40):
            patch.setattr(Distillation, "train_step", train_step)
            patch.setattr(checkpointing, "SECONDS_BETWEEN_TRIES", 0)
            yield

    return limited


def test_training_goes_on_where_a_checkpoint_cannot_be_written(make_recipe, place, limit_files_from, capfd):
    changes = {"training__steps": 6, "training__keep_last": 10}
    distill(make_recipe(training__output_dir="whole", **changes), quiet=True)
    with limit_files_from(3, until=5):
        assert distill(make_recipe(training__output_dir="run", **changes)) == 0
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning")] == [
        "warning     the checkpoint of step 4 cannot be written: Error while serializing: I/O error: "
        "File too large (os error 27); the last one is of step 2"
    ]
    assert sorted(path.name for path in (place / "run/checkpoints").iterdir()) == ["step-000002", "step-000006"]
    assert_same(place / "run", place / "whole")


def test_a_run_whose_end_cannot_be_saved_fails_and_can_be_resumed(make_recipe, place, limit_files_from, capfd):
    distill(make_recipe(training__output_dir="whole"), quiet=True)
    recipe = make_recipe(training__output_dir="run", training__checkpoint_every=3)
    with limit_files_from(4), pytest.raises(RunError) as error:
        distill(recipe)
    assert str(error.value) == "step 4 of run is not saved; make room on the disk and go on from step 3 with --resume"
    said = capfd.readouterr().err
    assert said.count("warning     the checkpoint of step 4 cannot be written") == checkpointing.SAVE_TRIES
    assert said.count("waiting") == 1
    assert [path.name for path in (place / "run/checkpoints").iterdir()] == ["step-000003"]
    assert distill(recipe, resume=True, quiet=True) == 0
    assert_same(place / "run", place / "whole")


def test_rows_wait_for_room_on_the_disk(make_recipe, place, monkeypatch, capfd):
    distill(make_recipe(training__output_dir="whole"), quiet=True)
    real, calls = Metrics.flush, []

    def flush(self):
        calls.append(1)
        if 3 <= len(calls) <= 4:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(Metrics, "flush", flush)
    assert distill(make_recipe(training__output_dir="run")) == 0
    said = capfd.readouterr().err
    assert said.count("run/metrics.jsonl cannot be written: No space left on device; rows wait") == 1
    assert_same(place / "run", place / "whole")


def test_a_log_file_on_a_full_disk_does_not_end_a_run():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    report = Reporter()
    report.console.file = Full()
    report.line("saved")
    report.fits([LayerFit(0, 1.0, 1.0)])


# A stop that is asked for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (DistillationModule, "losses", 8),  # the second of three micro-batches of the third step
        (DistillationModule, "losses", 9),  # the last one, after which the step is done
        (Distillation, "evaluate", 2),  # that of step 2
    ],
)
def test_a_run_stopped_anywhere_ends_as_if_never_stopped(
    make_recipe, place, monkeypatch, capfd, number, owner, name, call
):
    changes = {
        "training__steps": 5,
        "training__checkpoint_every": 0,
        "training__evaluate_every": 2,
        "training__micro_batch_size": 3,
    }
    distill(make_recipe(training__output_dir="whole", **changes), quiet=True)
    recipe = make_recipe(training__output_dir="run", **changes)
    real, calls = getattr(owner, name), []

    def watched(self, *arguments, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, Stop().watching() as stop:
        patch.setattr(owner, name, watched)
        assert distill(recipe, stop=stop) == (130 if number == signal.SIGINT else 0)
    step = 3 if call == 9 else 2
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped     at step {step} of 5; continue with --resume"
    assert distill(recipe, resume=True, quiet=True) == 0
    assert_same(place / "run", place / "whole")


@pytest.mark.parametrize("name", ["build_model", "load_training_data", "calibrate", "held_out_batches"])
def test_before_the_first_step_a_stop_saves_nothing_and_is_at_once(make_recipe, monkeypatch, capfd, name):
    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("was not left at once")

    recipe = make_recipe(training__steps=1)
    with monkeypatch.context() as patch, Stop().watching() as stop:
        patch.setattr(distill_module, name, signalled)
        assert distill(recipe, stop=stop) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "stopped     before the first step; there is nothing to save"
    assert distill(recipe, quiet=True) == 0
