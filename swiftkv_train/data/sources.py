"""Reading: a recipe's `Source` as an iterator of documents, in an order that never changes.

`.txt` and `.md`: the whole file is one document. `.jsonl`: one row per line. `.json`: a list of rows. `.parquet`: rows.
All but parquet may be gzipped (`.gz`). A hub dataset, or a directory `datasets.load_dataset` understands, goes by
`dataset`.
Bad rows are skipped and counted; a file that cannot be read at all stops the run.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from swiftkv_train.data.documents import KNOWN_COLUMNS, BadRow, Document, TextDocument, document_from_row
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Source

logger = logging.getLogger(__name__)

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
SHOWN_BAD_ROWS = 5


class SkippedRows:
    """Counts the rows of one source that could not be used and reports the first few."""

    def __init__(self, source_name: str) -> None:
        self.source_name = source_name
        self.count = 0
        self.first: str | None = None

    def add(self, location: str, reason: str) -> None:
        self.count += 1
        self.first = self.first or f"{location}: {reason}"
        if self.count <= SHOWN_BAD_ROWS:
            logger.warning("%s: %s", location, reason)

    def summarise(self, documents: int) -> None:
        """Log the count once. Raises UserError when not a single document was left."""
        if documents == 0:
            why = f"all {self.count} rows were skipped, the first: {self.first}" if self.count else "it has no rows"
            raise UserError(f"source {self.source_name!r} holds no usable document: {why}")
        if self.count:
            logger.warning("source %r: %d rows skipped, %d documents kept", self.source_name, self.count, documents)


def resolve_files(source: Source) -> list[Path]:
    """The files a `path` source stands for, sorted; empty for a `dataset` source.

    Raises:
        UserError: nothing is there, or what is there has no known format.
    """
    if source.path is None:
        return []
    known = ", ".join(FORMATS)
    path = Path(source.path)
    try:
        if path.is_file():
            if _format_of(path) is None:
                raise UserError(f"source {source.name!r}: {path} has an unknown format; known are {known}")
            return [path]
        if path.is_dir():
            found = list(_files_below(path))
        else:
            found = [Path(item) for item in glob.glob(str(path), recursive=True)]
    except OSError as error:
        raise UserError(f"source {source.name!r}: {error.filename} cannot be read: {error.strerror}") from None
    if not found and not path.is_dir():
        raise UserError(f"source {source.name!r}: {source.path} does not exist or matches no file")
    files = sorted((item for item in found if item.is_file() and _format_of(item)), key=lambda item: item.parts)
    if not files:
        raise UserError(f"source {source.name!r}: {source.path} holds no file of a known format ({known})")
    return files


def dataset_revision(source: Source) -> list[str | None]:
    """What a `dataset` source is known by: its name, configuration, version, revision (of a hub dataset the commit, of
    a local directory a hash of its files' names and times) and split. Nothing is downloaded but its description.

    Raises:
        UserError: see `open_dataset`.
    """
    import datasets

    with _loading(source):
        builder = datasets.load_dataset_builder(source.dataset, source.subset, revision=source.revision)
    return [source.dataset, builder.config_id, str(builder.config.version), str(builder.hash), source.split]


def open_dataset(source: Source) -> Any:
    """The `datasets.Dataset` a `dataset` source names; an `IterableDataset` where it is `streaming`.

    Raises:
        UserError: it cannot be loaded, for whatever reason the library has.
    """
    import datasets

    with _loading(source):
        dataset = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    return dataset


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # The library raises some twenty unrelated types: hub, network, parsing, missing split.
        reason = " ".join(str(error).split()) or type(error).__name__
        full_name = source.dataset if source.subset is None else f"{source.dataset}/{source.subset}"
        raise UserError(
            f"source {source.name!r}: dataset {full_name!r}, split {source.split!r}, cannot be loaded ({reason}); "
            "check the name, the split and the network, or download it and use `path`"
        ) from None


def read_documents(source: Source, skipped: SkippedRows | None = None) -> Iterator[Document]:
    """The documents of a `path` or `dataset` source, at most `max_documents`; rows of no use go to `skipped`.

    Raises:
        UserError: a missing path, an unreadable or damaged file, text that is not UTF-8, a dataset that will not load.
    """
    skipped = SkippedRows(source.name) if skipped is None else skipped
    if source.path is None:
        documents = _dataset_documents(source, skipped)
    else:
        documents = (document for path in resolve_files(source) for document in _file_documents(source, path, skipped))
    return islice(documents, source.max_documents)


def _file_documents(source: Source, path: Path, skipped: SkippedRows) -> Iterator[Document]:
    readers = {"jsonl": _jsonl_rows, "json": _json_rows, "parquet": _parquet_rows}
    form = _format_of(path)
    if form == "text":
        if source.kind == "chat":
            raise UserError(
                f"source {source.name!r}: {path} is plain text, but `kind: chat` needs .jsonl, .json or .parquet"
            )
        text = _read_text(path)
        if text.strip():
            yield TextDocument(str(path), text)
        else:
            skipped.add(str(path), "the file is empty")
        return
    for location, row in readers[cast(str, form)](source, path, skipped):
        try:
            yield document_from_row(row, location, source)
        except BadRow as reason:
            skipped.add(location, str(reason))


def _dataset_documents(source: Source, skipped: SkippedRows) -> Iterator[Document]:
    dataset = open_dataset(source)
    location = f"{source.dataset}[{source.split}]"
    if dataset.column_names is not None:  # A streamed dataset may not know them before its first row.
        columns = _wanted_columns(source, dataset.column_names)
        if not columns:
            skipped.add(location, f"no usable column among {', '.join(dataset.column_names)}")
            return
        dataset = dataset.select_columns(columns)
    for number, row in enumerate(_dataset_rows(source, dataset)):
        try:
            yield document_from_row(row, f"{location}:{number}", source)
        except BadRow as reason:
            skipped.add(f"{location}:{number}", str(reason))


def _dataset_rows(source: Source, dataset: Any) -> Iterator[Any]:
    with _loading(source):  # A streamed dataset is downloaded while it is read.
        yield from dataset


def _jsonl_rows(source: Source, path: Path, skipped: SkippedRows) -> Iterator[tuple[str, Any]]:
    number = 0
    with _open(path) as file:
        for number, line in enumerate(_guarded(file, path), start=1):
            location = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield location, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                skipped.add(location, f"not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                skipped.add(location, f"not JSON ({error})")
    if number == 0:
        skipped.add(str(path), "the file is empty")


def _json_rows(source: Source, path: Path, skipped: SkippedRows) -> Iterator[tuple[str, Any]]:
    text = _read_text(path)
    if not text.strip():
        skipped.add(str(path), "the file is empty")
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); for one row per line name it .jsonl") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of rows; for one row per line name it .jsonl")
    for number, row in enumerate(rows):
        yield f"{path}:[{number}]", row


def _parquet_rows(source: Source, path: Path, skipped: SkippedRows) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _wanted_columns(source, file.schema_arrow.names)
            if not columns:
                skipped.add(str(path), f"no usable column among {', '.join(file.schema_arrow.names)}")
                return
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in _rows_of_batch(batch):
                    if isinstance(row, ValueError):
                        skipped.add(f"{path}:row {number}", " ".join(str(row).split()))
                    else:
                        yield f"{path}:row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable parquet file ({reason}); write or download it again") from None
    if number == 0:
        skipped.add(str(path), "the file has no rows")


def _rows_of_batch(batch: Any) -> list[Any]:
    """A ValueError in place of a row that Python cannot hold: text that is not UTF-8, a date beyond its dates."""
    try:
        return batch.to_pylist()
    except ValueError as error:
        if batch.num_rows == 1:
            return [error]
    return [row for number in range(batch.num_rows) for row in _rows_of_batch(batch.slice(number, 1))]


def _wanted_columns(source: Source, present: list[str]) -> list[str]:
    wanted = KNOWN_COLUMNS if source.field is None else {source.field, "loss_mask"}
    columns = [name for name in present if name in wanted]
    return [] if source.field is not None and source.field not in columns else columns


def _read_text(path: Path) -> str:
    with _open(path) as file:
        content = b"".join(_guarded(file, path))
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example: iconv -f LATIN1 -t UTF-8"
        ) from None


def _open(path: Path) -> IO[bytes]:
    try:
        return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _guarded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The file's lines; damage found on the way is the user's to mend, not a traceback."""
    try:
        yield from file
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); write or download it again") from None


def _format_of(path: Path) -> str | None:
    form, _ = format_and_packing(path)
    return form


def format_and_packing(path: Path) -> tuple[str | None, str]:
    if path.suffix == ".gz":
        form = FORMATS.get(path.with_suffix("").suffix)
        return (None if form == "parquet" else form), "gz"
    return FORMATS.get(path.suffix), ""


def _files_below(directory: Path) -> Iterator[Path]:
    """All but the hidden ones. Raises OSError for a directory that cannot be read: text is not left out unnoticed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(directory, onerror=refuse):
        names[:] = [name for name in names if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))
