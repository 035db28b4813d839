"""What a run is doing, for other processes to see: a lock that only a living run holds, and state.json.

The kernel frees the lock when its process ends, however it ends. So a run that state.json calls running and whose lock
is free was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from swiftkv_train.errors import UserError
from swiftkv_train.loading import one_line
from swiftkv_train.stopping import Stopped

if TYPE_CHECKING:
    from swiftkv_train.run_directory import RunDirectory

# What a run directory holds:
RECIPE, LOCK, STATE = "recipe.yaml", ".lock", "state.json"
METRICS, CALIBRATION, CHECKPOINTS = "metrics.jsonl", "calibration.json", "checkpoints"
PATIENCE = 1.0  # seconds; whoever only looks (`is_locked`) holds the lock for microseconds


class RunLock:
    """Keeps a second process from training into a run directory, until `release` or the end of this process."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._file: IO[str] | None = None

    def take(self) -> None:
        """To be called before anything is written to the directory, which is made.

        A directory of other files is left alone: `RunDirectory.create` refuses it. File systems without locks are let
        through: see `is_locked`. Raises UserError when another process holds the lock, or the directory is not to be
        written to.
        """
        directory = self.directory
        if directory.exists() and not (directory / RECIPE).exists() and not _is_empty(directory):
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = file = (directory / LOCK).open("a+", encoding="utf-8")
            deadline = time.monotonic() + PATIENCE
            while _try(file, fcntl.LOCK_EX) is False:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"training.output_dir {directory} is in use by {file.read() or 'another process'}; "
                        "stop it, wait for it, or choose another directory"
                    )
                time.sleep(0.02)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except OSError as error:
            raise UserError(f"training.output_dir {directory} cannot be written: {error.strerror}") from None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def is_locked(directory: Path) -> bool | None:
    """Whether a process is training into a run directory; None where the file system has no locks."""
    try:
        with (directory / LOCK).open(encoding="utf-8") as file:
            taken = _try(file, fcntl.LOCK_SH)
            return None if taken is None else not taken
    except FileNotFoundError:
        return False
    except OSError:
        return None


def _try(file: IO[str], kind: int) -> bool | None:
    """Whether the lock could be had; None where the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and all(item.name.startswith(".") for item in directory.iterdir())


class StateRecord:
    """What to call the run when it ends without an error, and whether anything was trained."""

    ending = "finished"
    trained = False


@contextmanager
def recorded_state(run: RunDirectory, lock: RunLock, *, enabled: bool) -> Iterator[StateRecord]:
    """Keep state.json while the block runs, and let go of the lock then; not `enabled`: another process does.

    A block that ended before anything was trained leaves the state that a resumed run had.
    """
    record = StateRecord()
    if not enabled:
        yield record
        return
    state: dict[str, Any] = {"state": "running", "started": now()}
    before = _read(run)

    def end(ending: str, **facts: str) -> None:
        ended = {**state, "state": ending, "ended": now(), **facts}
        _write(run, ended if record.trained or before is None else before)

    try:
        _write(run, state)
        try:
            yield record
        except (Stopped, KeyboardInterrupt):
            end("stopped")
            raise
        except BaseException as error:
            end("failed", error=one_line(error))
            raise
        end(record.ending)
    finally:
        lock.release()


def _read(run: RunDirectory) -> dict[str, Any] | None:
    """The state of a run that has a checkpoint; other runs begin anew."""
    if not run.checkpoints():
        return None
    with suppress(UserError):  # damaged, hence nothing to keep
        return run.read_json(STATE)
    return None


def _write(run: RunDirectory, state: dict[str, Any]) -> None:
    with suppress(UserError):  # a full disk is for the run itself to tell
        run.write_json(STATE, state)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(file: Path, default: Any = None) -> Any:
    """A run's JSON file, `default` where there is none. Raises UserError when it cannot be read or is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else default
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged; remove it") from None


def checkpoint_paths(folder: Path) -> list[tuple[int, Path]]:
    """Steps and checkpoints, by their names in a run's `checkpoints`, oldest first. Raises UserError."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:  # not to be taken for a run that has none, which would begin again
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    found = ((name, re.fullmatch(r"step-(\d+)", name)) for name in names)
    return sorted((int(match[1]), folder / name) for name, match in found if match)
