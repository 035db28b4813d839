"""The token cache: a source is tokenised once, kept under a hash of all that decides its tokens, and memory-mapped.

An entry is a directory `KEY/` of raw arrays and a `meta.json` with their sizes and SHA-256. It is written under a
temporary name, fsynced and renamed, so that a name that exists is a whole entry; what fails its checksums is rebuilt,
never used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swiftkv_train.data.files import cannot_write, sha256_of_file
from swiftkv_train.data.generate import generated_source
from swiftkv_train.data.identity import identify
from swiftkv_train.data.sources import SkippedRows, read_documents
from swiftkv_train.data.tokenize import check_vocabulary, tokenize_documents, tokenizer_fingerprint
from swiftkv_train.durable import sync, temporary_beside
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.recipe import ModelSection, Source

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from swiftkv_train.progress import Reporter

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # Raise it when reading, masking or tokenising changes what comes out.
ARRAYS: dict[str, np.dtype[Any]] = {"tokens": np.dtype("<i4"), "targets": np.dtype("u1"), "offsets": np.dtype("<i8")}
STALE_SECONDS = 24 * 3600
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class TokenizedSource:
    """One source's documents, end to end. Document d is tokens[offsets[d] : offsets[d + 1]]."""

    name: str
    tokens: NDArray[np.int32]  # [num_tokens], memory-mapped
    targets: NDArray[np.uint8]  # [num_tokens], 1 where this token is one the model is taught to predict (not shifted)
    offsets: NDArray[np.int64]  # [num_documents + 1]
    num_documents: int
    num_tokens: int
    num_target_tokens: int
    skipped_rows: int
    fingerprint: str  # of the three arrays' content

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "documents": self.num_documents,
            "skipped_rows": self.skipped_rows,
            "tokens": self.num_tokens,
            "target_tokens": self.num_target_tokens,
        }


def tokenize_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    cache_dir: str | Path,
    base: ModelSection | None = None,
    tokenizer_fingerprint: str | None = None,
    report: Reporter | None = None,
) -> TokenizedSource:
    """A source's tokens, from the cache where they are, else made and cached.

    Several processes may call this at once: each builds its own copy and the first one renamed is kept.

    Args:
        vocab_size: of the model; ids outside it are refused.
        base: the model that a `generate` source has its text from.
        tokenizer_fingerprint: `tokenize.tokenizer_fingerprint(tokenizer)`, where the caller has it for several sources.

    Raises:
        UserError: the source cannot be read or holds nothing usable, or does not fit the tokenizer or vocabulary.
        RunError: the cache cannot be written.
    """
    check_vocabulary(tokenizer, vocab_size)
    if source.generate is not None:
        if base is None:
            raise UserError(f"source {source.name!r} is said by a base, and none is known here; give text instead")
        source = generated_source(source, base, tokenizer, cache_dir, report)
    identity = identify(source, cache_dir)
    entry = Path(cache_dir) / _cache_key(source, identity.key, tokenizer, tokenizer_fingerprint, vocab_size)
    found = _open_entry(entry, source.name)
    if found is not None:
        if identity.unreadable is not None:
            logger.warning("%s; its tokens prepared before are used", identity.unreadable)
        if found.skipped_rows:
            logger.warning("source %r: %d rows were skipped when it was cached", source.name, found.skipped_rows)
        if report is not None:
            report.tokenising(source.name, found.num_documents, found.num_tokens)
        return found
    if identity.unreadable is not None:
        raise identity.unreadable
    for _ in range(3):  # Another process may move a damaged entry away just when this one has been put in its place.
        _build_entry(entry, source, tokenizer, vocab_size, report)
        found = _open_entry(entry, source.name)
        if found is not None:
            return found
    raise RunError(
        f"token cache {entry} does not read back as written; check the disk or set data.cache_dir to another"
    )


def _cache_key(
    source: Source, content: Any, tokenizer: PreTrainedTokenizerBase, known_tokenizer: str | None, vocab_size: int
) -> str:
    key = {
        "format": FORMAT_VERSION,
        "content": content,
        "source": source.model_dump(include={"field", "kind", "max_documents"}),
        "tokenizer": known_tokenizer or tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]


def _open_entry(entry: Path, name: str) -> TokenizedSource | None:
    """The entry, or None when it is not there or not what was written."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        for array in ARRAYS:
            path = entry / f"{array}.bin"
            if path.stat().st_size != meta["files"][array]["size"]:
                raise ValueError(f"{path.name} has the wrong size")
            if sha256_of_file(path) != meta["files"][array]["sha256"]:
                raise ValueError(f"{path.name} has the wrong checksum")
        arrays = {array: np.memmap(entry / f"{array}.bin", dtype=dtype, mode="r") for array, dtype in ARRAYS.items()}
        return TokenizedSource(
            name=name,
            tokens=arrays["tokens"],
            targets=arrays["targets"],
            offsets=arrays["offsets"],
            num_documents=int(meta["num_documents"]),
            num_tokens=int(meta["num_tokens"]),
            num_target_tokens=int(meta["num_target_tokens"]),
            skipped_rows=int(meta["skipped_rows"]),
            fingerprint=_fingerprint(meta["files"]),
        )
    except FileNotFoundError:
        if entry.exists():
            logger.warning("token cache %s is incomplete; it is built again", entry)
        return None
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        logger.warning("token cache %s is damaged (%s); it is built again", entry, error)
        return None


def _build_entry(
    entry: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    report: Reporter | None,
) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(entry.parent)
        temporary = temporary_beside(entry)
        temporary.mkdir()
    except OSError as error:
        raise cannot_write(entry.parent, error) from None
    try:
        _write_entry(temporary, source, tokenizer, vocab_size, report)
        _publish(temporary, entry)
    except OSError as error:
        raise cannot_write(entry.parent, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_entry(
    directory: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    report: Reporter | None,
) -> None:
    skipped = SkippedRows(source.name)
    documents = read_documents(source, skipped)
    files = {array: _HashedFile(directory / f"{array}.bin") for array in ARRAYS}
    num_documents = num_tokens = num_targets = 0
    reported = time.monotonic()
    files["offsets"].write(np.zeros(1, ARRAYS["offsets"]))
    try:
        for ids, targets in tokenize_documents(documents, tokenizer, vocab_size, skipped):
            num_documents += 1
            num_tokens += len(ids)
            num_targets += int(targets.sum())
            files["tokens"].write(ids.astype(ARRAYS["tokens"], copy=False))
            files["targets"].write(targets)
            files["offsets"].write(np.array([num_tokens], ARRAYS["offsets"]))
            if report is not None and time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                report.tokenising(source.name, num_documents, num_tokens, goes_on=True)
    finally:
        written = {array: file.close() for array, file in files.items()}
    skipped.summarise(num_documents)
    if report is not None:
        report.tokenising(source.name, num_documents, num_tokens)
    meta = {
        "source": source.name,
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "num_target_tokens": num_targets,
        "skipped_rows": skipped.count,
        "files": written,
    }
    with (directory / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(directory)


class _HashedFile:
    """A file written once from front to back whose size and checksum are known at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, array: NDArray[Any]) -> None:
        content = array.tobytes()
        self._file.write(content)
        self._digest.update(content)

    def close(self) -> dict[str, Any]:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            return {"size": self._file.tell(), "sha256": self._digest.hexdigest()}


def _publish(temporary: Path, entry: Path) -> None:
    """Give a finished entry its name; an entry another process finished first stays."""
    while True:
        try:
            temporary.rename(entry)  # Fails on a directory that is not empty.
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _open_entry(entry, "") is not None:
            return
        damaged = temporary_beside(entry)
        with suppress(FileNotFoundError):  # Another process may just have moved it away as well.
            entry.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    sync(entry.parent)


def _remove_stale(cache_dir: Path) -> None:
    """Throw away what processes killed long ago left under temporary names."""
    for path in cache_dir.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _fingerprint(files: dict[str, Any]) -> str:
    return hashlib.sha256("".join(files[array]["sha256"] for array in ARRAYS).encode()).hexdigest()
