"""Models that are damaged or odd: found when they are loaded, in one line that names the file and what is wrong."""

import builtins
import errno
import io
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from swiftkv_kernels import backends
from swiftkv_models import cpu
from swiftkv_train import loading
from swiftkv_train.data.tokenize import check_vocabulary
from swiftkv_train.errors import UserError
from swiftkv_train.loading import (
    compute_dtype,
    describe_dtype,
    load_config,
    load_for_inference,
    load_model,
    load_tokenizer,
)

WEIGHT = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def model(debug_files, tmp_path):
    return shutil.copytree(debug_files / "models/debug", tmp_path / "model")


def refused(directory, message, load=load_model):
    with pytest.raises(UserError, match=message) as caught:
        load(str(directory))
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_named(model, value, dtype):
    weights = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(model / "model.safetensors").items()
    }
    weights["model.norm.weight"][0] = torch.finfo(getattr(torch, dtype)).max  # still a number
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load_model(str(model), dtype=dtype)
    weights[WEIGHT][-1, -1] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, rf"{WEIGHT} holds nan or infinity \(as {dtype}\)", partial(load_model, dtype=dtype))


def test_numbers_too_large_for_the_dtype_are_named(model):
    weights = load_file(model / "model.safetensors")
    weights[WEIGHT][0, 0] = 1e20
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load_model(str(model))
    with pytest.raises(UserError, match=rf"{WEIGHT} holds nan or infinity \(as float16\)"):
        load_model(str(model), dtype="float16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON"),
        ("\xff", r"is not JSON"),
        ("[]", "holds no keys"),
        ("null", "holds no keys"),
        ('{"temperature": "hot"}', "temperature is 'hot'; it must be a number, 0 or more"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"top_k": -1}', "top_k is -1; it must be a whole number"),
        ('{"top_p": 2}', "top_p is 2"),
        ('{"repetition_penalty": 0}', "repetition_penalty is 0"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x'; it must be token ids"),
        ('{"eos_token_id": [2, 512]}', r"eos_token_id 512 is no token of this model \(0 to 511\)"),
        ('{"pad_token_id": true}', "pad_token_id is True"),
        ('{"num_return_sequences": 3}', ".*num_return_sequences"),
    ],
)
def test_settings_for_generation_that_make_no_sense(model, text, message):
    (model / "generation_config.json").write_bytes(text.encode("latin-1"))
    refused(model, rf"generation_config\.json\b.* {message}")


def test_of_the_settings_for_generation_only_sampling_is_left_for_inference(model, capsys):
    sampling = {"eos_token_id": [2, 1], "temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.1, "do_sample": True}
    others = {"max_time": 0.001, "stop_strings": ["a"], "num_beams": 4, "dola_layers": "low", "bad_words_ids": [[9999]]}
    callers = {"max_length": 4096, "use_cache": False, "cache_implementation": "static", "output_scores": True}
    (model / "generation_config.json").write_text(json.dumps({**sampling, **others, **callers, "num_beam_groups": 1}))
    loaded = load_for_inference(str(model))
    left = {key: value for key, value in loaded.generation_config.to_dict().items() if value is not None}
    assert left.pop("transformers_version")
    assert left == sampling
    note = "generation_config.json is not used: bad_words_ids, dola_layers, max_time, num_beams, stop_strings\n"
    assert capsys.readouterr().err.endswith(note)
    output = loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 5)
    assert load_model(str(model)).generation_config.max_length == 4096  # what is exported again is not touched


def test_a_directory_has_no_revision(model):
    with pytest.raises(UserError, match="is a directory, which has no revision v2; that goes with a hub id"):
        load_model(str(model), revision="v2")


@pytest.fixture
def stored_in_bf16(model):
    load_model(str(model)).to(torch.bfloat16).save_pretrained(model)
    return str(model)


@pytest.mark.parametrize("native", [True, False])
def test_the_compute_dtype_of_a_recipe(monkeypatch, native):
    monkeypatch.setattr(backends, "multiplies_natively", lambda dtype, device: native or dtype == torch.float32)
    assert compute_dtype("auto") == (torch.bfloat16 if native else torch.float32)
    assert compute_dtype("bfloat16") == torch.bfloat16  # who asks for it gets it
    assert ("several times slower" in describe_dtype("bfloat16", torch.bfloat16)) is not native
    assert describe_dtype("float32", torch.float32) == "float32"


def test_16_bits_become_32_for_inference_where_there_are_no_such_products(stored_in_bf16, monkeypatch, capsys):
    tokens = torch.tensor([[5, 6, 7]])
    expected = load_model(stored_in_bf16).float()(tokens).logits

    def no_16_bits(dtype, device):
        return dtype == torch.float32

    for module in (backends, cpu):
        monkeypatch.setattr(module, "multiplies_natively", no_16_bits)
    loaded = load_for_inference(stored_in_bf16)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)  # but for the order of sums
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(loading, "_room_for_float32", lambda model, device: False)
    assert load_for_inference(stored_in_bf16).dtype == torch.bfloat16


def test_16_bits_stay_where_there_are_such_products_or_they_are_asked_for(stored_in_bf16, monkeypatch):
    monkeypatch.setattr(backends, "multiplies_natively", lambda dtype, device: True)
    assert load_for_inference(stored_in_bf16).dtype == torch.bfloat16
    monkeypatch.setattr(backends, "multiplies_natively", lambda dtype, device: False)
    assert load_for_inference(stored_in_bf16, dtype="bfloat16").dtype == torch.bfloat16


def test_room_for_float32(monkeypatch):
    model = torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)  # 2 MiB that become 4
    for free, enough in ((3 * 2**20, True), (2 * 2**20, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert loading._room_for_float32(model, torch.device("cpu")) is enough
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (2 * free, 10**12))
        assert loading._room_for_float32(model, torch.device("cuda")) is enough


def test_without_settings_for_generation(model, capsys):
    (model / "generation_config.json").unlink()
    assert load_for_inference(str(model)).generation_config.eos_token_id == 2  # config.json's
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", r"config\.json holds no keys"),
        ("config.json", "[" * 5000, r"config\.json is not JSON"),
        ("config.json", '{"model_type": ["llama"]}', "config cannot be read"),
        ("model.safetensors.index.json", "[]", r"index\.json holds no keys"),
        ("model.safetensors.index.json", "[" * 5000, r"index\.json is not JSON"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {}}',
            r"index\.json is damaged, its weight_map names no files",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', r"index\.json is damaged"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}', r"index\.json is damaged"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}', r"index\.json points outside"),
    ],
)
def test_files_that_are_damaged(model, name, text, message):
    (model / name).write_text(text)
    refused(model, message)


def test_far_more_layers_than_tensors_are_refused_at_once(model):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 10**9}))
    refused(model, r"config\.json says 1000000000 layers; there are 56 tensors")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_config),
        ("generation_config.json", load_model),
        ("model.safetensors", load_model),
        ("tokenizer_config.json", load_tokenizer),
        ("chat_template.jinja", load_tokenizer),
    ],
)
def test_files_that_may_not_be_read(model, name, load, monkeypatch):
    def guarded(real):
        def opened(file, *arguments, **options):
            if str(file) == str(model / name):  # root is never refused by the system
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return real(file, *arguments, **options)

        return opened

    monkeypatch.setattr(builtins, "open", guarded(builtins.open))
    monkeypatch.setattr(io, "open", guarded(io.open))
    refused(model, "Permission denied", load)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(path):
    with pytest.raises(UserError, match=r"cannot be read: File name too long|does not exist"):
        load_model(path)


def test_a_directory_that_may_not_be_entered(model, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr("pathlib.Path.is_file", refuse)
    refused(model, "cannot be read: Permission denied")


def test_ids_beyond_the_vocabulary_are_counted_though_others_are_absent(model):
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 700, "content": "<far away>"})
    file.write_text(json.dumps(content))
    content["model"]["vocab"]["<far away>"] = 700
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) < 512
    with pytest.raises(
        UserError, match="vocabulary mismatch in here: the tokenizer has 701 tokens, the model only 512"
    ):
        check_vocabulary(tokenizer, 512, "here")
