"""Trackers: what they are given, how a resumed run goes on in them, and that none of them can stop a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_files import history, records, serving

from swiftkv_train.errors import UserError
from swiftkv_train.recipe_file import load_recipe
from swiftkv_train.tracking import _wandb_id, open_trackers

DEBUG_RECIPE = Path(__file__).parents[2] / "recipes/debug/debug.yaml"


def train(step, **figures):
    return {"step": step, "loss": 1 / step, "grad_norm": None, **figures}


def held_out(step, kl):
    return {"step": step, "held_out": {"prose": {"kl": kl, "tokens": 9}}}


@pytest.fixture
def session(tmp_path):
    """One process of a run: what it logs, and what it warns of."""

    def run(rows, *overrides, resumed_step=None, enabled=True):
        warnings = []
        recipe = load_recipe(DEBUG_RECIPE, list(overrides))
        with open_trackers(
            recipe, tmp_path, resumed_step=resumed_step, enabled=enabled, warn=warnings.append
        ) as trackers:
            for row in rows:
                trackers.log(row)
        return warnings

    return run


def test_without_the_recipe_asking_there_is_nothing(session, tmp_path):
    assert session([train(1)]) == []
    assert session([train(1)], "logging.tensorboard=true", "logging.wandb.project=p", enabled=False) == []
    assert list(tmp_path.iterdir()) == []


# TensorBoard


def scalars(directory):
    """Step and value of every scalar, by tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory / "tensorboard"))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_every_figure_at_its_step(session, tmp_path):
    pytest.importorskip("tensorboard")
    assert session([held_out(0, 0.5), train(1), train(2), held_out(2, 0.25)], "logging.tensorboard=true") == []
    assert scalars(tmp_path) == {
        "loss": [(1, 1.0), (2, 0.5)],
        "held_out/prose/kl": [(0, 0.5), (2, 0.25)],
        "held_out/prose/tokens": [(0, 9.0), (2, 9.0)],
    }


@pytest.mark.parametrize(("resumed_step", "kept"), [(2, [1, 2]), (None, [])])
def test_tensorboard_forgets_the_steps_that_a_resumed_run_makes_again(session, tmp_path, resumed_step, kept):
    pytest.importorskip("tensorboard")
    session([train(step) for step in (1, 2, 3, 4)], "logging.tensorboard=true")
    again = [{"step": step, "loss": 8.0} for step in (3, 4, 5)]
    session(again, "logging.tensorboard=true", resumed_step=resumed_step)
    assert scalars(tmp_path)["loss"] == [*((step, 1 / step) for step in kept), (3, 8.0), (4, 8.0), (5, 8.0)]


# Weights & Biases, the real client. It keeps settings for the life of a process: each session has its own.

SESSION = """
import json, sys
from pathlib import Path
from swiftkv_train.errors import UserError
from swiftkv_train.recipe_file import load_recipe
from swiftkv_train.tracking import _wandb_id, open_trackers

rows, overrides, recipe, kill = json.loads(sys.argv[1])
warn = lambda text: print(text, flush=True)
try:
    with open_trackers(load_recipe(recipe, overrides), Path(), resumed_step=None, enabled=True, warn=warn) as trackers:
        for row in rows:
            trackers.log(row)
            if kill and row["step"] == 1:
                import psutil
                for child in psutil.Process().children(recursive=True):
                    child.kill()
                    child.wait()
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def wandb_session(tmp_path):
    """One process of a run whose recipe asks for wandb: its status and what it said."""
    pytest.importorskip("wandb")

    def run(rows, *overrides, url="http://127.0.0.1:9", key=None, kill=False):  # nobody listens at the default
        overrides = ["logging.wandb.project=p", *overrides]
        arguments = json.dumps([rows, overrides, str(DEBUG_RECIPE), kill])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment = {**inherited, "WANDB_SILENT": "true", "WANDB_BASE_URL": url, "WANDB_ERROR_REPORTING": "false"}
        if key:
            environment["WANDB_API_KEY"] = key
        result = subprocess.run(
            [sys.executable, "-c", SESSION, arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return result.returncode, result.stdout.splitlines()

    return run


def test_wandb_offline_keeps_one_id(wandb_session, tmp_path):
    offline = "logging.wandb.mode=offline"
    assert wandb_session([held_out(0, 0.5), train(1), train(2), train(3)], offline) == (0, [])
    (first,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # What a killed process logged after step 2 comes again.
    assert wandb_session([train(3), train(4)], offline) == (0, [])
    (second,) = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - {first}
    assert history(first) == [
        {"step": 0, "held_out/prose/kl": 0.5, "held_out/prose/tokens": 9},
        *({"step": step, "loss": 1 / step} for step in (1, 2, 3)),
    ]
    assert history(second) == [{"step": step, "loss": 1 / step} for step in (3, 4)]
    runs = [record.run for file in (first, second) for record in records(file) if record.HasField("run")]
    assert {run.run_id for run in runs} == {(tmp_path / "wandb/id").read_text()}
    assert {run.project for run in runs} == {"p"}


def test_a_wandb_id_that_was_cut_off_is_made_anew(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/id").write_text("")
    made = _wandb_id(tmp_path)
    assert len(made) == 8
    assert _wandb_id(tmp_path) == made


def test_wandb_online_goes_on_in_the_same_run(wandb_session):
    with serving() as server:
        online = {"url": server.url, "key": "0" * 40}
        assert wandb_session([train(1), train(2), train(3)], **online) == (0, [])
        assert server.resumed == []
        assert wandb_session([train(3), train(4)], **online) == (0, [])
        (name,) = server.rows
        assert server.resumed == [name]
        rows = server.rows[name]
    assert [(row["step"], row["loss"]) for row in rows] == [(step, 1 / step) for step in (1, 2, 3, 3, 4)]
    # wandb drops a row whose own step does not rise.
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]


def test_wandb_that_cannot_start_ends_the_run_with_one_line(wandb_session):
    status, (error,) = wandb_session([train(1)])
    assert status == 2
    assert error.startswith("logging.wandb does not start: No API key configured.")
    assert error.endswith("; run `wandb login`, or set logging.wandb.mode=offline")


def test_wandb_that_dies_does_not_take_the_run_with_it(wandb_session, tmp_path):
    pytest.importorskip("tensorboard")
    rows = [train(step) for step in range(1, 200)]
    status, (warning,) = wandb_session(rows, "logging.wandb.mode=offline", "logging.tensorboard=true", kill=True)
    assert status == 0
    assert warning.startswith("warning     wandb failed (")
    assert warning.endswith(") and is left; metrics.jsonl has every figure")
    assert len(scalars(tmp_path)["loss"]) == len(rows)


# What is not installed


@pytest.mark.parametrize(
    ("module", "override", "extra"),
    [
        ("wandb", "logging.wandb.project=p", "wandb"),
        ("torch.utils.tensorboard", "logging.tensorboard=true", "tensorboard"),
    ],
)
def test_a_missing_package_is_named_by_its_extra(session, monkeypatch, module, override, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"logging\.{extra} needs {extra}: pip install 'swiftkv-train\[{extra}\]'"):
        session([], override)
