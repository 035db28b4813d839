"""`swiftkv bench quality`: what it reports is what each variant's own run logged, and it goes on where it was."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from debug_recipe import metrics, write_recipe
from swiftkv_train.bench import quality
from swiftkv_train.distill import Distillation
from swiftkv_train.quality import Quality, by_kind, pooled
from swiftkv_train.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
TEST = [
    {"name": "prose", "path": "data/debug/prose.held_out.jsonl"},
    {"name": "elsewhere", "path": "data/debug/chats.held_out.jsonl"},
]


@pytest.fixture
def variants(bench):
    """Two recipes beside recipe.yaml, which differ in their start."""
    write_recipe(Path("calibrated.yaml"), {"data.test": TEST})
    Path("copied.yaml").write_text("extends: calibrated.yaml\nrewrite: {init: copy}\n")
    return ["copied.yaml", "calibrated.yaml"]


def test_every_point_is_of_the_variants_own_run(result_of, variants):
    result = result_of("quality", *variants, "--points", "2", "--tokens", "256", "--runs", "runs", "training.steps=4")
    assert [variant["name"] for variant in result["variants"]] == ["copied", "calibrated"]
    for variant in result["variants"]:
        logged = [row for row in metrics(Path("runs", variant["name"])) if "held_out" in row]
        assert [point["tokens"] for point in variant["points"]] == [step * 8 * 64 for step in (0, 2, 4)]
        for point, row in zip(variant["points"], logged, strict=True):
            assert point["sources"] == row["held_out"]
            assert point["all kinds trained on"]["kl"] == pytest.approx(row["held_out"]["prose"]["kl"])
            assert point["other kinds"]["kl"] == pytest.approx(row["held_out"]["elsewhere"]["kl"])
        assert (
            variant["last_training_kl"]
            == [row["kl"] for row in metrics(Path("runs", variant["name"])) if "kl" in row][-1]
        )
    copied, calibrated = result["variants"]
    assert copied["settings"] == {"rewrite.init": "copy"}
    assert calibrated["settings"] == {"rewrite.init": "calibrated"}
    last = copied["points"][-1]["all together"]["kl"]
    reached = [point["tokens"] for point in calibrated["points"] if point["all together"]["kl"] <= last]
    assert calibrated["as_good_as_first"]["all together"] == {"kl": last, "tokens": min(reached, default=None)}
    assert Path("results/result.png").stat().st_size > 5000


def test_groups_of_layers_are_one_setting(variants):
    Path("grouped.yaml").write_text("extends: calibrated.yaml\nrewrite: {key_value_groups: [[3], [4, 5]]}\n")
    plain, grouped = (quality.settings_of(load_recipe(name)) for name in ("calibrated.yaml", "grouped.yaml"))
    assert {key: grouped[key] for key in grouped if grouped[key] != plain[key]} == {
        "rewrite.key_value_groups": [[3], [4, 5]]
    }
    assert plain.keys() == grouped.keys()


def test_a_second_call_trains_nothing_again(bench, variants, monkeypatch):
    call = ["quality", *variants, "--points", "1", "--tokens", "256", "--runs", "runs", "--json"]
    status, first, _ = bench(*call)
    assert status == 0
    monkeypatch.setattr("swiftkv_train.distill.Distillation.train_step", lambda self: pytest.fail("trained again"))
    status, second, _ = bench(*call)
    assert status == 0
    assert json.loads(second)["variants"] == json.loads(first)["variants"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_signal_has_stopped_goes_on_where_it_was(bench, result_of, variants, monkeypatch, number):
    plain, seen = Distillation.train_step, []

    def train_step(self):
        if len(seen) == 1:
            seen.append("signal")
            signal.raise_signal(number)
        row = plain(self)
        seen.append(self.step)
        return row

    monkeypatch.setattr(Distillation, "train_step", train_step)
    call = ["quality", *variants, "--points", "1", "--tokens", "256"]
    status, out, err = bench(*call, "--runs", "my #1 runs")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "error: copied was stopped; the same command goes on from there"
    stopped = result_of(*call, "--runs", "my #1 runs")
    assert seen == [1, "signal", 2, 3, 4, 1, 2, 3, 4]  # of both variants every step once
    whole = result_of(*call)
    for variant, other in zip(stopped["variants"], whole["variants"], strict=True):
        assert variant["points"] == other["points"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["training.steps=2"], "give the recipes to compare"),
        (["calibrated.yaml", "calibrated.yaml"], "two recipes are named calibrated"),
        (["calibrated.yaml", "other.yaml"], "calibrated and other cannot be compared: data.sequence_length differs"),
        (
            ["calibrated.yaml", "longer.yaml"],
            "calibrated and longer cannot be compared: training.steps x training.batch_size differs",
        ),
        (["calibrated.yaml", "none.yaml"], "recipe none.yaml does not exist"),
        (["recipe.yaml"], "recipe recipe.yaml names no data.test to measure on"),
        (["calibrated.yaml", "--on", "train"], "--on 'train' is not known; use test or held_out"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(bench, variants, arguments, says):
    Path("other.yaml").write_text("extends: calibrated.yaml\ndata: {sequence_length: 32}\n")
    Path("longer.yaml").write_text("extends: calibrated.yaml\ntraining: {steps: 99}\n")
    status, out, error = bench("quality", *arguments)
    assert (status, out) == (2, "")
    assert says in error
    assert error.count("\n") == 1
    assert not Path("outputs/quality").exists()


def test_pooling_weighs_sources_by_their_tokens():
    one, other = Quality(100, 0.1, 0.5, 10.0, 20.0), Quality(300, 0.3, 0.7, 10.0, 10.0)
    both = pooled([one, other])
    assert (both.tokens, both.kl, both.agreement) == (400, pytest.approx(0.25), pytest.approx(0.65))
    assert both.perplexity_ratio == pytest.approx(2**0.25)
    assert both == by_kind({"a": one, "b": other}, {"b"})["all together"]
    assert by_kind({"a": one, "b": other}, {"b"})["other kinds"].kl == one.kl
    assert by_kind({"a": one}, {"b"}).keys() == {"other kinds", "all together"}


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/smollm2-135m/quality").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_studys_recipes_can_be_compared(file):
    reference, recipe = load_recipe(ROOT / "recipes/smollm2-135m/quality/reference.yaml"), load_recipe(file)
    assert quality._shared(recipe) == quality._shared(reference)
    assert (recipe.training.steps, recipe.training.batch_size) == (
        reference.training.steps,
        reference.training.batch_size,
    )


@pytest.mark.slow
def test_ideas_are_what_they_say(variants):
    """Each trains, differs from the recipe as it is, and is told apart; by the command that the study's text gives."""
    output = Path("ideas.json")
    command = [sys.executable, str(ROOT / "benchmarks/quality/ideas.py"), "calibrated.yaml", "training.steps=8"]
    command += ["rewrite.key_value_group_size=2"]  # or one idea would change nothing
    command += ["--tokens", "256", "--runs", "ideas", "--output", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, *others = json.loads(output.read_text())["variants"]
    assert first["name"] == "as_it_is"
    for variant in others:
        assert variant["settings"]["idea"] != "none"
        assert variant["points"][-1]["sources"] != first["points"][-1]["sources"], variant["name"]
    wrong = subprocess.run([*command, "no_such_idea"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "there is no idea no_such_idea" in wrong.stderr
    alone = [part for part in command if "group_size" not in part]
    wrong = subprocess.run([*alone, "rows"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "rows is about layers that share K/V" in wrong.stderr


def test_the_limit_is_of_what_is_not_put_back(variants):
    """With the base's own K and V in the whole tail the calibrated model is the base; without, it is what the quality
    bench starts from; and wrong recipes are told in a line."""
    command = [sys.executable, str(ROOT / "benchmarks/quality/limit.py"), "calibrated.yaml", "--tokens", "256"]
    ended = subprocess.run([*command, "--output", "limit.json"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = {row["own"]: row["all kinds trained on"] for row in json.loads(Path("limit.json").read_text())["rows"]}
    assert list(rows) == ["none", "K", "V", "V of layers 5 to 5", "K and V"]
    whole = rows.pop("K and V")
    # fp32: a KL of differences that are rounding's
    assert abs(whole["kl"]) < 1e-6
    assert whole["agreement"] == 1
    assert min(row["kl"] for row in rows.values()) > 1e-4
    options = {"tokens": 256, "points": 1, "overrides": (), "run": Path("run"), "on": quality.TEST}
    recipe = quality.variant_of("calibrated.yaml", **options)
    run = Distillation(recipe)
    run.prepare()
    start = by_kind(run.evaluate(), {"prose"})["all kinds trained on"]
    assert rows["none"]["kl"] == pytest.approx(start.to_dict()["kl"], rel=1e-3)
    run.strategy.close()
    wrong = subprocess.run([*command, "rewrite.key_value_group_size=2"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "layers that share K/V have none of their own to put back" in wrong.stderr
