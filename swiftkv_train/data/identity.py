"""What a source's content is known by, remembered so that an unchanged source is not read again to know it.

A source of files is known by their formats, sizes and SHA-256; a hub dataset by its revision as `datasets` resolves it.
`cache_dir/sources/` holds one record per source of what it was found to be. A file whose size, time of change and inode
are as recorded is not read. A source that cannot be read, because only its prepared tokens were brought to this
machine, is what its record says.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swiftkv_train.data.files import sha256_of_file, write_whole
from swiftkv_train.data.sources import dataset_revision, format_and_packing, resolve_files
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Source

SETTLED_NS = 2 * 10**9  # A file changed this shortly ago may change again within the resolution of its time stamp.


@dataclass(frozen=True)
class FileIdentity:
    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str

    def is_still(self, status: os.stat_result) -> bool:
        return (self.size, self.mtime_ns, self.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True)
class SourceIdentity:
    key: Any  # JSON, the same wherever the same content is
    files: tuple[FileIdentity, ...]  # none for a dataset
    unreadable: UserError | None = None  # why the source cannot be read here, when `key` is from its record


def identify(source: Source, cache_dir: str | Path) -> SourceIdentity:
    """What a `path` or `dataset` source holds; no text is read where nothing changed.

    Raises:
        UserError: the source cannot be read, and there is no record of it in `cache_dir`.
    """
    origin = source.model_dump(include={"path", "dataset", "subset", "split", "revision"}, exclude_none=True)
    record = record_path(cache_dir, origin)
    try:
        if source.path is None:
            revision = dataset_revision(source)
            _write(record, {"dataset": revision})
            return SourceIdentity({"dataset": revision}, ())
        files = hash_files(resolve_files(source), record)
        return SourceIdentity(_key_of_files(files), files)
    except UserError as error:
        known = _read(record)
        if "dataset" in known:
            return SourceIdentity(known, (), error)
        if files := _recorded_files(known):
            return SourceIdentity(_key_of_files(files), files, error)
        raise


def hash_files(paths: Sequence[Path], record: Path) -> tuple[FileIdentity, ...]:
    """The identity of every file; only those that changed since `record` was written are read, and it is renewed.

    Raises:
        UserError: a file cannot be read.
    """
    known = {file.path: file for file in _recorded_files(_read(record))}
    found = []
    for path in paths:
        name = str(path.absolute())
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        if name in known and known[name].is_still(status):
            found.append(known[name])
            continue
        settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
        mtime = status.st_mtime_ns if settled else 0  # never found unchanged
        found.append(FileIdentity(name, status.st_size, mtime, status.st_ino, sha256_of_file(path)))
    if found != list(known.values()):
        _write(record, {"files": [asdict(file) for file in found]})
    return tuple(found)


def record_path(cache_dir: str | Path, origin: Any) -> Path:
    """Where it is recorded what `origin` (JSON) was found to hold."""
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / "sources" / f"{digest[:40]}.json"


def _key_of_files(files: Sequence[FileIdentity]) -> Any:
    return [[*format_and_packing(Path(file.path)), file.size, file.sha256] for file in files]


def _recorded_files(record: dict[str, Any]) -> tuple[FileIdentity, ...]:
    try:
        return tuple(FileIdentity(**file) for file in record.get("files", ()))
    except TypeError:
        return ()


def _read(record: Path) -> dict[str, Any]:
    """The record, or nothing when it is not there or damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _write(record: Path, content: dict[str, Any]) -> None:
    """Where the cache cannot be written, what is not recorded is read again next time."""
    if _read(record) == content:
        return
    with suppress(OSError):
        write_whole(record, json.dumps(content, indent=1))
