import errno
import json
import os
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tiny_gguf import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftkv_train.errors import UserError
from swiftkv_train.fetch import fetch, gguf_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    gguf_model.convert_gguf(write_gguf(directory / "m.gguf", tiny_llama()), directory, dtype="float32")
    (directory / "m.gguf").unlink()
    return directory


@pytest.fixture
def model(pristine, tmp_path):
    """A model directory with files beside it that are not part of the model."""
    directory = tmp_path / "model"
    shutil.copytree(pristine, directory)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    (directory / "notes.txt").write_text("private")
    return directory


def quiet(_):
    pass


def same_model(directory):
    original = tiny_llama().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return all(torch.equal(loaded[name], original[name]) for name in original)


def shard(directory, sizes=2):
    """Split model.safetensors as transformers does: shards and an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in range(sizes):
        filename = f"model-{part + 1:05}-of-{sizes:05}.safetensors"
        mine = {name: tensor for index, (name, tensor) in enumerate(weights.items()) if index % sizes == part}
        save_file(mine, directory / filename)
        weight_map |= dict.fromkeys(mine, filename)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_local_directory(model, tmp_path):
    said = []
    assert fetch(str(model), tmp_path / "out", report=said.append) == tmp_path / "out"
    assert same_model(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"pytorch_model.bin", "modeling_evil.py", "notes.txt"})
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    fetch(str(model), tmp_path / "out", report=said.append)
    assert "already there" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_edited_copy_does_not_change_the_source(model, tmp_path):
    fetch(str(model), tmp_path / "out", report=quiet)
    before = (model / "config.json").read_text()
    (tmp_path / "out/config.json").write_text("{}")
    assert (model / "config.json").read_text() == before


def test_weights_are_copied_where_they_cannot_be_linked(model, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    fetch(str(model), tmp_path / "out", report=quiet)
    assert same_model(tmp_path / "out")


def test_a_source_that_changed_is_not_already_there(model, tmp_path):
    fetch(str(model), tmp_path / "out", report=quiet)
    (model / "generation_config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(UserError, match="already holds"):
        fetch(str(model), tmp_path / "out", report=quiet)


def test_sharded_directory(model, tmp_path):
    shard(model)
    fetch(str(model), tmp_path / "out", report=quiet)
    assert same_model(tmp_path / "out")


def drop_config(model):
    (model / "config.json").unlink()


def break_config(model):
    (model / "config.json").write_text("{")


def edit_config(**changes):
    def edit(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def write(name, text):
    return lambda model: (model / name).write_text(text)


def drop_tokenizer(model):
    (model / "tokenizer.json").unlink()


def more_tokens(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(model)


def broken_link(name):
    def edit(model):
        (model / name).unlink()
        (model / name).symlink_to("nowhere")

    return edit


def cut_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def cut_header(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def only_pickle(model):
    (model / "model.safetensors").unlink()


def lose_shard(model):
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def cut_shard(model):
    shard(model)
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def misplace_tensor(model):
    shard(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = {
        "model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors",
        "model-00002-of-00002.safetensors": "model-00001-of-00002.safetensors",
    }[index["weight_map"]["model.norm.weight"]]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def escape(model):
    shard(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_weights(change):
    def edit(model):
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_config, r"config\.json cannot be read"),
        (break_config, r"config\.json is not JSON"),
        (write("config.json", "[]"), r"config\.json holds no keys"),
        (write("config.json", "[" * 5000), r"config\.json is not JSON"),
        (edit_config(model_type=["llama"]), r"model_type is .*llama.*; known families"),
        (edit_config(num_hidden_layers=10**9), "says 1000000000 layers; there are 20 weights"),
        (edit_config(hidden_size=-64), r"config\.json describes no model: .*-64"),
        (edit_config(num_key_value_heads=0), r"config\.json describes no model"),
        (edit_config(model_type="gpt2"), "model_type is 'gpt2'"),
        (edit_config(model_type="llama_swiftkv"), "already in SwiftKV form"),
        (edit_config(quantization_config={"quant_method": "gptq"}), "quantised"),
        (edit_config(intermediate_size=128), "has shape"),
        (edit_config(num_hidden_layers=3), r"lacks 9 weights"),
        (edit_config(num_hidden_layers=1), "does not have"),
        (edit_config(tie_word_embeddings=False), r"lm_head\.weight"),
        (cut_weights, "cut short"),
        (cut_header, "cut short"),
        (only_pickle, "only safetensors"),
        (lose_shard, "has no model-00002-of-00002"),
        (cut_shard, "model-00002-of-00002.safetensors is damaged"),
        (misplace_tensor, "lacks model.norm.weight"),
        (escape, "points outside"),
        (write("model.safetensors.index.json", "[]"), r"index\.json holds no keys"),
        (write("model.safetensors.index.json", '{"weight_map": []}'), r"index\.json is damaged, its weight_map"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": 1}}'), r"index\.json is damaged, its weight_map"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}'), r"index\.json is damaged"),
        (drop_tokenizer, r"has no tokenizer\.json; put the tokenizer's files beside"),
        (write("tokenizer.json", "{"), "model: tokenizer cannot be read"),
        (write("tokenizer_config.json", "[]"), "model: tokenizer cannot be read"),
        (more_tokens, r"vocabulary mismatch in .*model: the tokenizer has 270 tokens, the model only 269"),
        (broken_link("tokenizer.json"), r"tokenizer\.json is not a file, or a link to nothing"),
        (broken_link("chat_template.jinja"), r"chat_template\.jinja is not a file, or a link to nothing"),
        (write("chat_template.jinja", "{{ 1 }}\n{% if %}"), r"line 2 of its chat template is no template: Expected"),
        (write("generation_config.json", "{"), r"generation_config\.json is not JSON"),
        (write("generation_config.json", '{"top_p": 2}'), r"generation_config\.json: top_p is 2"),
        (edit_weights(lambda weights: weights.pop("model.norm.weight")), r"lacks 1 weights.*model\.norm\.weight"),
        (edit_weights(lambda weights: weights.update(stray=torch.zeros(1))), "does not have, among them stray"),
    ],
)
def test_a_bad_directory_is_refused_in_one_line(model, tmp_path, damage, message):
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        fetch(str(model), tmp_path / "out", report=quiet)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_template_that_refuses_some_conversations_is_one(model, tmp_path):
    write("chat_template.jinja", "{{ raise_exception('only tools') }}")(model)
    fetch(str(model), tmp_path / "out", report=quiet)


def test_old_checkpoints_may_hold_rotary_frequencies(model, tmp_path):
    edit_weights(lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))(model)
    fetch(str(model), tmp_path / "out", report=quiet)


def test_users_files_are_never_overwritten(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds files"):
        fetch(str(model), tmp_path / "out", report=quiet)
    with pytest.raises(UserError, match="already holds files"):
        fetch(str(model), model, report=quiet)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_gguf_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    said = []
    fetch(str(path), tmp_path / "out", report=said.append)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in tiny_llama().state_dict().items())
    fetch(str(path), tmp_path / "out", report=said.append)
    assert "already there" in said[-1]
    write_gguf(path, tiny_llama(), "Q8_0")
    with pytest.raises(UserError, match="already holds"):
        fetch(str(path), tmp_path / "out", report=said.append)


def test_gguf_interrupted(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_model, "save_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(str(path), tmp_path / "out", report=quiet)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_hub_id(model, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    said = []
    fetch("someone/tiny-llama", tmp_path / "out", revision="v1", report=said.append)
    assert same_model(tmp_path / "out")
    (repo_id, options) = asked[0]
    assert (repo_id, options["revision"]) == ("someone/tiny-llama", "v1")
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    wanted += ["chat_template.jinja", "tokenizer.model"]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "optimizer.pt", "onnx/config.json"]
    unwanted += ["modeling_llama.py", "consolidated.safetensors", "x.gguf"]
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects([*wanted, *unwanted], **patterns)) == wanted
    fetch("someone/tiny-llama", tmp_path / "out", revision="v1", report=said.append)
    assert "already there" in said[-1]
    assert len(asked) == 1
    with pytest.raises(UserError, match=r"someone/tiny-llama \(v1\), not someone/tiny-llama \(main\)"):
        fetch("someone/tiny-llama", tmp_path / "out", report=said.append)


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "http://localhost/x"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404\nlong", response=response(404)), "neither a local directory nor"),
        (errors.GatedRepoError("403\nlong", response=response(403)), "is gated: accept"),
        (errors.RevisionNotFoundError("404\nlong", response=response(404)), "has no revision v1"),
        (errors.LocalEntryNotFoundError("not cached\nlong"), "not in the local cache"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError("500 Server Error\nlong", response=response(500)), "refused .*: 500 Server Error"),
        (httpx.ConnectError("name resolution failed"), "cannot be reached"),
        (httpx.ReadTimeout("too slow"), "cannot be reached"),
        (ConnectionResetError("reset"), "cannot be reached"),
    ],
)
def test_hub_errors_name_the_model_and_what_to_do(tmp_path, monkeypatch, error, message):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=message) as caught:
        fetch("someone/model", tmp_path / "out", revision="v1", report=quiet)
    assert "someone/model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_of_another_family_is_refused(model, tmp_path, monkeypatch):
    edit_config(model_type="gpt2")(model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model))
    with pytest.raises(UserError, match="'gpt2'"):
        fetch("someone/model", tmp_path / "out", report=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["./missing", "/nowhere/at/all", "smollm3", "a/b/c"])
def test_an_unknown_source_is_refused(tmp_path, source):
    with pytest.raises(UserError, match="smollm2-135m, debug, a model directory"):
        fetch(source, tmp_path / "out", report=quiet)


def test_a_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        fetch("some/where.gguf", tmp_path / "out", report=quiet)


def test_a_home_that_does_not_exist_is_refused(model, tmp_path):
    for arguments in (("~nosuchuser/m", tmp_path / "out"), (str(model), Path("~nosuchuser/out"))):
        with pytest.raises(UserError, match=r"~nosuchuser/[a-z]*: there is no such user"):
            fetch(*arguments, report=quiet)


def test_model_and_data_need_a_directory_each(tmp_path):
    with pytest.raises(UserError, match="cannot hold both the model and the data"):
        fetch("debug", tmp_path / "out", data_dir=tmp_path / "out", report=quiet)
    assert not (tmp_path / "out").exists()


def test_a_revision_needs_a_hub_id(model, tmp_path):
    with pytest.raises(UserError, match="goes with a hub id"):
        fetch(str(model), tmp_path / "out", revision="v1", report=quiet)
