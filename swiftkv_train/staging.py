"""Directories that appear whole or not at all.

A directory is built beside its final name (`.NAME.partial-PID`), flushed to disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from swiftkv_train.durable import sync, sync_tree
from swiftkv_train.errors import RunError, UserError


@contextlib.contextmanager
def staged(final: Path, replaceable: Callable[[], bool] | None = None) -> Iterator[Path]:
    """A fresh directory to fill; it becomes `final` when the block ends well and is removed when it does not.

    `final` must be absolute and absent or empty, unless `replaceable`, asked at the very end, says that it may go.
    A full disk is a RunError, a place that cannot be written a UserError.
    """
    if not final.name:
        raise UserError(f"{final} cannot be a target directory; name one")
    stage = final.parent / f".{final.name}.partial-{os.getpid()}"
    replaced = final.parent / f".{final.name}.replaced-{os.getpid()}"
    try:
        with _write_errors(final):
            try:
                final.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UserError(f"cannot create {final}: {final.parent} is not a directory") from None
            _remove_dead_partials(final)
            stage.mkdir()
            yield stage
            sync_tree(stage)
            if replaceable and final.exists() and replaceable():
                os.rename(final, replaced)
            try:
                os.rename(stage, final)  # replaces an empty directory, fails on one that was filled meanwhile
            except OSError:
                if replaced.exists():
                    os.rename(replaced, final)
                raise
            sync(final.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _remove_dead_partials(final: Path) -> None:
    """What killed processes left behind; a partial of this very process id is a leftover too, ids being reused."""
    pattern = re.compile(re.escape(f".{final.name}.") + r"(?:partial|replaced)-(\d+)")
    for path in final.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def _write_errors(final: Path) -> Iterator[None]:
    """Native writers (safetensors, tokenizers) give the system's error number in the text of the message only."""
    try:
        yield
    except (UserError, RunError):
        raise
    except PermissionError as error:
        raise UserError(f"cannot write {final}: {error.strerror}: {error.filename}") from None
    except Exception as error:
        native = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(native[1]) if native else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk is full; nothing was left at {final}; free some space and run again") from None
        if code in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{final} was filled by something else meanwhile; name another directory") from None
        if isinstance(error, OSError) or native:
            raise RunError(f"could not write {final}: {error}; nothing was left there") from None
        raise
