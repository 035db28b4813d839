"""The token cache: hits tokenise nothing, whatever decides the tokens is in the key, damage is never used."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from swiftkv_train.data import cache, tokenize_source
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Source

ROWS = [
    {"text": "The quick brown fox."},
    {"messages": [{"role": "user", "content": "Yes"}, {"role": "assistant", "content": "Yes"}]},
    {"text": "Paris 👍"},
]


@pytest.fixture
def path(write_jsonl) -> Path:
    return write_jsonl("a.jsonl", ROWS)


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """Names of the sources that were really tokenised."""
    names: list[str] = []
    tokenize_documents = cache.tokenize_documents

    def counted(documents, tokenizer, vocab_size, skipped):
        names.append(skipped.source_name)
        return tokenize_documents(documents, tokenizer, vocab_size, skipped)

    monkeypatch.setattr(cache, "tokenize_documents", counted)
    return names


def get(path, tokenizer, tmp_path, *, vocab_size=400, **options):
    source = Source(**({"name": "s", "path": None if path is None else str(path)} | options))
    return tokenize_source(source, tokenizer, vocab_size=vocab_size, cache_dir=tmp_path / "cache")


def entries(tmp_path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").glob("*") if path.name != "sources")


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "offsets"))


def test_what_is_stored_is_what_the_tokenizer_says(path, tokenizer, tmp_path):
    found = get(path, tokenizer, tmp_path)
    texts = ["The quick brown fox.", tokenizer.apply_chat_template(ROWS[1]["messages"], tokenize=False), "Paris 👍"]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert found.tokens.tolist() == [token for ids in expected for token in ids]
    assert found.offsets.tolist() == [0, *np.cumsum([len(ids) for ids in expected]).tolist()]
    assert (found.num_documents, found.num_tokens, found.skipped_rows) == (3, found.offsets[-1], 0)
    reply = found.targets[found.offsets[1] : found.offsets[2]].astype(bool)
    assert tokenizer.decode(np.array(expected[1])[reply]) == "Yes<|im_end|>"
    assert found.num_target_tokens == len(expected[0]) + int(reply.sum()) + len(expected[2])
    assert isinstance(found.tokens, np.memmap)
    assert (found.tokens.dtype, found.targets.dtype, found.offsets.dtype) == (np.int32, np.uint8, np.int64)


def test_a_hit_does_not_tokenise(path, tokenizer, tmp_path, built):
    first = get(path, tokenizer, tmp_path)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    second = get(path, tokenizer, tmp_path, name="other", weight=3.0)
    assert built == ["s"]
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    assert (first.name, second.name) == ("s", "other")


def test_the_same_content_elsewhere_is_a_hit(path, tokenizer, tmp_path, built, write_jsonl):
    get(path, tokenizer, tmp_path)
    get(write_jsonl("copy.jsonl", ROWS), tokenizer, tmp_path)
    assert built == ["s"]


def test_everything_that_decides_the_tokens_is_in_the_key(
    path, tokenizer, make_tokenizer, tmp_path, built, write_jsonl
):
    get(path, tokenizer, tmp_path)
    get(path, tokenizer, tmp_path, max_documents=2)
    get(path, tokenizer, tmp_path, kind="chat")
    get(path, tokenizer, tmp_path, field="text")
    get(path, tokenizer, tmp_path, vocab_size=500)
    get(write_jsonl("a.jsonl", ROWS[:2]), tokenizer, tmp_path)
    get(path, make_tokenizer(chat_template="x" + tokenizer.chat_template), tmp_path)
    tokenizer.add_tokens(["<tool>"])
    get(path, tokenizer, tmp_path, vocab_size=500)
    assert len(built) == len(entries(tmp_path)) == 8


def test_the_fingerprint_is_of_the_tokens(path, tokenizer, tmp_path, write_jsonl):
    first = get(path, tokenizer, tmp_path)
    assert get(path, tokenizer, tmp_path, vocab_size=500).fingerprint == first.fingerprint
    assert get(path, tokenizer, tmp_path, max_documents=2).fingerprint != first.fingerprint


def flip_last_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip_last_bit(entry / "tokens.bin"),
        lambda entry: flip_last_bit(entry / "targets.bin"),
        lambda entry: os.truncate(entry / "offsets.bin", 8),
        lambda entry: (entry / "targets.bin").unlink(),
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: os.truncate(entry / "meta.json", 20),
        lambda entry: (entry / "meta.json").write_text("[]"),
        lambda entry: (entry / "meta.json").write_text('{"files": {}}'),
    ],
)
def test_a_damaged_entry_is_built_again(damage, path, tokenizer, tmp_path, built, caplog):
    before = get(path, tokenizer, tmp_path)
    expected = [array.tolist() for array in (before.tokens, before.targets, before.offsets)]
    (entry,) = entries(tmp_path)
    damage(entry)
    with caplog.at_level(logging.WARNING):
        after = get(path, tokenizer, tmp_path)
    assert [array.tolist() for array in (after.tokens, after.targets, after.offsets)] == expected
    assert built == ["s", "s"]
    assert "it is built again" in caplog.text
    assert entries(tmp_path) == [entry]
    get(path, tokenizer, tmp_path)
    assert built == ["s", "s"]


def test_a_build_that_dies_leaves_nothing_under_the_final_name(path, tokenizer, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(cache._HashedFile, "close", dies)
        with pytest.raises(Killed):
            get(path, tokenizer, tmp_path)
    assert entries(tmp_path) == []
    assert get(path, tokenizer, tmp_path).num_documents == 3


def test_what_killed_processes_left_is_thrown_away_after_a_day(path, tokenizer, tmp_path):
    old, young = tmp_path / "cache/.old.tmp", tmp_path / "cache/.young.tmp"
    for directory in (old, young):
        directory.mkdir(parents=True)
        (directory / "tokens.bin").touch()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    get(path, tokenizer, tmp_path)
    assert not old.exists()
    assert young.exists()


def _build_together(barrier, path, tmp_path, make_tokenizer, results):
    tokenizer = make_tokenizer()
    write, waited = cache._publish, barrier.wait

    def publish_together(temporary, entry):
        waited(20)
        write(temporary, entry)

    cache._publish = publish_together
    found = get(path, tokenizer, tmp_path)
    results.put((found.fingerprint, found.tokens.tolist()))


def test_processes_that_build_one_entry_at_once_agree(path, tokenizer, make_tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (barrier, path, tmp_path, make_tokenizer, results)
    workers = [context.Process(target=_build_together, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    alone = get(path, tokenizer, tmp_path)
    assert all(item == (alone.fingerprint, alone.tokens.tolist()) for item in found)
    assert len(entries(tmp_path)) == 1


def test_skipped_rows_are_counted_and_told_again_on_a_hit(tokenizer, tmp_path, write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [*ROWS, b"{", {"text": ""}])
    assert get(path, tokenizer, tmp_path).skipped_rows == 2
    caplog.clear()
    assert get(path, tokenizer, tmp_path).skipped_rows == 2
    assert "source 's': 2 rows were skipped" in caplog.text


def test_progress_ends_with_the_totals_on_a_build_and_on_a_hit(path, tokenizer, tmp_path):
    class Recorder(Reporter):
        calls: ClassVar[list[tuple[str, int, int]]] = []

        def tokenising(self, *row):
            self.calls.append(row)

    for run in range(2):
        found = tokenize_source(
            Source(name="s", path=str(path)),
            tokenizer,
            vocab_size=400,
            cache_dir=tmp_path / "cache",
            report=Recorder(),
        )
        assert Recorder.calls == [("s", 3, found.num_tokens)] * (run + 1)


def test_what_is_told_on_the_way_is_told_as_such(path, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PROGRESS_SECONDS", -1.0)
    source = Source(name="s", path=str(path))
    tokenize_source(source, tokenizer, vocab_size=400, cache_dir=tmp_path / "cache", report=Reporter())
    lines = capsys.readouterr().err.splitlines()
    on_the_way, last = lines[:-1], lines[-1]
    assert len(on_the_way) == 3
    assert all(line.startswith("tokenising  s: ") and line.endswith(" tokens so far") for line in on_the_way)
    assert last.startswith("tokenised   s: 3 documents, ")


def test_a_tokenizer_larger_than_the_model_is_a_vocabulary_mismatch(path, tokenizer, tmp_path):
    size = len(tokenizer)
    with pytest.raises(
        UserError, match=f"^vocabulary mismatch: the tokenizer has {size} tokens, the model only {size - 1}"
    ):
        get(path, tokenizer, tmp_path, vocab_size=size - 1)


def test_errors_leave_no_entry(tokenizer, tmp_path, write_jsonl):
    bad_ids = write_jsonl("ids.jsonl", [{"input_ids": [1, 2]}, {"input_ids": [3, 999]}])
    with pytest.raises(UserError, match=r"ids\.jsonl:2: token id 999 is outside the model's vocabulary of 400"):
        get(bad_ids, tokenizer, tmp_path)
    with pytest.raises(
        UserError, match=r"holds no usable document: all 1 rows were skipped, the first: .*none\.jsonl:1: "
    ):
        get(write_jsonl("none.jsonl", [{"text": ""}]), tokenizer, tmp_path)
    assert entries(tmp_path) == []


def test_a_cache_that_cannot_be_written_fails_the_run_in_one_line(path, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(RunError, match=r"cache cannot be written: .*; free space or set data.cache_dir"):
        get(path, tokenizer, tmp_path)


def test_the_meta_file_says_what_is_in_the_entry(path, tokenizer, tmp_path):
    found = get(path, tokenizer, tmp_path)
    meta = json.loads((entries(tmp_path)[0] / "meta.json").read_text())
    assert meta["num_tokens"] == found.num_tokens
    assert meta["files"]["tokens"]["size"] == 4 * found.num_tokens
