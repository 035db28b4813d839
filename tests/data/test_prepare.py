"""`swiftkv prepare`: all of a recipe's text into the cache, so that what comes after reads none of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from debug_recipe import write_recipe
from swiftkv_train.cli import main
from swiftkv_train.data import load_training_data
from swiftkv_train.data.prepare import prepare
from swiftkv_train.errors import UserError
from swiftkv_train.loading import load_tokenizer
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import load_recipe
from tiny import tiny_llama

ROWS = {
    "prose.train": [{"text": f"The dog number {i} is lazy and quick."} for i in range(40)],
    "chats.train": [{"prompt": f"What is {i}?", "response": "I do not know."} for i in range(20)],
    "prose.held_out": [{"text": "Ask me again in the morning, please."}, b"{"],
    "prose.test": [{"text": "No."}] * 3,
}


@pytest.fixture
def recipe(tmp_path, monkeypatch, write_jsonl, make_tokenizer) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=400, dtype=torch.float32).save_pretrained("models/debug")
    make_tokenizer().save_pretrained("models/debug")
    Path("text").mkdir()
    for name, rows in ROWS.items():
        write_jsonl(f"text/{name}.jsonl", rows)
    sources = {kind: [] for kind in ("train", "held_out", "test")}
    for name in ROWS:
        source, kind = name.split(".")
        sources[kind].append({"name": source, "path": f"text/{name}.jsonl"})
    return write_recipe(tmp_path / "recipe.yaml", {f"data.{kind}": rows for kind, rows in sources.items()})


def load(recipe: Recipe):
    return load_training_data(recipe.data, load_tokenizer(recipe.model.base), 400, 2)


def test_sequences_longer_than_the_context_are_refused(recipe):
    with pytest.raises(UserError, match="sequence_length 3000000 is longer than the context of models/debug"):
        prepare(load_recipe(recipe, ["data.sequence_length=3000000"]))


def test_every_source_is_in_the_cache_and_no_weight_was_read(recipe):
    Path("models/debug/model.safetensors").unlink()
    settings = load_recipe(recipe)
    found = prepare(settings, quiet=True)
    assert found["cache_dir"] == "outputs/token-cache"
    counts = {
        f"{row['name']}.{kind}": (row["documents"], row["skipped_rows"])
        for kind in ("train", "held_out", "test")
        for row in found[kind]
    }
    assert counts == {"prose.train": (40, 0), "chats.train": (20, 0), "prose.held_out": (1, 1), "prose.test": (3, 0)}
    assert found["train"] == load(settings).describe()


def test_elsewhere_the_cache_alone_is_enough(recipe, tmp_path, monkeypatch):
    expected = load(load_recipe(recipe)).batch(0, 16).input_ids
    shutil.rmtree("outputs")
    prepare(load_recipe(recipe), quiet=True)
    elsewhere = tmp_path / "gpu"
    for name in ("models", "outputs"):
        shutil.copytree(tmp_path / name, elsewhere / name)
    monkeypatch.chdir(elsewhere)
    assert torch.equal(load(load_recipe(recipe)).batch(0, 16).input_ids, expected)
    settings = load_recipe(recipe, ["data.cache_dir=nowhere"])
    with pytest.raises(Exception, match=r"text/prose\.train\.jsonl does not exist"):
        load(settings)


def test_the_command_says_what_it_did(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swiftkv", "prepare", str(recipe), "data.cache_dir=kept", "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["cache_dir"] == "kept"
    assert [row["share"] for row in result["train"]] == [0.5, 0.5]
    assert 0.5 < result["train"][0]["packing_efficiency"] <= 1
    lines = err.splitlines()
    assert sum(line.startswith("tokenised   ") for line in lines) == 4
    efficiency = result["train"][0]["packing_efficiency"]
    assert any(
        line.startswith("data        prose: 40 documents") and f"{efficiency:.1%} packed" in line for line in lines
    )
    assert lines[-1] == "cached      kept"
