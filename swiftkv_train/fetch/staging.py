"""Directories that appear whole or not at all, and the provenance file that says what is in them.

A directory is built beside its final name (`.NAME.partial-PID`), synced to disk and renamed. `fetch.json` in it records
the source, its version and the size and sha256 of every file: enough to see later that nothing is missing or changed,
and so that a directory of an earlier version may be replaced without loss.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from swiftkv_train.checksum import sha256_of
from swiftkv_train.durable import sync, sync_tree
from swiftkv_train.errors import RunError, UserError

PROVENANCE = "fetch.json"


def already_there(directory: Path, source: str, version: str, earlier: Collection[str] = ()) -> bool:
    """True when `directory` holds `version` of `source`, intact; False when it may be put there.

    It may where nothing is, and where there is one of the `earlier` versions, intact, and nothing besides.
    Raises UserError when it holds anything else: what a user has is never overwritten.
    """
    if not directory.exists() and not directory.is_symlink():
        return False
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name another one")
    if not any(directory.iterdir()):
        return False
    provenance = directory / PROVENANCE
    if not provenance.is_file():
        raise UserError(f"{directory} already holds files that `swiftkv fetch` did not write; name an empty directory")
    try:
        record = json.loads(provenance.read_text(encoding="utf-8"))
        held = (record["source"], record["version"])
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{provenance} is damaged; remove {directory} to fetch it again") from None
    outdated = held[0] == source and held[1] in earlier
    if held != (source, version) and not outdated:
        raise UserError(
            f"{directory} already holds {held[0]} ({held[1]}), not {source} ({version}); "
            "name another directory or remove that one"
        )
    for name, (size, sha256) in files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing since it was fetched; remove {directory} to fetch it again")
        if path.stat().st_size != size or sha256_of(path) != sha256:
            raise UserError(f"{path} was changed since it was fetched; remove {directory} to fetch it again")
    if outdated:
        own = {directory / name for name in (*files, PROVENANCE)}
        besides = sorted(path for path in directory.rglob("*") if path not in own and not path.is_dir())
        if besides or directory.is_symlink():
            reason = f"with {besides[0].relative_to(directory)} besides" if besides else "and is a symbolic link"
            raise UserError(
                f"{directory} holds an earlier version of {source}, {reason}; move it elsewhere and run again"
            )
    return not outdated


def write_provenance(directory: Path, source: str, version: str, **details: Any) -> None:
    """Record what `directory` holds; call it last, when every other file is in place."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    record = {"source": source, "version": version, **details, "files": files}
    (directory / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
