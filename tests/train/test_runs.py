"""`swiftkv runs`: what it finds and what it says of each run."""

import json
import math
import os
from datetime import UTC, datetime

import pytest

from swiftkv_train.errors import UserError
from swiftkv_train.results import to_json
from swiftkv_train.run_directory import RunDirectory
from swiftkv_train.run_state import RunLock
from swiftkv_train.runs import list_runs, print_runs
from swiftkv_train.runs import to_json as runs_to_json


@pytest.fixture
def make_run(make_recipe, tmp_path):
    """A run at outputs/NAME as a process in `state` leaves it."""

    def make(name, state=None, rows=(), checkpoints=(), **changes):
        run = RunDirectory.create(tmp_path / "outputs" / name, make_recipe(**changes))
        if state is not None:
            run.write_json("state.json", state)
        for row in rows:
            run.metrics.append(row)
        for step in checkpoints:
            (run.path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        return run.path

    return make


ROWS = [
    {"step": 0, "held_out": {"prose": {"kl": 0.9, "tokens": 10}}},
    {"step": 10, "loss": 0.5},
    {"step": 10, "held_out": {"prose": {"kl": 0.4, "tokens": 30}, "chats": {"kl": 0.8, "tokens": 10}}},
    {"step": 20, "loss": 0.25},
]
ENDED = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-02T03:04:05+00:00"}


def test_what_a_run_is_doing_and_how_far_it_is(make_run, tmp_path):
    make_run("a/stopped", {"state": "stopped", **ENDED}, ROWS, [20, 24], training__steps=60)
    make_run("b/killed", {"state": "running", "started": ENDED["started"]}, ROWS, [10], training__steps=60)
    make_run("c", {"state": "failed", "error": "the loss is nan", **ENDED}, [], training__steps=60)
    running = make_run("d", {"state": "running", "started": ENDED["started"]}, ROWS[:2], training__steps=60)
    os.utime(running / "metrics.jsonl", (2e9, 2e9))
    lock = RunLock(running)
    lock.take()
    # What is no run, or lies inside of one.
    (tmp_path / "outputs/b/killed/checkpoints/step-000010/recipe.yaml").write_text("")
    (tmp_path / "outputs/b/killed/checkpoints/step-000010/state.json").write_text("{}")
    (tmp_path / "outputs/recipes").mkdir()
    (tmp_path / "outputs/recipes/recipe.yaml").write_text("")

    stopped, killed, failed, living = list_runs(tmp_path / "outputs")
    assert [run.path for run in (stopped, killed, failed, living)] == [
        str(tmp_path / "outputs" / name) for name in ("a/stopped", "b/killed", "c", "d")
    ]
    assert (stopped.state, stopped.step, stopped.steps, stopped.checkpoint_step) == ("stopped", 24, 60, 24)
    assert (stopped.base, stopped.when) == ("models/debug", ENDED["ended"])
    assert (stopped.loss, stopped.held_out_kl) == (0.25, pytest.approx((0.4 * 30 + 0.8 * 10) / 40))
    assert (killed.state, killed.step, killed.checkpoint_step) == ("crashed", 20, 10)
    assert (failed.state, failed.error, failed.step, failed.loss) == ("failed", "the loss is nan", 0, None)
    assert (living.state, living.error, living.step, living.held_out_kl) == ("running", None, 10, 0.9)
    assert datetime.fromisoformat(living.when) == datetime.fromtimestamp(2e9, UTC)
    lock.release()
    assert list_runs(running)[0].state == "crashed"  # a run is also found when it is itself what is asked for


def test_a_run_that_is_resumed_is_running_whatever_it_was(make_run, tmp_path):
    run = make_run("r", {"state": "failed", "error": "the loss is nan", **ENDED})
    lock = RunLock(run)
    lock.take()
    (found,) = list_runs(tmp_path)
    assert (found.state, found.error) == ("running", None)
    lock.release()


def test_one_damaged_run_does_not_hide_the_others(make_run, tmp_path):
    first, second, third = (make_run(name, {"state": "finished", **ENDED}) for name in "abc")
    (first / "state.json").write_text("{")
    (second / "metrics.jsonl").write_text("no JSON\n")
    found = list_runs(tmp_path)
    assert [run.state for run in found] == ["damaged", "damaged", "finished"]
    assert "state.json is damaged; remove it" in found[0].error
    assert "metrics.jsonl is damaged" in found[1].error
    assert found[2].path == str(third)


ODD = {
    "state is a list": ("state.json", "[]"),
    "state is deep": ("state.json", "[" * 5000),
    "no date": ("state.json", '{"state": "finished", "ended": "yesterday"}'),
    "date is a number": ("state.json", '{"state": "finished", "ended": 3}'),
    "row is a number": ("metrics.jsonl", "3\n"),
    "row without step": ("metrics.jsonl", '{"loss": 1.0}\n'),
    "loss is text": ("metrics.jsonl", '{"step": 1, "loss": "low"}\n'),
    "held out is a list": ("metrics.jsonl", '{"step": 1, "held_out": [1]}\n'),
    "no source": ("metrics.jsonl", '{"step": 1, "held_out": {}}\n'),
    "recipe is a tag": ("recipe.yaml", "!!int x"),
    "recipe is binary": ("recipe.yaml", "\0"),
    "checkpoints is a file": ("checkpoints", "mine"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_run_of_odd_files_is_damaged_and_the_others_are_shown(make_run, tmp_path, capsys, odd):
    first, second = (make_run(name, {"state": "finished", **ENDED}, ROWS) for name in "ab")
    name, content = ODD[odd]
    (first / name).write_text(content)
    found = list_runs(tmp_path)
    assert [run.state for run in found] == ["damaged", "finished"]
    print_runs(found, tmp_path)
    json.loads(to_json(runs_to_json(found), "runs"))
    assert str(second) in capsys.readouterr().out


def test_a_figure_that_is_no_number_is_left_out(make_run, tmp_path):
    rows = [*ROWS, {"step": 30, "loss": math.nan}, {"step": 30, "held_out": {"a": {"kl": math.inf, "tokens": 3}}}]
    run = make_run("a", {"state": "finished", **ENDED}, rows)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    with (run / "metrics.jsonl").open("a") as file:  # as they were written once
        file.write('{"step": 40, "loss": NaN}\n{"step": 40, "held_out": {"a": {"kl": NaN, "tokens": 3}}}\n')
    (found,) = list_runs(tmp_path)
    assert (found.state, found.step, found.loss, found.held_out_kl) == ("finished", 40, None, None)


def test_names_are_shown_as_they_are(make_run, tmp_path, capsys):
    name = os.fsdecode(b"[red]\xff")
    make_run(name, {"state": "[bold]odd[/bold]", **ENDED}, ROWS, model__base="models/[/x]")
    print_runs(list_runs(tmp_path), tmp_path)
    out = capsys.readouterr().out
    assert "outputs/[red]?" in out
    assert "models/[/x]" in out
    assert "[bold]odd[/bold]" in out


def test_no_directory_and_no_runs(tmp_path, capsys):
    with pytest.raises(UserError, match="absent is not a directory; `swiftkv distill` makes runs"):
        list_runs(tmp_path / "absent")
    print_runs(list_runs(tmp_path), tmp_path)
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_the_table_has_a_line_for_every_run_and_one_for_every_error(make_run, tmp_path, capsys):
    path = make_run("a" * 150, {"state": "failed", "error": "the [bold] loss is nan", **ENDED}, ROWS)
    print_runs(list_runs(tmp_path), tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if str(path) in line]
    assert lines[0][:3] == [str(path), "models/debug", "failed"]
    assert lines[0][3:6] == ["20/4", "0.2500", "0.5000"]
    assert lines[1] == [f"{path}:", "the", "[bold]", "loss", "is", "nan"]


def test_json_has_every_field(make_run, tmp_path, capsys):
    from swiftkv_train.cli import app

    make_run("a", {"state": "finished", **ENDED}, ROWS, [20])
    app(args=["runs", str(tmp_path), "--json"], standalone_mode=False)
    (found,) = json.loads(capsys.readouterr().out)
    assert set(found) == {
        *("path", "state", "base", "step", "steps", "checkpoint_step", "loss", "held_out_kl", "when", "error")
    }
    assert found["state"] == "finished"
