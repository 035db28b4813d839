"""Files that survive a crash: flushed to disk before they get their name."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def publish_directory(temporary: Path, final: Path) -> None:
    """Flush `temporary` to disk and give it its final name, in place of an older directory there."""
    sync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Give a file new content: under its name is always the old or the new, whole. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path`, or what that links to, if the block ends well."""
    path = Path(os.path.realpath(path))
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name of its own for what becomes `path`. (What `tempfile` makes, others who share a cache cannot read.)"""
    return path.with_name(f".{path.name[:16]}-{uuid.uuid4().hex}.tmp")
