"""Who is training into a directory, as another process sees it."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from swiftkv_train.errors import RunError, UserError
from swiftkv_train.run_directory import RunDirectory
from swiftkv_train.run_state import RunLock, is_locked, recorded_state
from swiftkv_train.stopping import Stopped

HOLDER = """
import sys, time
from pathlib import Path
from swiftkv_train.run_state import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_until_the_first_is_gone(holder, tmp_path):
    run = tmp_path / "run"
    assert is_locked(run) is True
    with pytest.raises(UserError, match=rf"output_dir .*run is in use by process {holder.pid} on .+; stop it"):
        RunLock(run).take()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert is_locked(run) is False
    lock = RunLock(run)
    lock.take()
    assert is_locked(run) is True
    assert (run / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()
    assert is_locked(run) is False


def test_looking_does_not_get_in_the_way(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    with (tmp_path / ".lock").open() as looker, (tmp_path / ".lock").open() as another:
        fcntl.flock(looker, fcntl.LOCK_SH)
        fcntl.flock(another, fcntl.LOCK_SH)
        assert is_locked(tmp_path) is False


def test_other_files_are_left_alone_and_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunLock(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"output_dir .* cannot be written: Not a directory"):
        RunLock(tmp_path / "notes.txt/run").take()


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert is_locked(tmp_path) is False  # no run has been here
    RunLock(tmp_path).take()
    assert is_locked(tmp_path) is None


class Recorder:
    """A run, its lock, and how state.json reads."""

    def __init__(self, path):
        self.run, self.lock = RunDirectory(path), RunLock(path)
        self.lock.take()

    def during(self, *, enabled=True):
        return recorded_state(self.run, self.lock, enabled=enabled)

    def read(self):
        state = json.loads((self.run.path / "state.json").read_text())
        return state["state"], state.get("error"), "ended" in state


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path)


def test_the_state_follows_the_run(recorder, tmp_path):
    with recorder.during() as record:
        assert recorder.read() == ("running", None, False)
        assert is_locked(tmp_path)
        record.ending = "stopped"
    assert recorder.read() == ("stopped", None, True)
    assert not is_locked(tmp_path)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RunError("the loss is nan"), ("failed", "the loss is nan", True)),
        (ZeroDivisionError("division by zero"), ("failed", "division by zero", True)),
        (Stopped(), ("stopped", None, True)),
        (KeyboardInterrupt(), ("stopped", None, True)),
    ],
)
def test_how_a_run_ended_is_told_and_the_error_goes_on(recorder, tmp_path, error, state):
    with pytest.raises(type(error)), recorder.during():
        raise error
    assert recorder.read() == state
    assert not is_locked(tmp_path)


def test_other_processes_of_the_run_write_nothing(recorder, tmp_path):
    with recorder.during(enabled=False):
        pass
    assert not (tmp_path / "state.json").exists()


def test_a_full_disk_does_not_hide_how_the_run_ended(recorder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swiftkv_train.run_directory.write_text", full)
    with pytest.raises(RunError, match="the loss"), recorder.during():
        raise RunError("the loss is nan")
