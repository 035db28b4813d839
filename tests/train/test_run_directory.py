"""Runs on disk: what is kept, what is refused, and what a kill may leave behind."""

import json

import pytest
import torch

from swiftkv_train.errors import RunError, UserError
from swiftkv_train.run_directory import RunDirectory


@pytest.fixture
def recipe(make_recipe):
    return make_recipe()


@pytest.fixture
def run(recipe, tmp_path):
    return RunDirectory.create(tmp_path / "run", recipe)


def save(run, step, keep_last=10, value=0.0):
    weights = {"a_swiftkv": torch.full((2, 3), value or float(step))}
    return run.save_checkpoint({"step": step, "steps": 9}, weights, {"a_swiftkv:step": torch.tensor(1.0)}, keep_last)


def test_the_stored_recipe_is_the_one_given(run, recipe):
    assert RunDirectory.open(run.path).recipe() == recipe


def test_a_directory_in_use_is_refused(run, recipe, tmp_path):
    save(run, 1)
    with pytest.raises(UserError, match="holds another run; continue it with --resume, or choose another"):
        RunDirectory.create(run.path, recipe)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose another directory"):
        RunDirectory.create(other, recipe)
    with pytest.raises(UserError, match="is a file"):
        RunDirectory.create(other / "notes.txt", recipe)
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        RunDirectory.create(other / "notes.txt/run", recipe)
    assert (other / "notes.txt").read_text() == "mine"


def test_a_run_that_ended_before_its_first_figure_may_be_started_again(run, recipe):
    # A wrong data path is found after the directory is made; correcting it must be enough.
    run.write_json("calibration.json", [])
    corrected = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 7})})
    assert RunDirectory.create(run.path, corrected).recipe().training.steps == 7
    run.log({"step": 0})
    with pytest.raises(UserError, match="stopped before its first checkpoint; remove it"):
        RunDirectory.create(run.path, recipe)


def test_opening_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        RunDirectory.open(tmp_path)


def test_a_changed_recipe_is_named_by_its_key(run, recipe, make_recipe):
    run.check_same_recipe(recipe)
    with pytest.raises(UserError, match=r"training\.learning_rate=0\.003, the recipe now says 0\.01"):
        run.check_same_recipe(make_recipe(training__learning_rate=0.01))
    with pytest.raises(UserError, match=r"data\.held_out\.1\.name='chats', the recipe now says 'talk'"):
        run.check_same_recipe(make_recipe(data__held_out__1__name="talk"))


def test_checkpoints_come_back_as_written_and_only_the_last_are_kept(run):
    for step in (1, 2, 10):
        save(run, step, keep_last=2)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 10]
    last = run.last_checkpoint()
    assert torch.equal(last.weights()["a_swiftkv"], torch.full((2, 3), 10.0))
    assert last.optimizer_state()["a_swiftkv:step"] == 1
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step-000002", "step-000010"]


def test_a_half_written_checkpoint_is_never_seen(run):
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        run.last_checkpoint()
    partial = run.path / "checkpoints/.step-000003.partial"
    partial.mkdir(parents=True)
    (partial / "progress.json").write_text('{"step": 3')
    assert run.checkpoints() == []
    save(run, 3)
    assert run.last_checkpoint().step == 3
    assert not partial.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    save(run, 3, value=1.0)
    save(run, 3, value=2.0)
    assert torch.equal(run.last_checkpoint().weights()["a_swiftkv"], torch.full((2, 3), 2.0))


def test_damage_is_named(run):
    checkpoint = save(run, 3)
    weights = checkpoint.path / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"student\.safetensors is damaged"):
        checkpoint.weights()
    (checkpoint.path / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress\.json is damaged; remove .*step-000003"):
        run.checkpoints()


def test_a_disk_that_refuses_leaves_the_earlier_checkpoint(run, monkeypatch):
    save(run, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swiftkv_train.run_directory.save_file", full)
    with pytest.raises(RunError, match=r"step-000002 cannot be written: .*No space left"):
        save(run, 2)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000001"]


def test_rows_after_the_checkpoint_are_dropped_on_resume(run):
    for step in range(5):
        run.log({"step": step, "loss": 1 / (step + 1)})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4]
    run.trim_metrics(2)
    run.log({"step": 3})
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert rows == [*({"step": step, "loss": 1 / (step + 1)} for step in range(3)), {"step": 3}]


def test_json_files_are_written_whole_and_damage_is_named(run):
    run.write_json("calibration.json", [1])
    assert run.read_json("calibration.json") == [1]
    assert run.read_json("absent.json") is None
    (run.path / "calibration.json").write_text("[1")
    with pytest.raises(UserError, match=r"calibration\.json is damaged"):
        run.read_json("calibration.json")
