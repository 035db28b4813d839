"""From a recipe's data section to the stream, and no evaluating on training data."""

from __future__ import annotations

import os
import subprocess
import sys

import datasets
import pytest
import torch

from swiftkv_train.data import identity, load_held_out, load_training_data
from swiftkv_train.errors import UserError
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import DataSection, Source


@pytest.fixture
def section(write_jsonl, tmp_path):
    def make(held_out: list[Source] | None = None, train: list[Source] | None = None, **options) -> DataSection:
        prose = write_jsonl("prose.jsonl", [{"text": f"The dog number {i} is lazy and quick."} for i in range(30)])
        chats = write_jsonl(
            "chats.jsonl", [{"prompt": f"What is {i}?", "response": "I do not know."} for i in range(20)]
        )
        own = [Source(name="prose", path=str(prose)), Source(name="chats", path=str(chats), weight=3.0)]
        return DataSection(
            sequence_length=64,
            train=train or own,
            held_out=held_out or [],
            cache_dir=str(tmp_path / "cache"),
            **options,
        )

    return make


def test_a_recipe_becomes_a_stream(section, tokenizer, capsys):
    data = load_training_data(section(), tokenizer, 400, 2, report=Reporter())
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in told] == ["tokenised   prose", "tokenised   chats"]
    assert [row["share"] for row in data.describe()] == [0.25, 0.75]
    batch = data.batch(0, 8)
    assert batch.source_ids.bincount().tolist() == [2, 6]
    replies = batch.input_ids[:, 1:][batch.loss_mask[:, :-1] & (batch.source_ids == 1)[:, None]]
    assert set(tokenizer.decode(replies).split("<|im_end|>")) == {"I do not know.", ""}
    again = load_training_data(section(), tokenizer, 400, 2)
    assert torch.equal(again.batch(5, 3).input_ids, data.batch(5, 3).input_ids)
    another = load_training_data(section(seed=1), tokenizer, 400, 2)
    assert not torch.equal(another.batch(0, 8).input_ids, batch.input_ids)


def test_held_out_sources_in_the_recipes_order(section, tokenizer, write_jsonl):
    paths = [write_jsonl(f"{name}.jsonl", [{"text": name}]) for name in ("z", "a")]
    found = load_held_out(section([Source(name=path.stem, path=str(path)) for path in paths]), tokenizer, 400)
    assert [(source.name, tokenizer.decode(source.tokens)) for source in found] == [("z", "z"), ("a", "a")]
    assert load_held_out(section(), tokenizer, 400) == []


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_a_held_out_file_that_is_trained_on_is_refused(link, section, tokenizer, tmp_path):
    section()  # writes the files
    path = tmp_path / "prose.jsonl"
    if link is not None:
        path = tmp_path / "elsewhere.jsonl"
        link(tmp_path / "prose.jsonl", path)
    recipe = section([Source(name="test", path=str(path.parent / "." / path.name))])
    for load in (lambda: load_training_data(recipe, tokenizer, 400, 2), lambda: load_held_out(recipe, tokenizer, 400)):
        with pytest.raises(
            UserError, match=rf"^held-out source 'test' reads file .*{path.name}, which train source 'prose'"
        ):
            load()


def test_a_held_out_glob_that_touches_a_training_file_is_refused(section, tokenizer, tmp_path):
    with pytest.raises(UserError, match="which train source 'chats' trains on; evaluating on training data"):
        load_held_out(section([Source(name="test", path=str(tmp_path / "cha*.jsonl"))]), tokenizer, 400)


def test_a_held_out_split_that_is_trained_on_is_refused(section, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: datasets.Dataset.from_list([{"text": split}]))
    monkeypatch.setattr(identity, "dataset_revision", lambda source: [source.dataset, source.split])
    train = [Source(name="hub", dataset="org/set", split="train")]
    with pytest.raises(UserError, match="reads split 'train' of dataset org/set, which train source 'hub'"):
        load_held_out(section([Source(name="test", dataset="org/set")], train), tokenizer, 400)
    (held_out,) = load_held_out(section([Source(name="test", dataset="org/set", split="test")], train), tokenizer, 400)
    assert tokenizer.decode(held_out.tokens) == "test"


def test_a_vocabulary_mismatch_is_found_before_anything_is_read(section, tokenizer):
    recipe = section(train=[Source(name="gone", path="nowhere.jsonl")])
    with pytest.raises(UserError, match=r"^vocabulary mismatch"):
        load_training_data(recipe, tokenizer, 10, 2)


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, swiftkv_train.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
