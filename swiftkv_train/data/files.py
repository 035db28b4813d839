"""What reading sources and keeping the cache both need of the file system."""

from __future__ import annotations

from pathlib import Path

from swiftkv_train.checksum import sha256_of
from swiftkv_train.errors import UserError


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises UserError when it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
