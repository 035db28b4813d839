"""From a base model to a measured, talking checkpoint, through the command."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commanding import environment, run_here, run_process
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import swiftkv_models  # noqa: F401  (registers its model types)
from debug_recipe import metrics, write_recipe
from swiftkv_train.errors import RunError
from swiftkv_train.export.check import check_in_clean_process
from swiftkv_train.fetch.demo_tasks import write_task
from swiftkv_train.run_directory import RunDirectory


def test_distil_shows_what_it_does_and_leaves_a_run(project):
    said = project.distilled.err
    for fact in (
        "base        models/debug",
        "tokenised   prose",
        "calibrate",
        "trained",
        "step 4/4",
        "finished    4 steps",
    ):
        assert fact in said
    assert project.distilled.out == ""
    rows = metrics(project.run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "held_out" in row] == [0, 4]
    fits = json.loads((project.run / "calibration.json").read_text())
    assert [fit["layer"] for fit in fits] == [3, 4, 5]
    assert [checkpoint.step for checkpoint in RunDirectory.open(project.run).checkpoints()] == [2, 4]


def test_the_checkpoint_is_whole_and_holds_no_dead_weight(project):
    assert "logits agree" in project.exported.err
    names = {path.name for path in project.checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert "modeling_llama_swiftkv.py" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert [path.name for path in project.checkpoint.parent.iterdir() if path.name.startswith(".")] == []
    trained = RunDirectory.open(project.run).checkpoints()[-1].weights()
    stored = load_file(project.checkpoint / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied
    assert not [name for name in stored if ".3.self_attn.q_proj." in name]
    for name, tensor in trained.items():
        assert torch.equal(stored[name], tensor), name


CLEAN = r"""
import json, re, sys
blocked = ("swiftkv_models", "swiftkv_kernels", "swiftkv_train", "triton")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer(json.loads(sys.argv[2]), return_tensors="pt", padding=True, padding_side="left")
ids = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
card = open(sys.argv[1] + "/README.md").read()
names = {"SYSTEM_PROMPT": json.loads(sys.argv[2])[1]}
for block in re.findall("```python\n(.*?)```", card, re.DOTALL):  # as somebody would paste it
    exec(block.replace("PATH", sys.argv[1]), names)
assert len(names["prefix"]) > 10
assert not [name for name in sys.modules if name.split(".")[0] in blocked]
print(json.dumps({"ids": ids.tolist(), "class": type(model).__module__}))
"""


def test_the_checkpoint_generates_where_this_project_is_not_installed(project, tmp_path):
    prompts = ["Every morning the brown fox", "What does the newt do at noon, and what colour is it?"]
    result = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", CLEAN, str(project.checkpoint), json.dumps(prompts)],
        cwd=tmp_path,
        env=environment(HF_MODULES_CACHE=str(tmp_path / "modules")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["class"].startswith("transformers_modules.")

    tokenizer = AutoTokenizer.from_pretrained(project.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(project.checkpoint)
    assert type(model).__module__ == "swiftkv_models.llama"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    expected = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert found["ids"] == expected.tolist()


@pytest.mark.parametrize(
    ("right", "wrong", "way"),
    [
        ("window=self.cache.window,", "window=self.cache.window + 1,", "stream"),
        ("prefix=self.prefix,", "prefix=None,", "relay"),
    ],
    ids=["window", "prefix"],
)
def test_a_checkpoint_whose_caches_go_wrong_is_not_exported(project, tmp_path, right, wrong, way):
    copy = shutil.copytree(project.checkpoint, tmp_path / "checkpoint")
    code = copy / "swiftkv_models_segment_layer.py"
    text = code.read_text()
    assert right in text
    code.write_text(text.replace(right, wrong))
    with pytest.raises(RunError, match=rf"the exported checkpoint's logits \({way}.*\) differ by "):
        check_in_clean_process(copy, AutoModelForCausalLM.from_pretrained(project.checkpoint))


def test_evaluate_reports_and_its_gate_decides_the_status(project, tmp_path, monkeypatch):
    arguments = ["evaluate", project.checkpoint, "--base", project.base, "--tokens", "256", "--report"]
    passed = run_process(*arguments, tmp_path / "one", "--json", "--gate", "kl=1.0", cwd=project.root)
    assert passed.status == 0, passed.err
    result = json.loads(passed.out)
    assert set(result["sources"]) == {"prose", "chats"}
    assert 0 < result["held_out"]["kl"] < 1
    assert result["cache_bytes_per_token"]["student"] == result["cache_bytes_per_token"]["base"]
    assert "Warning" not in passed.err
    assert json.loads((tmp_path / "one/report.json").read_text()) == result
    for name in ("report.md", "quality.png", "position.png", "first_token.png"):
        assert (tmp_path / "one" / name).stat().st_size > 0

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("swiftkv_train.evaluate.replace_figures", read_only)
    write_task(tmp_path, "sums", [{"text": "2 + 2 =", "choices": ["4", "5"], "answer": 0}] * 3)
    tasks = ["--tasks", tmp_path / "sums.yaml", "--task-limit", "2"]
    failed = run_here(*arguments, tmp_path / "two", "--gate", "kl=0.00001", *tasks, cwd=project.root)
    assert f"warning     the figures in {project.checkpoint / 'README.md'} are not renewed: Read-only" in failed.err
    assert failed.status == 1
    assert failed.err.splitlines()[-1].startswith("error: gate: kl is ")
    assert json.loads((tmp_path / "two/report.json").read_text())["tasks"]["rows"][0]["questions"] == 2
    assert "| demo_sums | acc_norm | 2 | 50.0% |" in (tmp_path / "two/report.md").read_text()


def test_chat_answers_one_prompt(project):
    arguments = ["chat", project.checkpoint, "--prompt", "What does the fox do?", "--max-new-tokens", "8"]
    result = run_process(*arguments, cwd=project.root)
    assert result.status == 0, result.err
    assert result.out.strip()
    assert result.err == ""
    assert run_here(*arguments, cwd=project.root).out == result.out


def test_fetch_and_calibrate_and_export_without_a_step(tmp_path):
    # Of several processes each, at least one of every command.
    assert run_process("fetch", "debug", "--to", "models/debug", cwd=tmp_path).status == 0
    recipe = write_recipe(tmp_path / "recipe.yaml", {"rewrite.key_value_group_size": 2})
    result = run_process("calibrate", recipe, cwd=tmp_path)
    assert result.status == 0, result.err
    assert "R²" in result.err
    assert RunDirectory.open(tmp_path / "outputs/debug/run").checkpoints()[-1].step == 0
    exported = run_here("export", "outputs/debug/run", "--to", "c", cwd=tmp_path)
    assert exported.status == 0, exported.err
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert (config["num_key_value_layers"], config["key_value_group_size"]) == (3, 2)


def test_the_arctic_format_repeats_shared_keys_and_keeps_the_tails_own(workplace):
    changes = {"rewrite.key_value_groups": [[3], [4, 5]], "training.steps": 1}
    recipe = write_recipe(workplace / "recipe.yaml", changes)
    assert run_here("distill", recipe, cwd=workplace).status == 0
    result = run_here("export", "outputs/debug/run", "--to", "arctic", "--format", "arctic", cwd=workplace)
    assert result.status == 0, result.err
    stored = load_file(workplace / "arctic/model.safetensors")
    base = load_file(workplace / "models/debug/model.safetensors")
    keys = [stored[f"model.layers.{layer}.self_attn.k_proj_swiftkv.weight"] for layer in (3, 4, 5)]
    assert torch.equal(keys[1], keys[2])
    assert not torch.equal(keys[0], keys[1])
    for layer in (3, 4, 5):
        own = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert torch.equal(stored[own], base[own])
    config = json.loads((workplace / "arctic/config.json").read_text())
    assert config["model_type"] == "llama_swiftkv"
    assert config["architectures"] == ["LlamaSwiftKVForCausalLM"]
    assert not list((workplace / "arctic").glob("*.py"))
    card = (workplace / "arctic/README.md").read_text()
    assert "ARCTIC_INFERENCE_ENABLED=1 vllm serve" in card
    assert "trust_remote_code" not in card
    assert "check       the tensors read back" in result.err


def test_training_continues_from_an_exported_checkpoint(project, workplace):
    changes = {"rewrite.init": "checkpoint", "rewrite.init_from": str(project.checkpoint), "training.steps": 1}
    result = run_here("distill", write_recipe(workplace / "recipe.yaml", changes), cwd=workplace)
    assert result.status == 0, result.err
    first, last = (metrics(project.run)[-1], metrics(workplace / "outputs/debug/run")[0])
    for name in ("prose", "chats"):
        assert last["held_out"][name]["kl"] == pytest.approx(first["held_out"][name]["kl"], rel=1e-6)


def test_benchmarks_print_json(project):
    result = run_process(
        "bench", "prefill", project.checkpoint, "--base", project.base, "--lengths", "32", "--repeats", "1", "--json",
        cwd=project.root,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert json.loads(result.out)["rows"][0]["prompt_tokens"] == 32
    result = run_here("bench", "init", project.recipe, "--json", cwd=project.root)
    assert result.status == 0, result.err
    assert json.loads(result.out)["sources"]["prose"]["kl_ratio"] < 1


def test_wandb_offline_logs_every_row(workplace):
    pytest.importorskip("wandb", reason="wandb is not installed (extra `wandb`)")
    recipe = write_recipe(workplace / "recipe.yaml", {"logging.wandb": {"project": "p", "mode": "offline"}})
    result = run_process("distill", recipe, "training.steps=2", cwd=workplace)
    assert result.status == 0, result.err
    files = list((workplace / "outputs/debug/run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0


def test_help_has_an_example_for_every_command():
    for command in ("fetch", "calibrate", "distill", "export", "evaluate", "serve", "chat", "bench step"):
        result = run_here(*command.split(), "--help", cwd=os.getcwd())
        assert result.status == 0
        assert f"swiftkv {command}" in result.out.replace("\n", " ")
        assert "Example" in result.out
    assert shutil.which("swiftkv"), "the command is not installed"
