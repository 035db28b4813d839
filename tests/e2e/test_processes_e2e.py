"""More than one process, and processes that are stopped."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commanding import environment, run_here, start

from debug_recipe import comparable, metrics, write_recipe
from swiftkv_train.run_directory import RunDirectory

TWO_PROCESSES = Path(__file__).parents[2] / "recipes/accelerate/cpu.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES)]


SHARDED = ["zero1", "zero2", "zero3", "fsdp2"]


def weights(run):
    return RunDirectory.open(run).checkpoints()[-1].weights()


def launch(*arguments, cwd, port):
    command = [*LAUNCH, "--main_process_port", str(port), "-m", "swiftkv_train.distill", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


@pytest.fixture
def port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


SPREAD = [("ddp", 1)]
SPREAD += [
    pytest.param(name, size, marks=pytest.mark.distributed)
    for name, size in [*((name, 1) for name in SHARDED), ("ddp", 2), ("zero3", 2)]
]


@pytest.mark.parametrize(("strategy", "sequence_parallel"), SPREAD)
def test_two_processes_train_as_one_does(workplace, port, strategy, sequence_parallel):
    # Of 7 sequences one process gets 4 and the other 3: two micro-batches here, one there. Or each gets half of all 7.
    changes = {"training.micro_batch_size": 3, "training.batch_size": 7, "loss.hidden_mse": 0.3}
    if (strategy, sequence_parallel) == ("ddp", 1):  # whose calibration sums up more
        changes["rewrite.key_value_group_size"] = 2
    recipe = write_recipe(workplace / "recipe.yaml", changes)
    assert run_here("distill", recipe, "training.output_dir=one", cwd=workplace).status == 0
    options = ["training.output_dir=two", f"distributed.strategy={strategy}"]
    options += [f"distributed.sequence_parallel={sequence_parallel}"]
    result = launch(recipe, *options, cwd=workplace, port=port)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("calibrate   1,024 tokens") == 1, (
        "each of two processes reads half, and one of them speaks"
    )
    one, two = comparable(metrics(workplace / "one")), comparable(metrics(workplace / "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    # fp32: gradients and calibration sums are added in another order, 1e-7 of their size per addition.
    for row, expected in zip(two, one, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-4)
        for name, quality in expected.get("held_out", {}).items():
            assert row["held_out"][name] == pytest.approx(quality, rel=1e-4)
    start = RunDirectory.open(workplace / "one").checkpoints()[0].weights()
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in weights(workplace / "one").items())
    for name, tensor in weights(workplace / "one").items():
        # AdamW divides by a gradient's size: where that is next to nothing, its rounding shows.
        assert float((weights(workplace / "two")[name] - tensor).abs().max()) < 2e-2 * moved, name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "then", "trainable"),
    [("zero1", "ddp", "full"), ("zero2", "zero1", "lora"), ("zero3", "fsdp2", "lora"), ("fsdp2", "zero3", "full")],
)
def test_a_resumed_run_is_exact_and_may_go_on_under_another_strategy(workplace, port, strategy, then, trainable):
    changes = {"training.batch_size": 5, "training.trainable": trainable, "training.gradient_checkpointing": True}
    recipe = write_recipe(workplace / "recipe.yaml", changes)
    run = workplace / "outputs/debug/run"

    def train(strategy, *options):
        result = launch(recipe, f"distributed.strategy={strategy}", *options, cwd=workplace, port=port)
        assert result.returncode == 0, result.stderr[-3000:]
        return comparable(metrics(run)), weights(run)

    rows, whole = train(strategy)
    for name, how in (("exact", strategy), ("close", then)):
        shutil.rmtree(run / "checkpoints/step-000004")
        assert RunDirectory.open(run).checkpoints()[-1].step == 2
        again, found = train(how, "--resume")
        assert found.keys() == whole.keys()
        if name == "exact":
            assert again == rows
            assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())
        else:  # sums in another order, as above
            assert [row["loss"] for row in again if "loss" in row] == pytest.approx(
                [row["loss"] for row in rows if "loss" in row], rel=1e-5
            )
    exported = run_here("export", run, "--to", "checkpoint", cwd=workplace)
    assert exported.status == 0, exported.err


def test_a_mistake_in_the_data_is_told_by_every_process_in_a_line(workplace, port):
    recipe = write_recipe(workplace / "recipe.yaml", {"data.train.0.path": "absent.jsonl"})
    error = launch(recipe, cwd=workplace, port=port).stderr
    own = error[: error.index("Traceback")] if "Traceback" in error else error  # the launcher's
    assert own.count("error: source 'prose': absent.jsonl does not exist") == 2
    assert "gloo" not in error
    assert "distill.py" not in error


@pytest.mark.distributed
def test_a_users_deepspeed_settings_are_taken_and_may_not_contradict_the_recipe(workplace, port):
    recipe = write_recipe(workplace / "recipe.yaml", {"training.steps": 1})
    options = ["distributed.strategy=zero2", "distributed.deepspeed_config=ds.json"]
    settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "gradient_clipping": "auto"}
    (workplace / "ds.json").write_text(json.dumps(settings))
    result = launch(recipe, *options, cwd=workplace, port=port)
    assert result.returncode == 0, result.stderr[-3000:]
    (workplace / "ds.json").write_text(json.dumps(settings | {"gradient_clipping": 0.5}))
    error = launch(recipe, *options, "training.output_dir=again", cwd=workplace, port=port).stderr
    says = (
        "error: ds.json: gradient_clipping is 0.5, the recipe decides it by training.max_grad_norm 1.0; remove it there"
    )
    assert says in error
    assert not (workplace / "again").exists()


@pytest.mark.distributed
def test_an_offloaded_optimizer_is_the_recipes_own_and_resumes_exactly(workplace, port):
    recipe = write_recipe(workplace / "recipe.yaml", {"training.betas": [0.5, 0.6]})
    assert run_here("distill", recipe, "training.output_dir=one", cwd=workplace).status == 0
    (workplace / "ds.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    options = ["training.output_dir=two", "distributed.strategy=zero2", "distributed.deepspeed_config=ds.json"]
    result = launch(recipe, *options, cwd=workplace, port=port)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = ([row["loss"] for row in metrics(workplace / name) if "loss" in row] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)  # sums in another order, as above
    whole = weights(workplace / "two")
    shutil.rmtree(workplace / "two/checkpoints/step-000004")
    result = launch(recipe, *options, "--resume", cwd=workplace, port=port)
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(torch.equal(weights(workplace / "two")[name], tensor) for name, tensor in whole.items())


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# An evaluation at every step: wherever it stops, that step's must not be lost or logged twice.
STEPS = 60
CHANGES = {"training.steps": STEPS, "training.checkpoint_every": 0, "training.evaluate_every": 1}


def rows_of(run):
    return metrics(run) if (run / "metrics.jsonl").exists() else []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_never_stopped(workplace, number, status):
    recipe = write_recipe(workplace / "recipe.yaml", CHANGES)
    process = start("distill", recipe, "training.output_dir=stopped", cwd=workplace)
    run = workplace / "stopped"
    try:
        wait_for(lambda: process.poll() is not None or len(rows_of(run)) > 3)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, err
    lines = err.splitlines()
    assert lines[-1].startswith("stopped     at step ")
    assert lines[-1].endswith(f"of {STEPS}; continue with --resume")
    assert "Traceback" not in err
    step = RunDirectory.open(run).checkpoints()[-1].step
    assert f"at step {step} of" in lines[-1]
    assert 1 <= step < STEPS

    # The rest of it, and a run that never stopped, in this process: they take about a second.
    resumed = run_here("distill", recipe, "training.output_dir=stopped", "--resume", cwd=workplace)
    assert resumed.status == 0, resumed.err
    assert f"step-{step:06d}, {STEPS - step} steps left" in resumed.err
    assert run_here("distill", recipe, "training.output_dir=whole", cwd=workplace).status == 0
    steps = [row["step"] for row in metrics(run) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert comparable(metrics(run)) == comparable(metrics(workplace / "whole"))
    for name, tensor in weights(workplace / "whole").items():
        assert torch.equal(weights(run)[name], tensor), name


def workers_of(launcher):
    """The processes that a launcher has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = status.read_text().rpartition(")")
            if int(rest.split()[1]) == launcher:
                found.append(int(number.split()[0]))
    return found


@pytest.mark.distributed
def test_a_signal_to_one_of_two_processes_before_the_first_step_ends_both(workplace, port):
    changes = {"training.micro_batch_size": 1, "calibration.tokens": 5_000_000, "training.output_dir": "run"}
    recipe = write_recipe(workplace / "recipe.yaml", changes)
    command = [*LAUNCH, "--main_process_port", str(port), "-m", "swiftkv_train.distill", str(recipe)]
    with (workplace / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=workplace, env=environment(), stdout=log, stderr=log)
    workers = []
    try:
        wait_for(lambda: launcher.poll() is not None or "data  " in (workplace / "log").read_text(), seconds=180)
        workers = workers_of(launcher.pid)
        assert len(workers) == 2, (workplace / "log").read_text()
        os.kill(workers[1], signal.SIGTERM)
        assert launcher.wait(timeout=120) != 0
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        for process in [launcher.pid, *workers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def test_a_kill_during_export_leaves_nothing_under_the_final_name(project, workplace):
    outputs = workplace / "exports"
    process = start("export", project.run, "--to", outputs / "c", cwd=project.root)
    try:
        wait_for(lambda: process.poll() is not None or any(outputs.glob(".c.partial-*/config.json")))
    finally:
        process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (outputs / "c").exists()
    again = run_here("export", project.run, "--to", outputs / "c", cwd=project.root)
    assert again.status == 0, again.err
    assert [path.name for path in outputs.iterdir()] == ["c"]
