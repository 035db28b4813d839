"""A second start reads no text, on the machine that prepared the cache or on another without the text."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from swiftkv_train.data import check_no_overlap, files, identity, load_training_data, tokenize_source
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import DataSection, Source

ROWS = [{"text": f"The dog number {i} is lazy and quick."} for i in range(30)]
HOUR = 3600 * 10**9

watched: list[str] | None = None


def _note_opened_file(event: str, arguments: tuple) -> None:
    if event == "open" and watched is not None:
        watched.append(str(arguments[0]))


sys.addaudithook(_note_opened_file)  # for the life of the process: Python has no way to take one away


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every file that Python code opens."""
    global watched
    watched = []
    try:
        yield watched
    finally:
        watched = None


def age(path: Path, hours: int = 1) -> Path:
    """As if the file had been written long ago."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - hours * HOUR))
    return path


@pytest.fixture
def text(write_jsonl: Callable[..., Path]) -> Path:
    return age(write_jsonl("prose.jsonl", ROWS))


@pytest.fixture
def get(text: Path, tokenizer, tmp_path: Path):
    def tokens(cache_dir: str = "cache", **options):
        options = {"name": "s", "path": str(text)} | options
        return tokenize_source(Source(**options), tokenizer, vocab_size=400, cache_dir=tmp_path / cache_dir)

    return tokens


def test_a_second_start_opens_no_text(text, tokenizer, tmp_path):
    data = DataSection(
        sequence_length=64, train=[Source(name="s", path=str(text.parent / "*.jsonl"))], cache_dir=str(tmp_path / "c")
    )
    with opened_files() as first_time:
        first = load_training_data(data, tokenizer, 400, 2)
    with opened_files() as second_time:
        second = load_training_data(data, tokenizer, 400, 2)
    assert str(text) in first_time
    assert str(text) not in second_time
    assert any(name.endswith("tokens.bin") for name in second_time)  # the hook does see what is read
    assert torch.equal(first.batch(0, 16).input_ids, second.batch(0, 16).input_ids)


def hashed(monkeypatch) -> list[str]:
    """Names of the files whose content is read to know them."""
    names: list[str] = []
    sha256_of_file = files.sha256_of_file
    monkeypatch.setattr(identity, "sha256_of_file", lambda path: names.append(path.name) or sha256_of_file(path))
    return names


def test_only_what_changed_is_read_again(get, text, tmp_path, write_jsonl, monkeypatch):
    other = age(write_jsonl("other.jsonl", ROWS[:5]))
    both = {"path": str(tmp_path / "*.jsonl")}
    names = hashed(monkeypatch)
    first = get(**both)
    assert sorted(names) == ["other.jsonl", "prose.jsonl"]
    age(other)  # touched, not changed
    assert get(**both).fingerprint == first.fingerprint
    assert names[2:] == ["other.jsonl"]
    before = text.stat()
    text.write_bytes(text.read_bytes().replace(b"lazy", b"busy"))
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns + HOUR))
    assert get(**both).fingerprint != first.fingerprint
    assert names[3:] == ["prose.jsonl"]


def test_a_file_put_in_anothers_place_with_its_size_and_time_is_read(get, text, tmp_path):
    first = get()
    before = text.stat()
    twin = tmp_path / "twin"
    twin.write_bytes(text.read_bytes().replace(b"lazy", b"busy"))
    os.utime(twin, ns=(before.st_atime_ns, before.st_mtime_ns))
    twin.replace(text)
    assert (text.stat().st_size, text.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert get().fingerprint != first.fingerprint


def test_a_file_written_just_now_is_read_again(get, text, monkeypatch):
    """Within the resolution of a file system's clock it may change once more and look the same."""
    text.touch()
    names = hashed(monkeypatch)
    get()
    get()
    assert names == ["prose.jsonl"] * 2


def test_the_prepared_cache_serves_where_the_text_is_not(get, text, tmp_path, caplog):
    first = get()
    shutil.copytree(tmp_path / "cache", tmp_path / "brought")
    shutil.rmtree(tmp_path / "cache")
    text.unlink()
    found = get("brought", name="other", weight=2.0)
    assert found.tokens.tolist() == first.tokens.tolist()
    assert found.fingerprint == first.fingerprint
    assert "prose.jsonl does not exist or matches no file; its tokens prepared before are used" in caplog.text


def test_what_was_not_prepared_is_missed(get, text, tokenizer, tmp_path):
    get()
    text.unlink()
    tokenizer.add_tokens(["<tool>"])  # the tokens in the cache are another tokenizer's
    for options in ({}, {"max_documents": 3}, {"path": str(text.with_name("never.jsonl"))}, {"cache_dir": "empty"}):
        with pytest.raises(UserError, match="jsonl does not exist or matches no file"):
            get(**options)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": [{"path": "x"}]}', '{"files": 3}', '{"files": [4]}'])
def test_a_damaged_record_is_no_record(content, get, text, tmp_path, monkeypatch):
    first = get()
    (record,) = (tmp_path / "cache/sources").iterdir()
    good = record.read_text()
    record.write_text(content)
    names = hashed(monkeypatch)
    assert get().fingerprint == first.fingerprint
    assert names == ["prose.jsonl"]
    assert record.read_text() == good
    record.write_text(content)
    text.unlink()
    with pytest.raises(UserError, match="does not exist"):
        get()


def test_a_cache_that_can_only_be_read_serves(get, text, monkeypatch):
    first = get()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(identity, "write_whole", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    age(text)
    assert get().fingerprint == first.fingerprint


def test_what_others_may_read_in_a_shared_cache_follows_the_umask(get, tmp_path):
    before = os.umask(0o022)
    try:
        get()
    finally:
        os.umask(before)
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_copy_of_a_training_file_is_no_held_out_file(text, tmp_path, write_jsonl):
    copy = tmp_path / "held_out.jsonl"
    shutil.copy(text, copy)
    other = write_jsonl("more.jsonl", ROWS[:3])

    def data(*held_out: Path) -> DataSection:
        return DataSection(
            train=[Source(name="prose", path=str(text))],
            test=[Source(name=path.stem, path=str(path)) for path in held_out],
            cache_dir=str(tmp_path / "cache"),
        )

    check_no_overlap(data(other))
    with pytest.raises(UserError, match=r"'held_out' reads file .*held_out.jsonl, which train source 'prose' trains"):
        check_no_overlap(data(other, copy))
    text.unlink()  # what was recorded of it is still known
    with pytest.raises(UserError, match=r"which train source 'prose' trains"):
        check_no_overlap(data(copy))
