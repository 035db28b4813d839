"""Predicted losses against their formula on explicitly collected tokens, and the search against all groupings."""

import copy
import itertools
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from packed import packed_batch
from transformers import AutoModelForCausalLM

from swiftkv_models import rewrite
from swiftkv_models.llama import uniform_groups
from swiftkv_train import layer_choice
from swiftkv_train.calibrate import solve
from swiftkv_train.cli import main
from swiftkv_train.layer_choice import Predictor, accumulate, candidate_layers, predictions, sum_bytes
from swiftkv_train.moments import accumulate_moments
from swiftkv_train.plan import layers
from swiftkv_train.recipe_file import load_recipe
from swiftkv_train.shared_projections import complex_halves
from tiny import tiny_llama

RIDGE = 1e-2


@pytest.fixture(scope="module")
def batches():
    return [packed_batch(4, 33, seed, padding) for seed, padding in ((0, 0), (1, 7), (2, 20))]


@pytest.fixture(params=["smollm2", "bias"])
def base(request):
    return tiny_llama(request.param)


def predictor_of(base, batches, first=2, **form):
    model = rewrite(copy.deepcopy(base), num_key_value_layers=first, **form)
    return Predictor(model, accumulate(model, batches, "cpu"), RIDGE)


class Tokens:
    """What the base's layers take at the real tokens, collected through transformers' own outputs."""

    def __init__(self, base, batches):
        self.config, self.layers = base.config, base.model.layers
        self.positions = [batch.position_ids for batch in batches]
        self.masks = [batch.token_mask for batch in batches]
        with torch.no_grad():
            streams = [
                base.model(
                    batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
                ).hidden_states
                for batch in batches
            ]
            self.normed = [
                [layer.input_layernorm(of_batch[index]) for of_batch in streams]
                for index, layer in enumerate(self.layers)
            ]  # [layer][batch] [B, T, D]

    def projected(self, layer, name, batch):
        module = getattr(self.layers[layer].self_attn, f"{name}_proj")
        return module(self.normed[layer][batch]).detach().unflatten(2, (-1, self.config.head_dim))

    def extended(self, first, batch):
        x = self.normed[first][batch]
        return torch.cat([x, torch.ones_like(x[..., :1])], -1) if self.config.attention_bias else x

    def solution(self, first, layer, name, fitted_on):
        """Ridge projection of K or V of a layer from X_l [D, G, C], on the real tokens of some batches."""
        x = torch.cat([self.extended(first, batch)[self.masks[batch]] for batch in fitted_on])
        y = torch.cat([self.projected(layer, name, batch)[self.masks[batch]] for batch in fitted_on])
        width = self.config.hidden_size
        penalty = torch.zeros(len(x[0]), dtype=x.dtype)
        penalty[:width] = RIDGE * x[:, :width].square().sum(0).mean()
        return torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ y.flatten(1)).unflatten(1, y.shape[1:])


def turned(x, positions, theta):
    """RoPE on [T, heads, C]."""
    size = x.shape[-1]
    angles = positions[:, None, None].double() * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    rotated = complex_halves(x) * torch.exp(1j * angles)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def attention_output(tokens, layer, batch, keys, values):
    """The base's queries over K and V [B, T, G, C]: [B, T, H, C], token by token."""
    queries = tokens.projected(layer, "q", batch)
    ratio = queries.shape[2] // keys.shape[2]
    output = torch.zeros_like(queries)
    for row, positions in enumerate(tokens.positions[batch]):
        q, k = (turned(x[row], positions, tokens.config.rope_parameters["rope_theta"]) for x in (queries, keys))
        starts = torch.where(positions == 0, torch.arange(len(positions)), 0).cummax(0).values
        for t, start in enumerate(starts.tolist()):
            for head in range(queries.shape[2]):
                scores = k[start : t + 1, head // ratio] @ q[t, head] / queries.shape[3] ** 0.5
                output[row, t, head] = torch.softmax(scores, 0) @ values[row, start : t + 1, head // ratio]
    return output


def naive_errors(predictor, tokens, layer, keys, values, batch=0):
    """g'd of the sampled batch's real tokens."""
    own = (tokens.projected(layer, name, batch) for name in "kv")
    wrong = attention_output(tokens, layer, batch, keys, values) - attention_output(tokens, layer, batch, *own)
    gradients = predictor.sums.samples[batch].gradients[layer].permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, T, H, C]
    return (wrong * gradients).sum((2, 3))[tokens.masks[batch]]


# transformers computes angles and norms in fp32: 1e-7 of them, and the condition of the ridge system above it.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.mark.parametrize("first", [1, 3, 5])
def test_every_l_from_one_pass_is_the_formula_on_the_tokens(base, batches, first):
    predictor, tokens = predictor_of(base, batches), Tokens(base, batches)
    total = 0.0
    for layer in range(first, 6):
        fitted = (
            torch.einsum("btd,dgc->btgc", tokens.extended(first, 0), tokens.solution(first, layer, name, [1, 2]))
            for name in "kv"
        )
        wanted = naive_errors(predictor, tokens, layer, *fitted)
        torch.testing.assert_close(predictor.group_errors(first, layer, 1), wanted, **CLOSE)
        total = total + wanted
    loss = predictor.loss(first, [[layer] for layer in range(first, 6)])
    assert loss == pytest.approx(float(total.square().mean()) / 2, rel=1e-2)


def test_a_group_is_that_of_the_calibrated_model(base, batches):
    """The K and V that `calibrate` gives a group, met by its changed queries, err as predicted for it."""
    predictor, tokens = predictor_of(base, batches), Tokens(base, batches)
    model = rewrite(copy.deepcopy(base), num_key_value_layers=2, key_value_groups=[[2], [3, 4, 5]])
    moments = accumulate_moments(model, batches[1:], "cpu", weighting="none")
    for layer in (3, 4, 5):  # felt as by the sample
        gradients = predictor.sums.samples[0].gradients[layer].permute(0, 3, 1, 2, 4)[batches[0].token_mask]
        moments.sensitivities[layer - 2] += torch.einsum("ngrc,ngre->gce", gradients, gradients)
    solve(model, moments, RIDGE)
    size, groups = base.config.head_dim, base.config.num_key_value_heads
    attention = model.model.layers[3].self_attn
    keys, values = (
        projection(tokens.normed[2][0]).detach().unflatten(2, (groups, size))
        for projection in (attention.k_proj_swiftkv, attention.v_proj_swiftkv)
    )
    total = 0.0
    for layer in (3, 4, 5):
        # Queries T'q are keys T k: T is read off the two q_proj of a K/V head.
        member = model.model.layers[layer].self_attn
        own, changed = (
            projection.weight.detach().unflatten(0, (groups, -1, size)).transpose(1, 2).flatten(2)  # [G, C, R D]
            for projection in (member.q_proj, member.q_proj_swiftkv)
        )
        turns = torch.linalg.lstsq(own.mT, changed.mT).solution  # [G, C, C], q -> T'q
        compensated = torch.einsum("gce,btge->btgc", turns, keys)
        total = total + naive_errors(predictor, tokens, layer, compensated, values)
    torch.testing.assert_close(predictor.group_errors(2, 3, 3), total, rtol=1e-2, atol=1e-3)


def test_gradients_are_those_of_drawn_tokens(base, batches):
    """Their mean square over draws is the Fisher information: exact, from every token that could be drawn."""
    model = rewrite(copy.deepcopy(base), num_key_value_layers=2)
    batch, layer = packed_batch(1, 9, 3, 0), 4
    draws = accumulate(model, [batch] * 400, "cpu", samples=400).samples
    found = torch.stack([sample.gradients[layer][0] for sample in draws]).square().mean(0).sum((0, 1, 3))  # [T]
    seen = {}
    handle = base.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
        lambda _module, inputs: seen.update(x=inputs[0].detach().requires_grad_()) or (seen["x"],)
    )
    logits = base(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
    handle.remove()
    log_p = torch.log_softmax(logits, -1)
    exact = torch.zeros(9, dtype=torch.float64)
    for t in range(9):
        for token in range(log_p.shape[1]):
            (gradient,) = torch.autograd.grad(log_p[t, token], seen["x"], retain_graph=True)
            exact += log_p[t, token].exp().detach() * gradient[0].square().sum(-1)
    # 400 draws: a standard error of some per cent where few tokens decide.
    torch.testing.assert_close(found, exact, rtol=0.25, atol=0)


def test_layers_that_are_linear_in_an_earlier_one_lose_nothing(base, batches):
    with torch.no_grad():
        for layer in base.model.layers[2:]:
            for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
                parameter.mul_(0 if layer is not base.model.layers[-1] else 1)
    model = rewrite(base, num_key_value_layers=2)
    predictor = Predictor(model, accumulate(model, batches, "cpu"), 1e-12)
    assert predictor.loss(2, [[2], [3], [4], [5]]) < 1e-9
    assert predictor.loss(1, [[1], [2], [3], [4], [5]]) > 1e-3


def test_the_best_groupings_are_the_best_of_all(base, batches, monkeypatch):
    predictor = predictor_of(base, batches, first=1)
    for largest in (8, 2):
        monkeypatch.setattr(layer_choice, "LARGEST_GROUP", largest)
        monkeypatch.setattr(layer_choice, "BEAM", 16)  # all ways
        everything: dict[int, list] = {}
        for cuts in itertools.product((False, True), repeat=4):
            groups = [[1]]
            for layer, cut in zip(range(2, 6), cuts, strict=True):
                groups.append([layer]) if cut else groups[-1].append(layer)
            if max(map(len, groups)) <= largest:
                everything.setdefault(len(groups), []).append((predictor.loss(1, groups), groups))
        found = predictor.best_groups(1)
        assert [len(groups) for groups, _ in found] == sorted(everything)
        for groups, loss in found:
            best, its_groups = min(everything[len(groups)])
            assert loss == pytest.approx(best)
            assert groups == its_groups


def test_candidates_are_thinned_out_where_their_sums_would_not_fit(monkeypatch):
    config = rewrite(tiny_llama(layers=9), num_key_value_layers=4).config
    assert candidate_layers(config, 4) == list(range(1, 9))
    monkeypatch.setattr(layer_choice, "MOST_BYTES", sum_bytes(config, range(1, 9), 4) - 1)
    found = candidate_layers(config, 4)
    assert found == [2, 4, 6, 8]
    sums = accumulate(rewrite(tiny_llama(layers=9), num_key_value_layers=4), [], "cpu")
    held = [*sums.inputs.values(), *sums.products.values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == sum_bytes(config, found, 8)
    monkeypatch.setattr(layer_choice, "MOST_BYTES", 1)
    assert candidate_layers(config, 4) == [4]


def test_what_is_saved_is_that_of_the_form(batches):
    model = rewrite(tiny_llama(), num_key_value_layers=2, key_value_group_size=2)
    result = predictions(model, accumulate(model, batches, "cpu"), RIDGE, 64, lambda amount: None)
    rows = {(row["num_key_value_layers"], row["key_value_group_size"]): row for row in result["uniform"]}
    assert rows.keys() == {(first, size) for first in range(1, 6) for size in (1, 2, 4) if first + size <= 6}
    assert rows[2, 2]["relative"] == pytest.approx(1.0)
    assert rows[2, 2]["cache_ratio"] == pytest.approx(4 / 6)
    assert rows[2, 4]["cache_ratio"] == pytest.approx(3 / 6)
    assert rows[4, 1]["cache_ratio"] == 1.0
    assert [row["prefill_ratio"] for row in (rows[1, 1], rows[2, 1], rows[5, 1])] == sorted(
        row["prefill_ratio"] for row in (rows[1, 1], rows[2, 1], rows[5, 1])
    )
    assert [row["cache_ratio"] for row in result["grouped"]] == pytest.approx([(2 + n) / 6 for n in (1, 2, 3, 4)])
    for row in result["grouped"]:
        assert [layer for group in row["key_value_groups"] for layer in group] == [2, 3, 4, 5]


@pytest.fixture
def swiftkv(make_recipe, monkeypatch, capsys):
    make_recipe()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["swiftkv", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_writes_what_plan_shows(swiftkv):
    status, shown, err = swiftkv("calibrate", "recipe.yaml", "--layers", "look/layers.json")
    assert status == 0, err
    result = json.loads(Path("look/layers.json").read_text())
    assert result["tokens"] > 1500  # of the recipe's 2,048, less padding
    assert {row["num_key_value_layers"] for row in result["uniform"]} == {1, 2, 3, 4, 5}
    assert "predicted loss by l" in shown
    assert "best groupings, l = 3" in shown
    assert shown.endswith("plotted in look/layers.png\n")
    assert Path("look/layers.png").stat().st_size > 5000
    assert not Path("outputs/debug/run").exists()
    status, planned, _ = swiftkv("plan", "recipe.yaml", "--layers", "look/layers.json")
    assert status == 0
    assert planned.endswith(shown)
    status, planned, _ = swiftkv("plan", "recipe.yaml", "--layers", "look/layers.json", "--json")
    assert json.loads(planned)["layers"] == result


def test_forms_within_a_budget(swiftkv):
    swiftkv("calibrate", "recipe.yaml", "--layers", "layers.json")
    result = json.loads(Path("layers.json").read_text())
    budget = ["--layers", "layers.json", "--prefill-budget", "0.8", "--kv-budget", "0.7"]
    status, planned, _ = swiftkv("plan", "recipe.yaml", *budget, "--json")
    assert status == 0
    found = json.loads(planned)["layers"]["within_budget"]
    expected = [
        row["loss"]
        for row in (*result["uniform"], *result["grouped"])
        if row["prefill_ratio"] <= 0.8 and row["cache_ratio"] <= 0.7
    ]
    losses = [row["loss"] for row in found["rows"]]
    assert (losses[0], losses) == (min(expected), sorted(losses))
    assert set(losses) == set(expected)
    forms = [
        row.get("key_value_groups") or uniform_groups(row["num_key_value_layers"], 6, row["key_value_group_size"])
        for row in found["rows"]
    ]
    assert len({str(form) for form in forms}) == len(forms)  # those that are in both lists come once
    status, shown, _ = swiftkv("plan", "recipe.yaml", *budget)
    shown = " ".join(shown.split())
    assert "at most 80% of the base's prefill FLOPs and 70% of the base's K/V bytes: the least loss first" in shown
    for row in found["rows"]:  # what is printed can be typed
        form = load_recipe("recipe.yaml", shlex.split(row["overrides"])).rewrite
        assert form.num_key_value_layers == row["num_key_value_layers"]
        sizes = [len(group) for group in row.get("key_value_groups", ())]
        assert form.key_value_groups == (row["key_value_groups"] if max(sizes, default=1) > 1 else None)
        assert form.key_value_group_size == row.get("key_value_group_size", 1)
    status, shown, _ = swiftkv("calibrate", "recipe.yaml", "--layers", "layers.json", "--kv-budget", "0.7")
    assert status == 0
    assert "at most 70% of the base's K/V bytes: the least loss first" in " ".join(shown.split())
    assert json.loads(Path("layers.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "layers.json", "--kv-budget", "0.01"], "no form is within the budget; there are forms of "),
        (["--kv-budget", "0.5"], "--prefill-budget and --kv-budget go with --layers"),
        (
            ["--layers", "layers.json", "--prefill-budget", "60"],
            "a budget is a share of the base's, above 0 and at most 1",
        ),
        (["--layers", "layers.json", "--kv-budget", "nan"], "a budget is a share of the base's, above 0 and at most 1"),
    ],
)
def test_budgets_that_cannot_be_kept(swiftkv, arguments, says):
    swiftkv("calibrate", "recipe.yaml", "calibration.tokens=512", "--layers", "layers.json")
    status, _, err = swiftkv("plan", "recipe.yaml", *arguments)
    assert status == 2
    assert says in err.splitlines()[-1]


EMPTY = {
    **{"base": "models/debug", "num_hidden_layers": 6, "num_key_value_layers": 3, "context": 64},
    **{"uniform": [], "grouped": []},
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "--layers layers.json does not exist; make it with `swiftkv calibrate RECIPE --layers FILE`"),
        ("{", "--layers layers.json is no prediction of layers"),
        ("[]", "--layers layers.json is no prediction of layers"),
        (
            json.dumps({**EMPTY, "num_hidden_layers": 30}),
            "--layers layers.json is of models/debug with 30 layers, not of the recipe's models/debug",
        ),
        *(
            (json.dumps({**EMPTY, key: odd}), "--layers layers.json is no prediction of layers")
            for key, odd in (
                *(("uniform", 3), ("uniform", [{}]), ("grouped", [[]]), ("context", "x"), ("base", 3)),
                ("grouped", [{"key_value_groups": [[3]], "cache_ratio": 1.0, "relative": 1.0}]),
            )
        ),
        ("[" * 5000, "--layers layers.json is no prediction of layers"),
    ],
)
def test_a_file_that_is_none_is_refused(swiftkv, content, says):
    if content is not None:
        Path("layers.json").write_text(content)
    status, out, err = swiftkv("plan", "recipe.yaml", "--layers", "layers.json")
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_losses_that_are_relative_to_nothing_can_be_written_and_shown(tmp_path):
    row = {"num_key_value_layers": 3, "prefill_ratio": 0.5, "cache_ratio": 0.5, "loss": 0.1, "relative": None}
    result = {
        **EMPTY,
        "uniform": [{**row, "key_value_group_size": 1}],
        "grouped": [{**row, "key_value_groups": [[3], [4, 5]]}],
    }
    layers.write(result, tmp_path / "layers.json")
    assert layers.read(tmp_path / "layers.json", EMPTY) == result
    layers.check(tmp_path / "layers.json")  # it may be replaced


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "recipe.yaml"],
        ["calibrate", "recipe.yaml", "--layers", "layers.json"],
        ["bench", "init", "recipe.yaml", "--output", "init.json"],
        ["bench", "layers", "recipe.yaml", "--forms", "3"],
    ],
)
def test_a_base_that_overflows_is_named(swiftkv, command):
    model = AutoModelForCausalLM.from_pretrained("models/debug")
    model.model.layers[0].mlp.down_proj.weight.data *= 1e38
    shutil.copytree("models/debug", "huge")
    model.save_pretrained("huge")
    status, _, err = swiftkv(*command, "model.base=huge")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: model huge: ")
    assert "not finite" in err.splitlines()[-1]
    assert not Path("layers.json").exists()
    assert not Path("init.json").exists()


def test_too_few_tokens_without_ridge_are_refused_in_one_line(swiftkv):
    few = ["data.sequence_length=32", "calibration.tokens=32", "calibration.ridge=0"]
    status, out, err = swiftkv("calibrate", "recipe.yaml", *few, "--layers", "layers.json")
    assert (status, out) == (2, "")
    assert "tokens do not determine the fit at ridge 0.0" in err.splitlines()[-1]
