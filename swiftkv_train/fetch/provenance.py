"""`fetch.json`: what a fetched directory holds.

It records the source, its version and the size and sha256 of every file: enough to see later that nothing is missing or
changed, and so that a directory of an earlier version may be replaced without loss.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from swiftkv_train.checksum import sha256_of
from swiftkv_train.errors import UserError

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
