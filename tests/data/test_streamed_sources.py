"""Hugging Face datasets: known by their revision, read as they come or not at all."""

from __future__ import annotations

import datasets
import pytest

from swiftkv_train.data import TextDocument, read_documents, tokenize_source
from swiftkv_train.data.sources import dataset_revision
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Source

ROWS = [{"text": f"The dog number {i}.", "id": i} for i in range(9)]


@pytest.fixture
def folder(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "set").mkdir()
    write_jsonl("set/train.jsonl", ROWS)
    write_jsonl("set/test.jsonl", ROWS[:2])
    return tmp_path / "set"


@pytest.fixture
def get(folder, tokenizer, tmp_path):
    def tokens(**options):
        source = Source(**({"name": "s", "dataset": str(folder)} | options))
        return tokenize_source(source, tokenizer, vocab_size=400, cache_dir=tmp_path / "cache")

    return tokens


def entries(tmp_path) -> int:
    return len(list((tmp_path / "cache").glob("*/meta.json")))


def test_streamed_or_not_the_documents_are_the_same_and_so_is_the_entry(get, folder, tmp_path):
    found = [
        list(read_documents(Source(name="s", dataset=str(folder), streaming=streaming))) for streaming in (True, False)
    ]
    assert found[0] == found[1] == [TextDocument(f"{folder}[train]:{i}", row["text"]) for i, row in enumerate(ROWS)]
    assert get(streaming=True).fingerprint == get().fingerprint
    assert entries(tmp_path) == 1


def test_streaming_keeps_no_copy(get, tmp_path):
    get(streaming=True)
    assert not list((tmp_path / "hf").rglob("*.arrow"))
    get(split="test")
    assert list((tmp_path / "hf").rglob("*.arrow"))


def test_a_stream_is_read_as_far_as_max_documents(monkeypatch):
    read: list[int] = []
    asked: list[dict] = []

    def rows():
        for i in range(1000):
            read.append(i)
            yield {"text": f"row {i}"} if i != 1 else {"text": ""}

    def load_dataset(*_, **options):
        asked.append(options)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(name="s", dataset="org/large", revision="v1", streaming=True, max_documents=3)
    assert [document.text for document in read_documents(source)] == ["row 0", "row 2", "row 3"]
    assert read == [0, 1, 2, 3]
    assert asked == [{"split": "train", "revision": "v1", "streaming": True}]


def test_a_stream_that_breaks_off_is_told_in_one_line(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionResetError("gone\naway")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(
        UserError, match=r"^source 's': dataset 'org/set', split 'train', cannot be loaded \(.*gone away"
    ):
        list(read_documents(Source(name="s", dataset="org/set", streaming=True)))


def test_revision_split_and_content_are_in_the_key(get, folder, write_jsonl, tmp_path, monkeypatch):
    get()
    get(split="test")
    get(max_documents=2)
    assert entries(tmp_path) == 3
    write_jsonl("set/train.jsonl", ROWS[1:])
    assert get().num_documents == len(ROWS) - 1
    assert entries(tmp_path) == 4
    asked = []
    builder = datasets.load_dataset_builder(str(folder))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: asked.append((a, k)) or builder)
    revision = dataset_revision(Source(name="s", dataset="org/set", subset="en", split="test", revision="v2"))
    assert asked == [(("org/set", "en"), {"revision": "v2"})]
    assert (revision[0], revision[-1]) == ("org/set", "test")


def test_a_second_start_loads_no_dataset(get, monkeypatch):
    first = get(streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the dataset was loaded"))
    assert get(streaming=True).fingerprint == first.fingerprint


def test_the_prepared_cache_serves_without_a_network(get, monkeypatch, caplog):
    first = get(max_documents=4)

    def no_network(*_, **__):
        raise ConnectionError("no route\nto host")

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, no_network)
    assert get(max_documents=4).fingerprint == first.fingerprint
    assert "cannot be loaded (no route to host)" in caplog.text
    assert "its tokens prepared before are used" in caplog.text
    with pytest.raises(UserError, match=r"cannot be loaded \(no route to host\); check the name, the split"):
        get(max_documents=5)


def test_a_missing_split_is_told_in_one_line(get):
    for streaming in (False, True):
        with pytest.raises(UserError) as error:
            get(split="nope", streaming=streaming)
        assert "split 'nope', cannot be loaded (" in str(error.value)
        assert "\n" not in str(error.value)
