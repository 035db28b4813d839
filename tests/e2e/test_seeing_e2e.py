"""What a user sees of runs from outside: which there are, that two do not mix, and one that goes wrong."""

import json
import shutil

import pytest
import torch
from commanding import run_here, start
from safetensors.torch import load_file
from test_processes_e2e import launch, port, wait_for  # noqa: F401

from debug_recipe import metrics, write_recipe
from swiftkv_train.run_directory import RunDirectory

LEARNT = 24  # steps at a fair rate
EXPLODES = ["--resume", "--allow-changed", "training.steps=40", "training.learning_rate=300"]


def listed(workplace):
    result = run_here("runs", "--json", cwd=workplace)
    assert result.status == 0, result.err
    return {run["path"]: run for run in json.loads(result.out)}


def test_a_run_is_listed_while_it_runs_and_shut_to_others_and_known_to_be_killed(workplace):
    recipe = write_recipe(workplace / "recipe.yaml", {"training.steps": 100_000, "training.checkpoint_every": 2})
    run = workplace / "outputs/debug/run"
    process = start("distill", recipe, cwd=workplace)
    try:
        wait_for(lambda: process.poll() is not None or (run / "checkpoints/step-000002").exists())
        found = listed(workplace)["outputs/debug/run"]
        assert (found["state"], found["steps"], found["base"]) == ("running", 100_000, "models/debug")
        assert found["step"] >= 2
        for more in ((), ("--resume",)):
            refused = run_here("distill", recipe, *more, cwd=workplace)
            assert f"output_dir outputs/debug/run is in use by process {process.pid} on " in refused.error()
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    found = listed(workplace)["outputs/debug/run"]
    assert found["state"] == "crashed"
    assert found["checkpoint_step"] >= 2
    resumed = ["distill", recipe, "--resume", "--allow-changed", f"training.steps={found['checkpoint_step'] + 1}"]
    result = run_here(*resumed, cwd=workplace)
    assert result.status == 0, result.err
    found = listed(workplace)["outputs/debug/run"]
    assert (found["state"], found["step"]) == ("finished", found["steps"])
    assert 0 < found["held_out_kl"] < 10


@pytest.fixture
def learnt(workplace):
    """A recipe, and a run of it that has learnt something."""
    recipe = write_recipe(workplace / "recipe.yaml", {"training.steps": LEARNT, "training.checkpoint_every": 0})
    result = run_here("distill", recipe, "training.output_dir=outputs/one", cwd=workplace)
    assert result.status == 0, result.err
    return recipe


def check_failure(workplace, status, message, run):
    """The batch of the step that failed, after making sure that all that was promised of it is there."""
    assert status == 1
    rows = [row for row in metrics(workplace / run) if "loss" in row]
    failed = len(rows) + 1
    assert LEARNT < failed <= LEARNT + 3
    assert all(row["loss"] < 1 for row in rows)
    file = f"{run}/failed-batch-{failed:06d}.safetensors"
    assert f"at step {failed}, which is discarded; its batch (of chats, prose) is in {file}: look at it, or " in message
    assert f"go on from step {LEARNT} with --resume --allow-changed and a lower training.learning_rate" in message
    assert RunDirectory(workplace / run).last_checkpoint(print).step == LEARNT
    assert listed(workplace)[run]["state"] == "failed"
    return load_file(workplace / file)


def test_a_run_that_explodes_stops_with_its_batch_and_goes_on_at_a_lower_rate(workplace, learnt):
    result = run_here("distill", learnt, "training.output_dir=outputs/one", *EXPLODES, cwd=workplace)
    error = result.err.splitlines()[-1]
    assert error.startswith("error: the loss is ")
    batch = check_failure(workplace, result.status, error, "outputs/one")
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["loss_mask"].shape == (8, 64)
    calmly = ["training.output_dir=outputs/one", *EXPLODES, "training.learning_rate=1e-3", "training.steps=30"]
    resumed = run_here("distill", learnt, *calmly, cwd=workplace)
    assert resumed.status == 0, resumed.err
    assert listed(workplace)["outputs/one"]["state"] == "finished"
    assert metrics(workplace / "outputs/one")[-2]["loss"] < 1


def test_processes_stop_together(workplace, learnt, port):  # noqa: F811
    shutil.copytree(workplace / "outputs/one", workplace / "outputs/two")
    alone = run_here("distill", learnt, "training.output_dir=outputs/one", *EXPLODES, cwd=workplace)
    batch = check_failure(workplace, alone.status, alone.err.splitlines()[-1], "outputs/one")
    together = launch(learnt, "training.output_dir=outputs/two", *EXPLODES, cwd=workplace, port=port)
    errors = [line for line in together.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, together.stderr
    (error,) = [line for line in errors if "is kept by the main process" not in line]
    same = check_failure(workplace, together.returncode, error, "outputs/two")
    for name, tensor in batch.items():
        assert torch.equal(tensor, same[name]), name  # of all processes


def test_trackers_have_what_metrics_jsonl_has_through_a_stop(workplace):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"training.evaluate_every": 2, "logging.tensorboard": True, "training.checkpoint_every": 0}
    recipe = write_recipe(workplace / "recipe.yaml", changes)
    run = workplace / "outputs/debug/run"
    assert run_here("distill", recipe, "training.steps=3", cwd=workplace).status == 0
    # Held-out figures at its last step: on the way to more steps there are none at step 3.
    resumed = ["distill", recipe, "--resume", "--allow-changed", "training.steps=5"]
    result = run_here(*resumed, cwd=workplace)
    assert result.status == 0, result.err

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    found = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    rows = metrics(run)
    for name in ("loss", "kl", "learning_rate", "grad_norm", "tokens_per_second"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]  # fp32
        assert found[name] == expected
        assert [step for step, _ in expected] == [1, 2, 3, 4, 5]
    for source in ("prose", "chats"):
        expected = [(row["step"], row["held_out"][source]["kl"]) for row in rows if "held_out" in row]
        assert found[f"held_out/{source}/kl"] == [(step, pytest.approx(kl, rel=1e-6)) for step, kl in expected]
        assert [step for step, _ in expected] == [0, 2, 3, 4, 5]
