"""SHA-256 of files, and a directory's own list of them in the format of `sha256sum -c`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "SHA256SUMS"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def sha256_of_each(paths: Iterable[Path], relative_to: Path) -> dict[str, str]:
    """Name below `relative_to` -> SHA-256, several files at a time. Raises OSError when one cannot be read."""
    paths = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return {
            path.relative_to(relative_to).as_posix(): digest
            for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True)
        }


def write_checksums(directory: Path) -> None:
    """List every file below `directory` in its SHA256SUMS. Raises OSError."""
    lines = [f"{digest}  {name}\n" for name, digest in _found(directory).items()]
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def first_damage(directory: Path) -> str | None:
    """What first differs from the SHA256SUMS of `directory`, in words; None when every file is as it was listed.

    Raises PermissionError where that cannot be seen.
    """
    try:
        lines = (directory / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        found = _found(directory)
    except PermissionError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        name = Path(getattr(error, "filename", None) or CHECKSUMS).name
        return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != listed.get(name):
            return f"{name} does not match its checksum"
    return None


def _found(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path != directory / CHECKSUMS)
    return sha256_of_each(files, directory)
