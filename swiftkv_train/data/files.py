"""What reading sources and keeping the cache both need of the file system."""

from __future__ import annotations

from pathlib import Path

from swiftkv_train.checksum import sha256_of
from swiftkv_train.durable import write_text
from swiftkv_train.errors import RunError, UserError


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises UserError when it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def write_whole(path: Path, text: str) -> None:
    """Give a file new content, whole or not at all, whoever else writes it at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def cannot_write(cache_dir: Path, error: OSError) -> RunError:
    return RunError(
        f"token cache {cache_dir} cannot be written: {error.strerror or error}; "
        "free space or set data.cache_dir to another place"
    )
