"""The model made on the spot: whole, always the same, and with text that its tokenizer was made for."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftkv_train.errors import UserError
from swiftkv_train.fetch import fetch
from swiftkv_train.fetch.local import check_model


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "fetch.json"}


def test_model_and_data_are_whole_and_always_the_same(tmp_path):
    said = []
    for name in ("one", "two"):
        torch.rand(3)  # the seed of the caller plays no part
        fetch("debug", tmp_path / name / "model", data_dir=tmp_path / name / "data", report=said.append)
    for kind in ("model", "data"):
        assert files(tmp_path / "one" / kind) == files(tmp_path / "two" / kind)
    model = tmp_path / "one/model"
    assert "model.safetensors" in check_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) <= AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    data = tmp_path / "one/data"
    text = json.loads((data / "prose.train.jsonl").read_text().splitlines()[0])["text"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) < len(text) / 2
    for line in (data / "chats.held_out.jsonl").read_text().splitlines():
        roles = [message["role"] for message in json.loads(line)["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    trained = (data / "prose.train.jsonl").read_text().splitlines()
    assert not set(trained) & set((data / "prose.held_out.jsonl").read_text().splitlines())


def test_what_is_there_is_left_alone(tmp_path):
    fetch("debug", tmp_path / "model", data_dir=None, report=lambda text: None)
    said = []
    fetch("debug", tmp_path / "model", data_dir=None, report=said.append)
    assert said == [f"{tmp_path / 'model'} is already there"]
    with pytest.raises(UserError, match="already holds debug"):
        fetch("debug", tmp_path / "other", data_dir=tmp_path / "model", report=said.append)
    assert not (tmp_path / "other").exists()
