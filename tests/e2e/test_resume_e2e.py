"""Runs that are killed and stopped, in processes of their own, and resumed: the result is as if nothing had been."""

import os
import random
import signal
import socket
import subprocess
import time

import pytest
import torch
from commanding import start
from forking import start_forked

from debug_recipe import comparable, metrics, write_recipe
from swiftkv_train.run_directory import RunDirectory

# Two sources and a second epoch of one of them, packed; three micro-batches a step; bfloat16 over fp32 master weights,
# but on a CPU that is slow with it.
CHANGES = {
    "model.dtype": "auto",
    "data.train.0.max_documents": 120,
    "training.steps": 160,
    "training.micro_batch_size": 3,
    "training.checkpoint_every": 3,
    "training.evaluate_every": 10,
    "training.evaluate_tokens": 128,
}

PATIENCE = 240  # seconds that a test waits before it says that something hangs; bf16 is slow on a CPU without it


class Run:
    """A run of one or more processes that is begun and gone on with by one and the same command."""

    def __init__(self, directory, recipe, processes=1):
        self.path, self.recipe, self.processes = directory, recipe, processes
        self.log = directory.with_suffix(".log")
        self.alive = []

    def start(self):
        self.said_before = len(self.log.read_text()) if self.log.exists() else 0
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        for rank in range(self.processes):
            variables = {}
            if self.processes > 1:  # what `accelerate launch` sets
                variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            place = f"training.output_dir={self.path}"
            command = ["distill", self.recipe, place, "--resume"]
            self.alive.append(start_forked(*command, cwd=self.recipe.parent, log=self.log, **variables))

    def said(self):
        """What the processes that were started last have said so far."""
        return self.log.read_text()[self.said_before :] if self.log.exists() else ""

    def running(self):
        return all(process.is_alive() for process in self.alive)

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        while self.running() and not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)

    def wait_for_steps(self, steps):
        """Until so many steps more are logged than when training began."""
        self.wait_for(lambda: "trained " in self.said())
        goal = self.rows() + steps
        self.wait_for(lambda: self.rows() >= goal)

    def signal(self, number):
        """To every process; whether all were still running."""
        were_running = self.running()
        for process in self.alive:
            os.kill(process.pid, number)
        return were_running

    def finish(self):
        """The exit statuses."""
        for process in self.alive:
            process.join(PATIENCE)
        statuses = [process.exitcode for process in self.alive]
        self.alive.clear()
        return statuses

    def rows(self):
        file = self.path / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def writing(self):
        return next((self.path / "checkpoints").glob(".step-*.partial"), None)


def kill_at(moment, run, chance):
    """Start `run` and kill it; returns what the kill fell into."""
    run.start()
    if moment == "start":
        time.sleep(chance.uniform(0.0, 0.6))
    else:
        run.wait_for_steps(chance.randrange(1, 8))
        if moment == "checkpoint":
            run.wait_for(run.writing)
        time.sleep(chance.uniform(0.0, 0.01))
    assert run.signal(signal.SIGKILL), run.said()
    assert set(run.finish()) == {-signal.SIGKILL}
    return "a checkpoint" if run.writing() else "a step" if run.rows() else "the start"


def assert_same(run, whole):
    rows, expected = comparable(metrics(run.path)), comparable(metrics(whole.path))
    assert rows == expected
    one, two = (RunDirectory(each.path).checkpoints()[-1] for each in (run, whole))
    assert one.step == two.step
    for mine, theirs in ((one.weights(), two.weights()), (one.optimizer_state(), two.optimizer_state())):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture
def recipe(workplace):
    return write_recipe(workplace / "recipe.yaml", CHANGES)


@pytest.fixture
def make_run():
    made = []

    def make(directory, recipe, processes=1):
        made.append(Run(directory, recipe, processes))
        return made[-1]

    yield make
    for run in made:
        for process in run.alive:
            process.kill()


@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 8)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(workplace, recipe, make_run, processes, kills):
    whole, run = (make_run(workplace / name, recipe, processes) for name in ("whole", "killed"))
    whole.start()
    assert whole.finish() == [0] * processes, whole.said()
    chance = random.Random(processes)
    moments = ["start", "step", "checkpoint", "checkpoint"] * (kills // 4)
    chance.shuffle(moments)
    found = [kill_at(moment, run, chance) for moment in moments]
    assert {"a checkpoint", "a step"} <= set(found), found
    run.start()
    assert run.finish() == [0] * processes, run.said()
    assert_same(run, whole)


@pytest.mark.parametrize("to_all", [True, False])
def test_two_processes_are_stopped_together(workplace, make_run, to_all):
    recipe = write_recipe(workplace / "recipe.yaml", {**CHANGES, "training.steps": 40})
    whole, run = (make_run(workplace / name, recipe, 2) for name in ("whole", "stopped"))
    run.start()
    run.wait_for_steps(3)
    if to_all:
        run.signal(signal.SIGTERM)
    else:
        os.kill(run.alive[1].pid, signal.SIGTERM)
    assert run.finish() == [0, 0], run.said()
    assert run.said().splitlines()[-1].endswith(" of 40; continue with --resume")
    assert "Traceback" not in run.said()
    for each in (run, whole):
        each.start()
        assert each.finish() == [0, 0], each.said()
    assert_same(run, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_during_calibration_ends_a_run_at_once(workplace, make_run, number, status):
    # Of 50 million tokens, which would take an hour.
    run = make_run(workplace / "run", write_recipe(workplace / "recipe.yaml", {"calibration.tokens": 50_000_000}))
    run.start()
    run.wait_for(lambda: "data  " in run.said())
    time.sleep(0.3)
    run.signal(number)
    assert run.finish() == [status]
    assert run.said().splitlines()[-1] == "stopped     before the first step; there is nothing to save"
    # Nothing of it is in the way of a second try.
    run.recipe = write_recipe(workplace / "recipe.yaml", {"training.steps": 1})
    run.start()
    assert run.finish() == [0], run.said()


def test_a_signal_while_the_libraries_load_ends_a_run_at_once(workplace, recipe):
    process = start("distill", recipe, "training.output_dir=run", cwd=workplace)
    try:
        while "libtorch_cpu" not in open(f"/proc/{process.pid}/maps").read():  # noqa: SIM115
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err.splitlines()[-1] == "stopped     before the first step; there is nothing to save"


def test_a_full_disk_is_survived_and_its_end_is_told(workplace, make_run, small_disk):
    # Room for two checkpoints of 300 kB; a file of the user's takes that of the second until it is removed.
    changes = {"training.steps": 6, "training.keep_last": 1, "training.evaluate_every": 1}
    recipe = write_recipe(workplace / "recipe.yaml", changes)
    whole, run = make_run(workplace / "whole", recipe), make_run(small_disk / "run", recipe)
    run.log = workplace / "run.log"
    subprocess.run(["fallocate", "-l", "150k", small_disk / "mine"], check=True)
    run.start()
    run.wait_for(lambda: "waiting" in run.said())
    run.signal(signal.SIGTERM)
    assert run.finish() == [1], run.said()
    said = run.said().splitlines()
    assert said[-1] == (
        f"error: step 6 of {run.path} is not saved; make room on the disk and go on from step 2 with --resume"
    )
    warnings = [line for line in said if line.startswith("warning     the checkpoint of step 4 cannot be written: ")]
    assert len(warnings) == 1
    assert warnings[0].endswith("No space left on device (os error 28); the last one is of step 2")
    assert [item.name for item in (run.path / "checkpoints").iterdir()] == ["step-000002"]
    (small_disk / "mine").unlink()
    for each in (run, whole):
        each.start()
        assert each.finish() == [0], each.said()
    assert_same(run, whole)
