"""A user's mistakes, through the command: status 2 and one line that names the file, key or value and what to do."""

import errno
import importlib.util
import json
import os
import resource
import shutil

import pytest
import torch
from commanding import run_process
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from debug_recipe import write_recipe
from swiftkv_train.fetch.debug import debug_tokenizer


@pytest.fixture
def distil(workplace, command):
    """Distil with keys of the recipe changed; nothing may be left where the run would have been."""

    def run(*overrides, **changes):
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return command("distill", write_recipe(workplace / "recipe.yaml", dotted), *overrides)

    return run


@pytest.fixture
def model_copy(project, workplace):
    """A copy of the base that a test may spoil, as `spoilt` in the workplace."""
    return shutil.copytree(project.base, workplace / "spoilt")


def change_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# The recipe


def test_an_unknown_key(distil):
    assert (
        distil(training__stesp=3).error().endswith("recipe.yaml: unknown key 'training.stesp'; did you mean 'steps'?")
    )
    assert distil(data__train__0__pth="x").error().endswith("unknown key 'data.train.0.pth'; did you mean 'path'?")


def test_a_wrong_type_and_a_number_out_of_range(distil):
    assert "training.steps: Input should be a valid integer (found 'many')" in distil(training__steps="many").error()
    assert "training.batch_size: Input should be greater than" in distil(training__batch_size=-4).error()
    assert "loss.temperature: Input should be a finite number" in distil(loss__temperature=float("inf")).error()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.yaml", None, "recipe absent.yaml does not exist"),
        ("models", None, "recipe models cannot be read: "),
        ("binary.yaml", bytes(range(256)), "recipe binary.yaml cannot be read: "),
        ("control.yaml", b"\x00\x01", "recipe control.yaml is not YAML: "),
        ("text.yaml", b"hello", "recipe text.yaml must hold a mapping"),
        ("twice.yaml", b"loss: {}\nloss: {}\n", "recipe twice.yaml is not YAML: key 'loss' is given twice"),
    ],
)
def test_what_is_no_recipe(workplace, command, name, content, says):
    if content is not None:
        (workplace / name).write_bytes(content)
    assert command("distill", name).error().startswith(f"error: {says}")


def test_in_a_process_of_its_own_it_is_the_same(workplace):
    recipe = write_recipe(workplace / "recipe.yaml", {"model.base": "models/absent"})
    result = run_process("distill", recipe, cwd=workplace)
    assert result.error() == "error: model models/absent does not exist; `swiftkv fetch` gets one"
    assert result.out == ""
    assert run_process("distill", "absent.yaml", cwd=workplace).err == "error: recipe absent.yaml does not exist\n"


# The model


@pytest.mark.parametrize("first", [0, 7, -1])
def test_a_number_of_layers_out_of_range(distil, first):
    says = f"error: rewrite: num_key_value_layers is {first}; this model allows 1 to 6"
    assert distil(rewrite__num_key_value_layers=first).error() == says


def test_a_rewrite_that_leaves_nothing_to_train(distil):
    assert "num_key_value_layers" in distil(rewrite__num_key_value_layers=6).error()


def test_a_group_larger_than_the_tail(distil):
    assert "key_value_group_size is 4; this model allows 1 to 3" in distil(rewrite__key_value_group_size=4).error()


def test_another_family(distil, workplace):
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=512)).save_pretrained(workplace / "gpt2")
    assert distil(model__base="gpt2").error() == "error: model gpt2 is of family 'gpt2'; this command takes llama"


def test_a_checkpoint_for_a_base_and_the_reverse(project, distil, command):
    base, checkpoint, run = project.base, project.checkpoint, project.run
    assert "is of family 'llama_swiftkv'; this command takes llama" in distil(model__base=str(checkpoint)).error()
    evaluate = ["--report", "r", "--tokens", "64"]
    for wrong in (["evaluate", checkpoint, "--base", checkpoint], ["evaluate", base, "--base", base]):
        assert "is of family" in command(*wrong, *evaluate).error()
    assert "holds no config.json" in command("evaluate", run, "--base", base, *evaluate).error()
    assert "holds no config.json" in command("chat", run, "--prompt", "x").error()
    assert "is not a run directory" in command("export", checkpoint, "--to", "c").error()


SPOILERS = {
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config cut short": (lambda d: (d / "config.json").write_text("{"), "spoilt/config.json is not JSON"),
    "config without type": (lambda d: (d / "config.json").write_text("{}"), "config cannot be read"),
    "odd heads": (lambda d: change_config(d, num_attention_heads=5), "not a multiple of the number of attention heads"),
    "text for a number": (lambda d: change_config(d, num_attention_heads="four"), "'num_attention_heads'"),
    "other width": (
        lambda d: change_config(d, intermediate_size=99),
        "18 mismatched keys, the first is model.layers.0",
    ),
    "more layers": (lambda d: change_config(d, num_hidden_layers=7), "9 missing keys, the first is model.layers.6"),
    "fewer layers": (lambda d: change_config(d, num_hidden_layers=5), "9 unexpected keys, the first is model.layers.5"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no safetensors weights"),
    "pickled weights": (
        lambda d: torch.save({}, (d / "model.safetensors").rename(d / "pytorch_model.bin")),
        "holds no safetensors weights",
    ),
    "weights cut short": (
        lambda d: os.truncate(d / "model.safetensors", 100_000),
        "spoilt/model.safetensors is damaged (",
    ),
    "empty weights": (lambda d: os.truncate(d / "model.safetensors", 0), "spoilt/model.safetensors is damaged ("),
    "no tokenizer": (lambda d: [file.unlink() for file in d.glob("tokenizer*")], "tokenizer cannot be read"),
    "tokenizer cut short": (lambda d: os.truncate(d / "tokenizer.json", 1000), "tokenizer cannot be read"),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), "the tokenizer has no chat template"),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_spoilt_model(model_copy, distil, spoiler):
    spoil, says = SPOILERS[spoiler]
    spoil(model_copy)
    assert says in distil(model__base="spoilt").error()


def test_a_missing_shard(model_copy, distil):
    model = AutoModelForCausalLM.from_pretrained(model_copy)
    (model_copy / "model.safetensors").unlink()
    model.save_pretrained(model_copy, max_shard_size="300KB")
    sorted(model_copy.glob("*.safetensors"))[1].unlink()
    assert "spoilt/model-00002-of-" in distil(model__base="spoilt").error()
    (model_copy / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is damaged" in distil(model__base="spoilt").error()


def test_a_tokenizer_larger_than_the_model(model_copy, distil):
    tokenizer = debug_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(300)])
    tokenizer.save_pretrained(model_copy)
    error = distil(model__base="spoilt").error()
    assert error.startswith("error: vocabulary mismatch: the tokenizer has ")
    assert "the model only 512" in error


def test_float16_without_a_gpu_and_an_absent_attention(distil):
    if not torch.cuda.is_available():
        assert "float16 trains on a GPU only" in distil(model__dtype="float16").error()
    if importlib.util.find_spec("flash_attn") is None:
        assert "FlashAttention2" in distil(model__attention="flash_attention_2").error()


# The data


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "source 'prose' holds no usable document: "),
        ("blank.txt", b" \n", "source 'prose' holds no usable document: "),
        ("latin.txt", "café".encode("latin1"), "latin.txt is not UTF-8 (byte 3); convert it"),
        ("large.jsonl", b'{"input_ids": [1, 2, 600, 3]}\n', "large.jsonl:1: token id 600 is outside the model's"),
        ("negative.jsonl", b'{"input_ids": [1, -2]}\n', "negative.jsonl:1: token id -2 is outside the model's"),
        ("one.jsonl", b'{"input_ids": [1]}\n', "source 'prose' has no token to learn from in sequences of 64"),
        ("rows.csv", b"a,b\n", "source 'prose': rows.csv has an unknown format"),
        ("broken.parquet", b"PAR1", "broken.parquet is not a readable parquet file"),
        ("absent.jsonl", None, "source 'prose': absent.jsonl does not exist or matches no file"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(workplace, distil, name, content, says):
    if content is not None:
        (workplace / name).write_bytes(content)
    assert says in distil(data__train__0__path=name).error()


def test_corrected_data_can_be_trained_on_at_once(workplace, distil):
    distil(data__train__0__path="absent.jsonl").error()
    assert distil(training__steps=1).status == 0


def test_held_out_text_that_is_trained_on_or_has_nothing_to_predict(workplace, distil):
    assert "evaluating on training data" in distil(data__held_out__0__path="data/debug/prose.train.jsonl").error()
    (workplace / "one.jsonl").write_text('{"input_ids": [1]}\n')
    says = "source 'prose' has no token to predict in sequences of 64"
    assert says in distil(data__held_out__0__path="one.jsonl").error()


def test_sequences_longer_than_the_context(distil):
    assert "data.sequence_length" in distil(data__sequence_length=5000).error()


# Where it writes


def test_an_output_directory_in_use(project, distil):
    before = sorted(path.name for path in project.run.rglob("*"))
    error = distil(training__output_dir=str(project.run)).error()
    assert error == (
        f"error: training.output_dir {project.run} holds another run; continue it with --resume, "
        "or choose another directory"
    )
    assert sorted(path.name for path in project.run.rglob("*")) == before
    assert "holds other files; choose another" in distil(training__output_dir="models/debug").error()


def test_an_output_directory_that_cannot_be_made(distil):
    assert "recipe.yaml is a file; choose another" in distil(training__output_dir="recipe.yaml").error()
    assert "cannot be written: Not a directory" in distil(training__output_dir="recipe.yaml/run").error()
    assert "cannot be written: " in distil(training__output_dir="/proc/run").error()


def test_resuming_what_is_not_there_or_not_the_same(project, distil, workplace):
    assert "holds other files; choose another" in distil("--resume", training__output_dir="models/debug").error()
    shutil.copytree(project.run, workplace / "outputs/debug/run")
    error = distil("--resume", training__learning_rate=0.5).error()
    assert "step-000004 cannot be resumed: training.learning_rate was 0.003, is now 0.5; restore that" in error
    assert distil("--allow-changed").error() == "error: --allow-changed goes with --resume"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN", "--to", "c", "--format", "gguf"], "--format 'gguf' is not known; use hf or arctic"),
        (["absent", "--to", "c"], "absent is not a run directory"),
        (["RUN", "--to", "models"], "models already exists; choose another directory or remove it"),
        (["RUN", "--to", "recipe.yaml/c"], "--to recipe.yaml/c cannot be written: Not a directory"),
    ],
)
def test_exports_that_cannot_be(project, command, arguments, says):
    assert says in command("export", *(project.run if it == "RUN" else it for it in arguments)).error()


def test_an_export_that_the_system_refuses(project, command):
    result = command("export", project.run, "--to", "/proc/c")
    assert result.status == 1
    assert "error: could not write /proc/c: " in result.err.splitlines()[-1]


def test_a_run_without_a_whole_checkpoint(project, workplace, command):
    run = shutil.copytree(project.run, workplace / "run")
    last = sorted((run / "checkpoints").iterdir())[-1]
    os.truncate(last / "student.safetensors", 5000)
    result = command("export", "run", "--to", "older")
    assert result.status == 0
    assert "step-000004: student.safetensors does not match its checksum; looking for the checkpoint" in result.err
    assert "run         run, step 2 of 4" in result.err
    (run / "checkpoints/step-000002/progress.json").write_text("{")
    assert "run run holds no checkpoint that is whole" in command("export", "run", "--to", "c").error()
    shutil.rmtree(run / "checkpoints")
    assert "run run holds no checkpoint yet" in command("export", "run", "--to", "c").error()
    assert [path.name for path in workplace.iterdir() if path.name.lstrip(".").startswith("c")] == []


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "calibration.json"])
def test_a_run_whose_records_are_damaged(project, workplace, command, name):
    run = shutil.copytree(project.run, workplace / "run")
    (run / name).write_text("{\n")
    assert f"run/{name} is " in command("export", "run", "--to", "c").error()
    assert not (workplace / "c").exists()


def test_a_file_size_limit_while_exporting_leaves_nothing(project, workplace):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = run_process("export", project.run, "--to", workplace / "exports/c", cwd=project.root, preexec_fn=limit)
    assert result.status == 1
    assert "error: could not write " in result.err
    assert "exports/c: " in result.err
    assert result.err.endswith("nothing was left there\n")
    assert list((workplace / "exports").iterdir()) == []


def test_a_directory_that_looks_like_a_half_made_export_is_the_users(project, workplace, command):
    (workplace / ".c.partial").mkdir()
    (workplace / ".c.partial/notes.txt").write_text("mine")
    assert command("export", project.run, "--to", "c").status == 0
    assert (workplace / ".c.partial/notes.txt").read_text() == "mine"
    assert [path.name for path in workplace.iterdir() if path.name.startswith(".c.")] == [".c.partial"]


def test_a_full_disk_while_exporting_leaves_nothing(project, small_disk):
    result = run_process("export", project.run, "--to", small_disk / "c", cwd=project.root)
    assert result.status == 1
    assert "error: the disk is full; nothing was left at " in result.err
    assert list(small_disk.iterdir()) == []


# Evaluation and chat


def test_a_base_that_is_not_the_checkpoints(project, workplace, command):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    for vocabulary in (300, 512):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
        base.save_pretrained(workplace / f"other-{vocabulary}")
    arguments = ["evaluate", project.checkpoint, "--report", "r", "--tokens", "64", "--base"]
    error = command(*arguments, "other-300").error()
    assert error.startswith("error: vocabulary mismatch: ")
    assert "other-300 has 300" in error
    assert "other-512 is not the model that " in command(*arguments, "other-512").error()
    tuned = AutoModelForCausalLM.from_pretrained(project.base)
    tuned.model.layers[5].mlp.up_proj.weight.data[0, 0] += 0.01
    tuned.save_pretrained(workplace / "tuned")
    error = command(*arguments, "tuned").error()
    assert error.endswith("was made from: model.layers.5.mlp.up_proj.weight differs; give that model")
    assert not (workplace / "r").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gate", "speed=1"], "--gate 'speed=1': unknown figure 'speed'; known: kl, "),
        (["--gate", "kl"], "--gate 'kl' must look like kl=0.2"),
        (["--gate", "kl=low"], "--gate 'kl=low' must look like kl=0.2"),
        (["--gate", "kl=nan"], "--gate 'kl=nan' must look like kl=0.2"),
        (["--data", "prose"], "--data 'prose' must look like NAME=PATH"),
        (["--data", "a=absent.jsonl"], "source 'a': absent.jsonl does not exist"),
        (["--data", "a=x", "--data", "a=y"], "--data names 'a' twice"),
        (["--report", "recipe.yaml"], "--report recipe.yaml/report.json cannot be written: Not a directory"),
        (["--tokens", "0"], "Invalid value for '--tokens'"),
        (["--tasks", "absent.yaml"], "--tasks absent.yaml cannot be read: No such file"),
        (["--tasks", "recipe.yaml"], "--tasks recipe.yaml must be a task of lm-evaluation-harness"),
    ],
)
def test_evaluations_that_cannot_be(project, command, options, says):
    assert says in command("evaluate", project.checkpoint, "--base", project.base, "--report", "r", *options).error()


def test_spoilt_checkpoints(project, workplace, command):
    spoilt = shutil.copytree(project.checkpoint, workplace / "spoilt")
    evaluate = ["evaluate", "spoilt", "--base", project.base, "--report", "r"]
    for content in ("{", "[]", '{"recipe": 3}', "[" * 5000):
        (spoilt / "swiftkv.json").write_text(content)
        assert "spoilt/swiftkv.json is damaged" in command(*evaluate).error()
    (spoilt / "swiftkv.json").unlink()
    assert "spoilt names no held-out data; give --data NAME=PATH" in command(*evaluate).error()
    os.truncate(spoilt / "model.safetensors", 100_000)
    for arguments in (evaluate, ["chat", "spoilt", "--prompt", "x"], ["serve", "spoilt", "--port", "0"]):
        assert "spoilt" in command(*arguments).error()


def test_predictions_that_are_not_finite(project, workplace, command):
    for name, place in (("base", project.base), ("made", project.checkpoint)):
        weights = load_file(shutil.copytree(place, workplace / name) / "model.safetensors")
        weights["model.norm.weight"] *= 1e38
        save_file(weights, workplace / name / "model.safetensors", metadata={"format": "pt"})
    result = command("evaluate", "made", "--base", "base", "--report", "r", "--tokens", "64")
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith("error: model base: what it predicts on 'prose' is not finite")
    assert not (workplace / "r").exists()


def test_a_card_that_is_not_utf8_is_left_as_it_is(project, workplace, command):
    card = shutil.copytree(project.checkpoint, workplace / "made") / "README.md"
    card.write_bytes(b"caf\xe9")
    result = command("evaluate", "made", "--base", project.base, "--report", "r", "--tokens", "64")
    assert result.status == 0
    assert "warning     the figures in made/README.md are not renewed: 'utf-8' codec can't decode" in result.err
    assert card.read_bytes() == b"caf\xe9"


def test_chats_that_cannot_be(model_copy, command):
    assert (
        "5000 new ones exceed the context of 4096"
        in command("chat", "spoilt", "--prompt", "x", "--max-new-tokens", "5000").error()
    )
    assert "--prompt is empty" in command("chat", "spoilt", "--prompt", " ").error()
    (model_copy / "chat_template.jinja").write_text("{% for x in %}")
    assert "its chat template refuses the conversation" in command("chat", "spoilt", "--prompt", "x").error()
    (model_copy / "chat_template.jinja").unlink()
    assert "spoilt has no chat template" in command("chat", "spoilt", "--prompt", "x").error()


# The command line itself


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["destill"], "error: No such command 'destill'."),
        (["distill"], "error: Missing argument 'recipe'. (see `swiftkv distill --help`)"),
        (["distill", "--fast"], "error: No such option: --fast (see `swiftkv distill --help`)"),
        (["export", "run"], "error: Missing option '--to'. (see `swiftkv export --help`)"),
        (["chat", "m", "--temperature", "-1"], "error: Invalid value for '--temperature'"),
        (["serve", "m", "--port", "99999"], "error: Invalid value for '--port'"),
        (
            ["bench", "prefill", "c", "--base", "b", "--lengths", "a,b"],
            "error: --lengths 'a,b' must look like 512,2048",
        ),
        (["bench", "step", "absent"], "error: model absent does not exist"),
        (["fetch", "nowhere", "--to", "m"], "error: nowhere: no such directory; a source is smollm2-135m, debug"),
        (["fetch", "debug", "--to", "models"], "already holds files that `swiftkv fetch` did not write"),
        (["fetch", "models/debug", "--to", "m", "--data", "d"], "error: --data goes with smollm2-135m and debug; no"),
        (["fetch", "debug", "--to", "~nosuchuser/m"], "error: ~nosuchuser/m: there is no such user"),
        (["plan", "recipe.yaml", "--gpu-memory", "inf"], "error: --gpu-memory inf is no size"),
        (["plan", "recipe.yaml", "--gpu-memory", "1e300"], "error: --gpu-memory 1e+300 is no size"),
        (["chat", "models/debug", "--prompt", "caf\udce9"], "error: --prompt is not UTF-8"),
        (["chat", "caf\udce9", "--prompt", "x"], "error: model caf\\udce9 does not exist"),
        (["serve", "models/debug", "--port", "0", "--host", "a..b"], "error: cannot listen on http://a..b:0: "),
        (["serve", "models/debug", "--port", "0", "--api-key", " "], "error: the API key holds white space"),
    ],
)
def test_a_wrong_command_line(command, arguments, says):
    result = command(*arguments)
    assert says in result.error()
    assert len(result.err.splitlines()) == 1


def test_an_empty_key_in_the_environment_is_not_taken_for_none(command, monkeypatch):
    monkeypatch.setenv("SWIFTKV_API_KEY", "")
    assert "error: the API key is empty; " in command("serve", "absent", "--port", "0").error()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "some/file"), "error: some/file: File name too long"),
        (OSError(errno.EIO, "Input/output error"), "error: Input/output error"),
        (OSError("no number\nbut two lines"), "error: no number but two lines"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), "can't encode character"),
    ],
)
def test_the_last_net(command, monkeypatch, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr("swiftkv_train.runs.list_runs", fail)
    result = command("runs")
    assert result.status == 1
    assert says in result.err
    assert len(result.err.splitlines()) == 1


def test_the_last_net_lets_programming_errors_through(command, monkeypatch):
    monkeypatch.setattr("swiftkv_train.runs.list_runs", lambda: None)
    assert command("runs").status == "traceback"


def test_a_name_that_no_file_can_have(command):
    result = command("fetch", "debug", "--to", "x" * 300)
    assert (result.status, result.err.splitlines()[1:]) == (1, [])
    assert result.err.endswith("xxx: File name too long\n")
