"""Result files: what the user has is never overwritten, and no figure is nan."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest

from swiftkv_train import results
from swiftkv_train.cli import main
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.evaluate.report import check_report
from swiftkv_train.results import check_target, plot, save_plot, to_json, write_result

COMMANDS = {
    "layers": (["calibrate", "recipe.yaml", "--layers"], "swiftkv_train.layer_choice.predict"),
    "init": (["bench", "init", "recipe.yaml", "--output"], "swiftkv_train.bench.init.measure"),
    "quality": (["bench", "quality", "recipe.yaml", "--output"], "swiftkv_train.bench.quality.measure"),
    "stream": (["bench", "stream", "models/debug", "--output"], "swiftkv_train.bench.stream.measure"),
}
LAYERS = {
    **{"base": "models/debug", "num_hidden_layers": 6, "num_key_value_layers": 3, "context": 64},
    **{"uniform": [], "grouped": []},
}


def own(name):
    """An earlier result of the command."""
    return LAYERS if name == "layers" else {"command": f"swiftkv bench {name} x", "benchmark": "b", "summary": []}


@pytest.fixture
def swiftkv(make_recipe, monkeypatch, capsys):
    """Run a command of `COMMANDS` beside recipe.yaml, whose work is `work`: its exit status and standard error."""
    make_recipe()

    def run(name, target, work):
        arguments, place = COMMANDS[name]
        monkeypatch.setattr(place, work)
        monkeypatch.setattr(sys, "argv", ["swiftkv", *arguments, target])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().err

    return run


def forbidden(*arguments):
    pytest.fail("worked before it looked at its target")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("held", ["mine", "[]", "3", "[" * 5000, '{"command": 3}', "another", b"\xff", "recipe"])
def test_a_file_that_is_not_of_this_command_is_kept(swiftkv, name, held):
    if held == "another":
        held = json.dumps(own("quality" if name == "init" else "init"))
    target = Path("recipe.yaml" if held == "recipe" else "mine.json")
    if held != "recipe":
        target.write_bytes(held if isinstance(held, bytes) else held.encode())
    before = target.read_bytes()
    status, err = swiftkv(name, str(target), forbidden)
    assert status == 2
    says = "exists already and is no earlier result of this command; name another place"
    assert err == f"error: {COMMANDS[name][0][-1]} {target} {says}\n"
    assert target.read_bytes() == before


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("models", "models exists already and is no earlier result"),
        ("recipe.yaml/x.json", "recipe.yaml/x.json cannot be written: Not a directory"),
        (f"{'x' * 300}.json", "cannot be written: File name too long"),
        ("/dev/null", "/dev/null exists already and is no earlier result"),
    ],
)
def test_a_place_that_is_no_file_is_refused_before_the_work(swiftkv, name, target, says):
    status, err = swiftkv(name, target, forbidden)
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["layers", "quality", "stream"])
def test_a_picture_of_the_users_own_is_kept(swiftkv, name):
    Path("photo.png").write_text("mine")
    for target, says in (("photo.json", "photo.png exists already"), ("photo.png", "must name a JSON file")):
        status, err = swiftkv(name, target, forbidden)
        assert status == 2
        assert says in err
    assert Path("photo.png").read_text() == "mine"


def test_an_earlier_result_is_replaced_through_a_link_too(swiftkv):
    Path("real.json").write_text(json.dumps(own("init")))
    Path("result.json").symlink_to("real.json")
    new = {**own("init"), "benchmark": "new"}
    assert swiftkv("init", "result.json", lambda *_: new)[0] == 0
    assert Path("result.json").is_symlink()
    assert json.loads(Path("real.json").read_text()) == new
    assert swiftkv("init", "elsewhere/result.json", lambda *_: new)[0] == 0
    assert json.loads(Path("elsewhere/result.json").read_text()) == new


def test_a_figure_that_is_no_number_is_named_and_nothing_is_written(swiftkv):
    result = {**own("init"), "sources": {"prose": [1.0, {"kl": math.nan}]}}
    status, err = swiftkv("init", "result.json", lambda *_: result)
    assert status == 1
    assert err.startswith("error: swiftkv bench init x: sources.prose.1.kl is nan, so there is no result; ")
    assert not Path("result.json").exists()
    with pytest.raises(RunError, match="model a: loss is -inf, so"):
        to_json({"loss": -math.inf}, "model a")


def test_a_directory_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"--output .*/a/b.json cannot be written: no permission to write to "):
        check_target("--output", tmp_path / "a/b.json", lambda held: True)


def test_a_disk_that_refuses_leaves_the_earlier_result(tmp_path, small_files):
    from matplotlib import pyplot

    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.png").write_text("old")
    with small_files(100):
        with pytest.raises(UserError, match=r"--output .*a.json cannot be written: File too large"):
            write_result("--output", tmp_path / "a.json", {"text": "x" * 1000}, "")
        with pytest.raises(UserError, match=r"plot .*a.png cannot be written: File too large"):
            save_plot(pyplot.figure(), tmp_path / "a.png")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "{}", "a.png": "old"}


@pytest.mark.parametrize("name", ["report.json", "report.md", "quality.png", "position.png", "first_token.png"])
def test_a_report_takes_the_place_of_nothing_but_a_report(tmp_path, name):
    check_report(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="exists already"):
        check_report(tmp_path)
    report = {"checkpoint": "c", "base": "b", "sources": {}, "generations": []}
    (tmp_path / "report.json").write_text(json.dumps(report))
    check_report(tmp_path)


def test_permission_denied_anywhere_is_one_line(swiftkv):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/secret")

    assert swiftkv("init", "a.json", refuse) == (2, "error: /secret: Permission denied\n")


def test_without_matplotlib_there_is_the_result_and_no_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot({}, lambda result, pyplot: pytest.fail("drawn"), tmp_path / "result.json")
    assert capsys.readouterr().err == "no plots: matplotlib is not installed\n"
