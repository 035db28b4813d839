"""What reading sources and keeping the cache both need of the file system."""

from __future__ import annotations

import hashlib
from pathlib import Path

from swiftkv_train.errors import UserError


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(buffer[:size])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
