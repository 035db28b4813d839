"""Directories that can be served and those that cannot."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from serving import config, running
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import swiftkv_models
from swiftkv_train.errors import UserError
from swiftkv_train.serve import load_model_and_tokenizer


@pytest.fixture
def checkpoint(random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    random_model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def refused(directory: Path, words: str, dtype: str = "auto") -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_model_and_tokenizer(directory, dtype)
    assert "\n" not in str(caught.value)


def test_base_model(checkpoint: Path, random_model: LlamaForCausalLM) -> None:
    model, tokenizer = load_model_and_tokenizer(checkpoint)
    assert not model.training
    assert torch.equal(model.lm_head.weight, random_model.lm_head.weight)
    assert tokenizer.chat_template
    assert load_model_and_tokenizer(checkpoint, "bfloat16")[0].dtype == torch.bfloat16


def test_swiftkv_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    student = swiftkv_models.rewrite(LlamaForCausalLM(config(len(tokenizer))), num_key_value_layers=1)
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # What an exported checkpoint says about its own code; it must not be needed here.
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling.Nothing"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, _ = load_model_and_tokenizer(tmp_path)
    assert isinstance(model, swiftkv_models.LlamaSwiftKVForCausalLM)


def test_incomplete_directories(checkpoint: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such directory; .*swiftkv fetch ORG/NAME --to DIR")
    refused(tmp_path, "no config.json")
    refused(checkpoint, "dtype 'int3'", dtype="int3")
    for name, words in (
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no safetensors weights"),
    ):
        part = tmp_path / name
        shutil.copytree(checkpoint, part)
        (part / name).unlink()
        refused(part, words)


def test_absent_weights_are_not_made_up(checkpoint: Path) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    settings["num_hidden_layers"] = 3
    (checkpoint / "config.json").write_text(json.dumps(settings))
    refused(checkpoint, "missing keys, the first is model.layers.2")


def test_broken_files(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"nonsense")
    refused(checkpoint, "model.safetensors is damaged")
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, "config")


def test_a_tokenizer_with_more_tokens_than_the_model(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<one more>"])
    larger.save_pretrained(checkpoint)
    refused(checkpoint, rf"vocabulary mismatch in .*checkpoint: the tokenizer has {len(tokenizer) + 1} tokens")


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"top_k": -1}', '{"eos_token_id": 99999}'])
def test_odd_settings_for_generation(checkpoint: Path, text: str) -> None:
    (checkpoint / "generation_config.json").write_text(text)
    refused(checkpoint, r"checkpoint/generation_config\.json")


def test_what_generate_cannot_do_here_is_left_out(checkpoint: Path) -> None:
    odd = {"num_beams": 4, "stop_strings": ["a"], "max_time": 1e-6, "dola_layers": "low", "top_k": 7, "min_p": 0.5}
    (checkpoint / "generation_config.json").write_text(json.dumps(odd))
    model, tokenizer = load_model_and_tokenizer(checkpoint)
    assert (model.generation_config.top_k, model.generation_config.min_p) == (7, 0.5)
    with running(model, tokenizer) as it:
        for temperature in (0, 1):
            answer = it.post(
                {"prompt": "hi", "max_tokens": 5, "temperature": temperature, "seed": 1}, "/v1/completions"
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 5


def test_a_model_without_a_chat_template_completes_and_says_so(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with running(*load_model_and_tokenizer(checkpoint)) as it:
        assert it.post({"prompt": "hi", "max_tokens": 1}, "/v1/completions").status_code == 200
        error = it.post({"messages": [{"role": "user", "content": "hi"}]})
        assert (error.status_code, error.json()["error"]["code"]) == (400, "no_chat_template")
        assert "/v1/completions" in error.json()["error"]["message"]


def test_do_sample_false_makes_greedy_the_default(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    with running(*load_model_and_tokenizer(checkpoint)) as it:

        def text(**sampling: float) -> str:
            answer = it.post({"prompt": "hi", "max_tokens": 20, "seed": 1, **sampling}, "/v1/completions")
            return answer.json()["choices"][0]["text"]

        assert text() == text(temperature=0) == text(seed=2) != text(temperature=1)


def test_foreign_code_does_not_run(checkpoint: Path) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    settings["model_type"] = "their_own"
    settings["auto_map"] = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    (checkpoint / "config.json").write_text(json.dumps(settings))
    (checkpoint / "theirs.py").write_text("raise SystemExit('ran')")
    refused(checkpoint, "cannot be read")


@pytest.mark.parametrize("missing", ["fastapi", "sse_starlette", "uvicorn"])
def test_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftkv_train.serve import run_server

    for module in ("swiftkv_train.serve.app", "swiftkv_train.serve.draining"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing}: pip install 'swiftkv-train\[serve\]'"):
        run_server("anywhere", port=0)
