"""Runs on disk: what is kept, what is refused, and what a kill may leave behind."""

import errno
import hashlib
import os
import shutil
import subprocess

import pytest
import torch

from swiftkv_train.errors import UserError
from swiftkv_train.run_directory import CANNOT_WRITE, MOMENTS, WEIGHTS, RunDirectory, save_tensors


@pytest.fixture
def recipe(make_recipe):
    return make_recipe()


@pytest.fixture
def run(recipe, tmp_path):
    return RunDirectory.create(tmp_path / "run", recipe)


def save(run, step, keep_last=10, value=0.0):
    with run.new_checkpoint(step, {"step": step}, keep_last) as folder:
        save_tensors({"a_swiftkv": torch.full((2, 3), value or float(step))}, folder / WEIGHTS)
        save_tensors({"a_swiftkv:step": torch.tensor(1.0)}, folder / MOMENTS)
    return run.checkpoints()[-1]


def last(run):
    """The step of the checkpoint that would be used, and what is said on the way to it."""
    said = []
    return run.last_checkpoint(said.append).step, said


def names(run):
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


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
    run.write_json("state.json", {"state": "failed"})
    run.write_json("calibration.json", [])
    corrected = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 7})})
    assert RunDirectory.create(run.path, corrected).recipe().training.steps == 7
    run.metrics.append({"step": 0})
    with pytest.raises(UserError, match="holds another run; continue it with --resume"):
        RunDirectory.create(run.path, recipe)


@pytest.mark.parametrize("restart", [False, True])
def test_a_recipe_of_the_users_own_is_never_replaced(recipe, tmp_path, restart):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "recipe.yaml").write_text("# mine\n" + recipe.to_yaml())
    with pytest.raises(UserError, match=r"mine holds a recipe\.yaml that no run has written; choose another directory"):
        RunDirectory.create(place, recipe, restart=restart)
    assert (place / "recipe.yaml").read_text().startswith("# mine")
    # What a run that was killed at once has stored is no loss.
    (place / "recipe.yaml").write_text(recipe.to_yaml())
    assert RunDirectory.create(place, recipe, restart=restart).recipe() == recipe


def test_a_run_without_a_checkpoint_is_restarted_with_nothing_of_it_left(run, recipe, tmp_path):
    run.metrics.append({"step": 0})
    run.partial_checkpoint(3).mkdir(parents=True)
    restarted = RunDirectory.create(run.path, recipe, restart=True)
    assert restarted.metrics.rows() == []
    save(restarted, 1)
    with pytest.raises(UserError, match="holds another run"):
        RunDirectory.create(run.path, recipe, restart=True)
    assert RunDirectory.create(tmp_path / "none-yet", recipe, restart=True).recipe() == recipe
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        RunDirectory.create(tmp_path / "foreign", recipe, restart=True)


def test_opening_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        RunDirectory.open(tmp_path)


def test_checkpoints_come_back_as_written_and_only_the_last_are_kept(run):
    for step in (1, 2, 10):
        save(run, step, keep_last=2)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 10]
    checkpoint = run.last_checkpoint(pytest.fail)
    assert torch.equal(checkpoint.weights()["a_swiftkv"], torch.full((2, 3), 10.0))
    assert checkpoint.optimizer_state()["a_swiftkv:step"] == 1
    assert checkpoint.progress == {"step": 10}
    assert names(run) == ["step-000002", "step-000010"]


def test_checkpoints_that_may_not_be_seen_are_not_taken_for_none(run, recipe, monkeypatch):
    save(run, 1)
    (run.path / "checkpoints/step-²").mkdir()
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("swiftkv_train.checksum._found", refuse)
        with pytest.raises(UserError, match="step-000001 cannot be read: Permission denied"):
            run.last_checkpoint(pytest.fail)
        patch.setattr("swiftkv_train.run_state.os.listdir", refuse)
        with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
            RunDirectory.create(run.path, recipe, restart=True)
    assert names(run) == ["step-000001", "step-²"]


def test_the_checksums_are_those_of_the_files(run):
    path = save(run, 3).path
    lines = (path / "SHA256SUMS").read_text().splitlines()
    files = [WEIGHTS, MOMENTS, "progress.json"]
    assert sorted(lines) == sorted(
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}" for name in files
    )
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path).returncode == 0


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "a bit of the weights": (lambda path: flip(path / WEIGHTS, -1), f"{WEIGHTS} does not match its checksum"),
    "a bit of a header": (lambda path: flip(path / MOMENTS, 20), f"{MOMENTS} does not match its checksum"),
    "a bit of the progress": (lambda path: flip(path / "progress.json", 12), "progress.json does not match"),
    "a bit of the checksums": (lambda path: flip(path / "SHA256SUMS", 5), "does not match its checksum"),
    "a file cut short": (lambda path: (path / MOMENTS).write_bytes(b""), f"{MOMENTS} does not match its checksum"),
    "a missing file": (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no checksums": (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS cannot be read: No such file"),
    "checksums cut short": (lambda path: (path / "SHA256SUMS").write_text(""), "does not match its checksum"),
    "checksums of nonsense": (lambda path: (path / "SHA256SUMS").write_bytes(b"\xff\n"), "SHA256SUMS cannot be read"),
    "nothing": (lambda path: [file.unlink() for file in path.iterdir()], "SHA256SUMS cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, damage):
    for step in (1, 2):
        save(run, step)
    spoil, says = DAMAGES[damage]
    spoil(run.path / "checkpoints/step-000002")
    step, (line,) = last(run)
    assert step == 1
    assert line.startswith(f"damaged     {run.path}/checkpoints/step-000002: ")
    assert says in line
    spoil(run.path / "checkpoints/step-000001")
    with pytest.raises(UserError, match="holds no checkpoint that is whole"):
        last(run)


def test_a_run_that_comes_again_to_a_damaged_checkpoint_replaces_it(run):
    for step in (1, 2, 3):
        save(run, step)
    for step in (2, 3):
        flip(run.path / f"checkpoints/step-00000{step}" / WEIGHTS, -1)
    save(run, 2, keep_last=1)  # 3, which is damaged, is not the one to be kept
    assert names(run) == ["step-000002"]
    assert last(run) == (2, [])


def test_a_half_written_or_half_removed_checkpoint_is_never_seen(run):
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        last(run)
    folder = run.path / "checkpoints"
    for name in (".step-000003.partial", ".step-000001.removed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "progress.json").write_text('{"step": 3')
    (folder / "step-old").mkdir()  # a user's own
    assert run.checkpoints() == []
    save(run, 5)
    assert names(run) == ["step-000005", "step-old"]


def test_there_is_always_a_whole_checkpoint(run, monkeypatch):
    # At every change to the directory, as a kill there would leave it, with keep_last 1.
    save(run, 1, keep_last=1)
    seen = []
    for module, name in ((shutil, "rmtree"), ("os", "rename"), ("os", "replace"), ("os", "fsync")):
        module = __import__(module) if isinstance(module, str) else module
        real = getattr(module, name)

        def watched(*arguments, real=real, **options):
            seen.append(last(run)[0])
            result = real(*arguments, **options)
            seen.append(last(run)[0])
            return result

        monkeypatch.setattr(module, name, watched)
    save(run, 2, keep_last=1)
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)
    assert len(seen) > 10


def test_a_failure_leaves_the_earlier_checkpoint_and_nothing_else(run, small_files):
    save(run, 1)
    with small_files(100), pytest.raises(CANNOT_WRITE, match="too large"):
        save(run, 2)
    assert names(run) == ["step-000001"]
    with pytest.raises(KeyboardInterrupt), run.new_checkpoint(2, {}, 2):
        raise KeyboardInterrupt
    assert names(run) == ["step-000001"]


def test_a_checkpoint_waits_for_the_rows_that_it_vouches_for(run, small_files):
    save(run, 1)
    rows = [{"step": step, "text": "x" * 1000} for step in (1, 2)]
    with small_files(1500):
        run.metrics.append(rows[0])
        with pytest.raises(OSError, match="too large"):
            run.metrics.append(rows[1])
        with pytest.raises(OSError, match="too large"):
            save(run, 2)
        assert run.metrics.rows() == rows[:1]
    save(run, 2)
    assert run.metrics.rows() == rows


def test_going_back_to_a_checkpoint_drops_what_came_after_it(run, recipe):
    for step in range(5):
        run.metrics.append({"step": step, "loss": 1 / (step + 1)})
        if step in (1, 2):
            save(run, step)
    run.partial_checkpoint(4).mkdir()
    moved = recipe.model_copy(update={"training": recipe.training.model_copy(update={"keep_last": 5})})
    run.rewind(run.checkpoints()[-1], moved)
    assert [row["step"] for row in run.metrics.rows()] == [0, 1, 2]
    assert run.recipe() == moved
    assert names(run) == ["step-000001", "step-000002"]


def test_json_files_are_written_whole_and_damage_is_named(run, small_files):
    run.write_json("calibration.json", [1])
    assert run.read_json("calibration.json") == [1]
    assert run.read_json("absent.json") is None
    with small_files(100), pytest.raises(UserError, match=r"calibration\.json cannot be written: File too large"):
        run.write_json("calibration.json", ["x" * 200])
    assert run.read_json("calibration.json") == [1]
    (run.path / "calibration.json").write_text("[1")
    with pytest.raises(UserError, match=r"calibration\.json is damaged"):
        run.read_json("calibration.json")
