"""Every benchmark runs on the debug model in seconds, and what its result says agrees with itself and with others."""

import importlib.util
import json
import os
import statistics
from pathlib import Path

import pytest
import torch

from swiftkv_models import rewrite
from swiftkv_train.bench import contenders, loss, plan
from swiftkv_train.bench.process import in_own_process
from swiftkv_train.cli import bench_app
from swiftkv_train.loading import load_model

ROOT = Path(__file__).parents[2]
COMMANDS = [command.name for command in bench_app.registered_commands]


@pytest.fixture
def settled_files():
    """Source files as they usually are: not just written, when their time of change does not tell yet."""
    files = sorted(Path("data/debug").glob("*.jsonl"))
    for file in files:
        os.utime(file, (1e9, 1e9))
    return files


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(bench, command):
    status, out, _ = bench(command, "--help")
    assert status == 0
    assert f"Example: swiftkv bench {command}" in out.replace("\n", " ")


def test_step(result_of):
    result = result_of("step", "models/debug", "--batch-size", "4", "--sequence-length", "256", "--repeats", "2")
    for name, rate in result["tokens_per_second"].items():
        assert rate == pytest.approx(4 * 256 / statistics.median(result["seconds"][name]))
        assert len(result["seconds"][name]) == 2
        # At the least, what the loss multiplies with the head for a gradient: one fp32 [256, 512] of either side.
        assert result["peak_bytes"][name] > 2 * 256 * 512 * 4
    peaks = result["peak_bytes"]
    assert result["peak_memory_ratio"] == peaks["swiftkv_train"] / peaks["reference"]


def test_init(result_of):
    for row in result_of("init", "recipe.yaml")["sources"].values():
        assert row["kl_ratio"] == row["calibrated"]["kl"] / row["copied"]["kl"]


def test_prefill(result_of):
    rewrite(load_model("models/debug"), num_key_value_layers=3).save_pretrained("checkpoint")
    result = result_of("prefill", "checkpoint", "--base", "models/debug", "--lengths", "16,32", "--repeats", "2")
    assert Path("results/result.png").read_bytes().startswith(b"\x89PNG")
    assert [row["prompt_tokens"] for row in result["rows"]] == [16, 32]
    for row in result["rows"]:
        assert row["ratio"] == row["student_seconds"] / row["base_seconds"]


def test_prefill_of_another_base_is_refused(bench):
    rewrite(load_model("models/debug"), num_key_value_layers=3).save_pretrained("checkpoint")
    other = load_model("models/debug")
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained("other")
    status, out, err = bench("prefill", "checkpoint", "--base", "other", "--lengths", "16")
    assert (status, out) == (2, "")
    assert "error: other is not the model that checkpoint was made from: model.layers.0.mlp.up_proj.weight" in err


def test_loss(result_of):
    result = result_of("loss", "--vocabulary", "4096", "--hidden-size", "32", "--rows", "512", "--repeats", "2")
    (row,) = result["rows"]
    cells = row["contenders"]
    assert list(cells) == contenders.CONTENDERS
    measured = {name: cell for name, cell in cells.items() if "failed" not in cell}
    assert {"ours", "plain", "reference"} <= measured.keys()
    if result["environment"]["liger_kernel"] is None:
        assert "not installed" in cells["liger chunked"]["failed"]
    for name, cell in measured.items():
        assert cell["seconds"] == statistics.median(cell["all_seconds"])
        assert len(cell["all_seconds"]) == 2
        if name != "ours":
            assert cell["seconds_ratio"] == cells["ours"]["seconds"] / cell["seconds"]
            assert cell["peak_ratio"] == cells["ours"]["peak_bytes"] / cell["peak_bytes"]
    # Autograd keeps one side's fp32 log-probabilities while it makes the other's: at least three such matrices.
    assert cells["plain"]["peak_bytes"] > 3 * 512 * 4096 * 4
    assert cells["reference"]["peak_bytes"] > 3 * 512 * 4096 * 2

    converged, far = result["accuracy"]
    assert converged["kl"] == pytest.approx(1e-3, rel=0.5)
    assert far["kl"] == pytest.approx(1.0, rel=0.5)
    for errors in (converged["gradient_error"], far["gradient_error"]):
        assert errors["ours"] < 0.02  # bf16 products
    # Rounded to bf16 on each side, nearly equal logits differ by rounding.
    assert converged["gradient_error"]["ours"] < 0.1 * converged["gradient_error"]["plain"]


@pytest.mark.parametrize("name", ["ours", "plain", "reference", "liger chunked"])
@pytest.mark.parametrize("student", ["converged", "far"])
def test_all_ways_to_the_loss_have_the_gradient_of_one_formula(name, student):
    if name.startswith("liger"):
        pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    tensors = contenders.Setting(vocabulary=300, hidden_size=24, rows=40, dtype="float32").tensors(student)
    near, far, head = (tensor.double() for tensor in tensors)
    temperature = contenders.TEMPERATURE
    q, p = (torch.softmax(hidden @ head.T / temperature, dim=-1) for hidden in (near, far))
    expected = temperature * (q - p) @ head / len(near)
    found = contenders.gradient(name, *tensors).double()
    # fp32 rounds logits of 16 to 1e-6, which a converged student's q - p of 1e-2 p shows a hundredfold.
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    _, kl = loss._exact(*tensors)
    direct = (p_one := torch.softmax(far @ head.T, -1)) * (p_one.log() - torch.log_softmax(near @ head.T, -1))
    assert kl == pytest.approx(float(direct.sum() / len(near)), rel=1e-9)


def test_what_cannot_run_is_reported_with_the_reason(monkeypatch):
    def refuse(*_tensors):
        raise RuntimeError("no driver\nfor this device")

    monkeypatch.setitem(contenders.LOSSES, "plain", refuse)
    monkeypatch.setattr(loss, "peak_in_own_process", lambda *arguments: 1)
    result = loss.measure("64,96", "8", "4", "float32", 1)
    assert [row["vocabulary"] for row in result["rows"]] == [64, 96]
    for row in result["rows"]:
        assert row["contenders"]["plain"] == {"failed": "RuntimeError: no driver"}
        assert "failed" not in row["contenders"]["reference"]
    for row in result["accuracy"]:
        assert row["failed"]["plain"] == "RuntimeError: no driver"
        assert "plain" not in row["gradient_error"]
    assert sum("plain: not measured, RuntimeError: no driver" in line for line in result["summary"]) == 2


def test_startup(result_of, settled_files):
    result = result_of("startup", "recipe.yaml", "--repeats", "1")
    cold, warm = result["rows"]
    documents = sum(len(file.read_text().splitlines()) for file in settled_files)
    sizes = sum(file.stat().st_size for file in settled_files)
    assert (cold["source_files_opened"], cold["documents_tokenised"]) == (len(settled_files), documents)
    assert (warm["source_files_opened"], warm["documents_tokenised"], warm["tokens_made"]) == (0, 0, 0)
    assert (result["source_files"], result["source_bytes"]) == (len(settled_files), sizes)
    assert cold["bytes_read"] > sizes
    assert cold["tokens_made"] * 5 < warm["bytes_read"] < cold["bytes_read"]  # what is cached, 5 bytes a token
    assert result["seconds_ratio"] == warm["seconds"] / cold["seconds"] < 1


def test_a_start_that_opens_a_source_file_says_so(bench, settled_files):
    arguments = ["recipe.yaml", "data.cache_dir=cache"]
    bench("init", *arguments)  # fills the cache
    os.utime(settled_files[0], (4e9, 4e9))  # changed: it is read to see whether its content did
    found = in_own_process("swiftkv_train.bench.startup", arguments, "a start")
    assert (found["source_files_opened"], found["documents_tokenised"]) == (1, 0)


def test_plan(result_of, monkeypatch):
    settings = ["", "model.dtype=bfloat16 training.gradient_checkpointing=true", "training.optimizer=adamw_8bit"]
    monkeypatch.setitem(plan.SETTINGS, "debug", settings)
    result = result_of("plan", "--models", "debug")
    assert [row["settings"] for row in result["rows"]] == settings
    measured = [row for row in result["rows"] if "failed" not in row]
    assert measured[:2] == result["rows"][:2]
    for row in measured:
        assert row["ratio"] == row["predicted_bytes"] / row["measured_bytes"]
    ratios = [row["ratio"] for row in measured]
    assert result["worst_ratio"] == max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    if not torch.cuda.is_available():  # which 8-bit optimizers need
        assert "adamw_8bit" in result["rows"][2]["failed"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["loss", "--vocabulary", "a,b"], "--vocabulary 'a,b' must look like"),
        (["loss", "--vocabulary", "1"], "--vocabulary '1': every number must be at least 2"),
        (["loss", "--rows", "512,0"], "--rows '512,0': every number must be at least 1"),
        (["loss", "--rows", ""], "--rows '' must look like"),
        (["loss", "--hidden-size", "8,8,8"], "--hidden-size 8,8,8: give one for all, or one for each"),
        (["loss", "--dtype", "int8"], "--dtype 'int8' is not known"),
        (["loss", "--repeats", "0"], "Invalid value for '--repeats'"),
        (["plan", "--models", "debug,7b"], "--models 'debug,7b': '7b' is not known"),
        (["startup", "absent.yaml"], "recipe absent.yaml does not exist"),
        (["startup", "recipe.yaml", "data.train.0.path=absent.jsonl"], "absent.jsonl does not exist"),
        (["startup", "recipe.yaml", "model.base=nobody/nothing", "--repeats", "1"], "model nobody/nothing"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(bench, arguments, says):
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert says in err.splitlines()[-1]


def test_the_tables_show_cells_that_lose_and_cells_that_could_not_be_measured(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    environment = json.loads((ROOT / "benchmarks/step.json").read_text())["environment"]
    for name in ("init.json", "step.json", "prefill.json"):
        result = json.loads((ROOT / "benchmarks" / name).read_text())
        (tmp_path / name).write_text(json.dumps({**result, "environment": environment}))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    before = tables.targets()

    elsewhere = {**{key: value for key, value in environment.items() if key != "dtype"}, "device": "another"}
    ours = {"seconds": 2.0, "peak_bytes": 2**20}
    faster = {"seconds": 1.0, "peak_bytes": 2**22, "seconds_ratio": 2.0, "peak_ratio": 0.25}
    cells = {"ours": ours, "plain": faster, "liger fused": {"failed": "RuntimeError: no driver"}}
    accuracy = {"vocabulary": 9000, "kl": 0.00123, "gradient_error": {"ours": 0.01, "plain": 0.5}}
    row = {"rows": 512, "vocabulary": 9000, "hidden_size": 64, "contenders": cells}
    starts = [
        {"seconds": 2.0, "source_files_opened": 4, "documents_tokenised": 528},
        {"seconds": 0.5, "source_files_opened": 0, "documents_tokenised": 0},
    ]
    steps = [
        {"model": "debug", "settings": "", "predicted_bytes": 2**20, "measured_bytes": 2**20, "ratio": 1.0},
        {"model": "debug", "settings": "x", "predicted_bytes": 2**20, "measured_bytes": 2**21, "ratio": 0.5},
        {"model": "debug", "settings": "y", "failed": "no peft"},
    ]
    for name, result in {
        "loss.json": {"environment": environment, "rows": [row], "accuracy": [accuracy]},
        "startup.json": {"environment": elsewhere, "rows": starts, "source_files": 4, "seconds_ratio": 0.25},
        "plan.json": {"environment": elsewhere, "rows": steps},
    }.items():
        (tmp_path / name).write_text(json.dumps(result))
    added = [line for line in tables.targets().splitlines() if line not in before.splitlines()]
    assert added == [
        "| loss and gradient, 512 rows x 9,000 tokens, hidden size 64, against plain; liger fused | 2.00 s "
        "| 1.00 s; not measured | 2.00; – | `loss.json` |",
        "| its peak memory | 1 MiB | 4 MiB; not measured | 0.25; – | `loss.json` |",
        "| error of its gradient, 9,000 tokens, KL 0.001, against plain | 1.00% | 50.00% | 0.02 | `loss.json` |",
        "| start-up to the first batch, filled / empty token cache (0 of 4 source files opened, 0 documents tokenised) "
        "| 0.500 s | 2.000 s | 0.250 | `startup.json` |",
        "| bytes of a training step, planned / measured, debug model, worst of 2 settings | 1.0 MiB | 2.0 MiB | 0.50 "
        "| `plan.json` |",
        "Not measured: liger fused: RuntimeError: no driver.",
        added[-1],
    ]
    assert "`init.json`, `step.json`, `prefill.json`, `loss.json`: " in added[-1]
    assert "`startup.json`, `plan.json`: another, 2 threads, torch" in added[-1]
