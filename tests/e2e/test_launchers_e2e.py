"""The launchers that the recipes name: what they start trains as one process does.

Two processes on a CPU stand for two GPUs of a machine and for two machines; of the commands in recipes/llama-3.1-70b
only DeepSpeed's start over ssh is left out. What the launchers hand over is compared, so one strategy each is enough:
test_processes_e2e.py compares the strategies.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commanding import environment, run_here
from test_processes_e2e import port  # noqa: F401

from debug_recipe import comparable, metrics, write_recipe

pytestmark = pytest.mark.distributed
CLUSTER = Path(__file__).parents[2] / "recipes/accelerate/cluster.yaml"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


def one_machine_by_deepspeed(port):  # noqa: F811
    return [[*DEEPSPEED, "--num_gpus", "2", "--master_port", port, "--module"]]


def machines_by_deepspeed(port):  # noqa: F811
    Path("hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n")
    shared = ["--hostfile", "hostfile", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port, "--module"]
    return [[*DEEPSPEED, "--node_rank", str(rank), *shared] for rank in range(2)]


def machines_by_accelerate(port):  # noqa: F811
    shared = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes", "2", "-m"]
    return [[*ACCELERATE, "--config_file", str(CLUSTER), "--machine_rank", str(rank), *shared] for rank in range(2)]


@pytest.mark.parametrize(
    ("commands", "strategy"),
    [(one_machine_by_deepspeed, "zero2"), (machines_by_deepspeed, "ddp"), (machines_by_accelerate, "zero3")],
)
def test_what_a_launcher_starts_trains_as_one_process_does(workplace, port, monkeypatch, commands, strategy):  # noqa: F811
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(workplace)
    recipe = write_recipe(workplace / "recipe.yaml", {"training.steps": 3, "training.micro_batch_size": 2})
    assert run_here("distill", recipe, "training.output_dir=one", cwd=workplace).status == 0

    arguments = ["swiftkv_train.distill", str(recipe), "training.output_dir=two", f"distributed.strategy={strategy}"]
    launched, logs = [], []
    try:
        for command in commands(str(port)):
            logs.append(workplace / f"launcher-{len(logs)}.log")
            with open(logs[-1], "w") as log:
                launched.append(
                    subprocess.Popen(
                        [*command, *arguments],
                        cwd=workplace,
                        env=environment(DS_ACCELERATOR="cpu"),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        statuses = [process.wait(timeout=240) for process in launched]
    finally:
        for process in launched:  # and what they have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = "".join(log.read_text() for log in logs)
    assert statuses == [0] * len(launched), said
    assert said.count("calibrate   1,024 tokens") == 1, "each of two processes reads half, and one speaks"

    one, two = comparable(metrics(workplace / "one")), comparable(metrics(workplace / "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    # fp32: gradients and calibration sums are added in another order, 1e-7 of their size per addition.
    for row, expected in zip(two, one, strict=True):
        for key in {"loss", "kl", "grad_norm"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], rel=1e-4)
        for name, quality in expected.get("held_out", {}).items():
            assert row["held_out"][name] == pytest.approx(quality, rel=1e-4)
