"""Predicted losses against their formula on explicitly collected tokens, and the search against all groupings."""

import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import packed_batch

from swiftkv_models import rewrite
from swiftkv_train import layer_choice
from swiftkv_train.calibrate import accumulate_moments, solve
from swiftkv_train.cli import main
from swiftkv_train.layer_choice import Predictor, accumulate, candidate_layers, predictions, sum_bytes
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
    """What the base's layers take and give at the real tokens, collected through transformers' own outputs."""

    def __init__(self, base, batches):
        self.config, self.layers = base.config, base.model.layers
        found = [[] for _ in self.layers]
        with torch.no_grad():
            for batch in batches:
                streams = base.model(
                    batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
                ).hidden_states
                for index, layer in enumerate(self.layers):
                    found[index].append(layer.input_layernorm(streams[index])[batch.token_mask])
        self.normed = [torch.cat(part) for part in found]

    def heads(self, layer, name):
        projected = getattr(self.layers[layer].self_attn, f"{name}_proj")(self.normed[layer])
        return projected.unflatten(1, (-1, self.config.head_dim)).detach().numpy()

    def fitted(self, first, layer, name):
        """The ridge prediction of K or V of a layer from X_l."""
        x, y = self.normed[first].numpy(), self.heads(layer, name)
        penalty = RIDGE * (x**2).sum(0).mean() * np.eye(x.shape[1])
        if self.config.attention_bias:
            x = np.hstack([x, np.ones((len(x), 1))])
            penalty = np.pad(penalty, (0, 1))
        flat = y.reshape(len(y), -1)
        return (x @ np.linalg.solve(x.T @ x + penalty, x.T @ flat)).reshape(y.shape)


def naive_loss(tokens, layer, keys, values, streams):
    """e_i, head by head, of K and V [N, G, C] in place of the layer's own."""
    size = tokens.config.head_dim
    half, ratio = size // 2, tokens.config.num_attention_heads // tokens.config.num_key_value_heads
    queries, own_keys, own_values = (tokens.heads(layer, name) for name in "qkv")
    outputs = tokens.layers[layer].self_attn.o_proj.weight.detach().numpy()
    wrong_keys, wrong_values = own_keys - keys, own_values - values
    total = 0.0
    for group in range(keys.shape[1]):
        variance = 0.0
        for head in range(group * ratio, (group + 1) * ratio):
            for f in range(half):
                power = (queries[:, head, [f, f + half]] ** 2).sum(1).mean()
                variance += power * (wrong_keys[:, group, [f, f + half]] ** 2).sum(1).mean() / (2 * size) / ratio
        for head in range(group * ratio, (group + 1) * ratio):
            columns = outputs[:, head * size : (head + 1) * size]
            spread = own_values[:, group] - own_values[:, group].mean(0)
            total += ((wrong_values[:, group] @ columns.T) ** 2).sum(1).mean()
            total += min(1.0, variance) * ((spread @ columns.T) ** 2).sum(1).mean()
    return total * (1 / (streams[layer] ** 2).sum(1)).mean()


def streams_after_attention(base, batches):
    """|h_i| of the real tokens, [N, D] a layer."""
    found, handles = [[] for _ in base.model.layers], []
    for index, layer in enumerate(base.model.layers):
        handles.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _module, inputs, index=index: found[index].append(inputs[0])
            )
        )
    with torch.no_grad():
        for batch in batches:
            base.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    masks = [batch.token_mask for batch in batches]
    return [torch.cat([x[mask] for x, mask in zip(part, masks, strict=True)]).numpy() for part in found]


@pytest.mark.parametrize("first", [1, 3, 5])
def test_every_l_from_one_pass_is_the_formula_on_the_tokens(base, batches, first):
    predictor, tokens = predictor_of(base, batches), Tokens(base, batches)
    streams = streams_after_attention(base, batches)
    for layer in range(first, 6):
        wanted = naive_loss(tokens, layer, tokens.fitted(first, layer, "k"), tokens.fitted(first, layer, "v"), streams)
        # transformers' norm rounds to fp32: 1e-7 in X, and the condition of the system above it.
        assert predictor.group_loss(first, layer, 1) == pytest.approx(wanted, rel=1e-4)
    assert predictor.loss(first, [[layer] for layer in range(first, 6)]) == pytest.approx(
        sum(predictor.group_loss(first, layer, 1) for layer in range(first, 6))
    )


def test_a_group_is_that_of_the_calibrated_model(base, batches):
    """The K and V that `calibrate` gives a group, queries compensated, lose what is predicted for it."""
    predictor, tokens = predictor_of(base, batches), Tokens(base, batches)
    streams = streams_after_attention(base, batches)
    model = rewrite(copy.deepcopy(base), num_key_value_layers=2, key_value_groups=[[2], [3, 4, 5]])
    solve(model, accumulate_moments(model, batches, "cpu", weighting="none"), RIDGE)
    size, groups = base.config.head_dim, base.config.num_key_value_heads
    attention = model.model.layers[3].self_attn
    keys, values = (
        projection(tokens.normed[2]).unflatten(1, (groups, size)).detach().numpy()
        for projection in (attention.k_proj_swiftkv, attention.v_proj_swiftkv)
    )

    def as_complex(x):
        return x[..., : size // 2] + 1j * x[..., size // 2 :]

    total = 0.0
    for layer in (3, 4, 5):
        # Queries turned by c* are keys turned by c, which is read off any column of the two q_proj.
        own, changed = (
            as_complex(
                getattr(model.model.layers[layer].self_attn, name).weight.detach().numpy()[:, 0].reshape(-1, size)
            )
            for name in ("q_proj", "q_proj_swiftkv")
        )
        turned = as_complex(keys) * np.conj(changed / own)[:: len(own) // groups]
        turned = np.concatenate([turned.real, turned.imag], axis=-1)
        total += naive_loss(tokens, layer, turned, values, streams)
    assert predictor.group_loss(2, 3, 3) == pytest.approx(total, rel=1e-3)


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
    assert Path("look/layers.png").stat().st_size > 5000
    assert not Path("outputs/debug/run").exists()
    status, planned, _ = swiftkv("plan", "recipe.yaml", "--layers", "look/layers.json")
    assert status == 0
    assert planned.endswith(shown)
    status, planned, _ = swiftkv("plan", "recipe.yaml", "--layers", "look/layers.json", "--json")
    assert json.loads(planned)["layers"] == result


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "--layers layers.json does not exist; make it with `swiftkv calibrate RECIPE --layers FILE`"),
        ("{", "--layers layers.json is no prediction of layers"),
        ("[]", "--layers layers.json is no prediction of layers"),
        (
            json.dumps({"num_hidden_layers": 30, "base": "models/debug", "uniform": [], "grouped": []}),
            "--layers layers.json is of models/debug with 30 layers, not of the recipe's models/debug",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(swiftkv, content, says):
    if content is not None:
        Path("layers.json").write_text(content)
    status, out, err = swiftkv("plan", "recipe.yaml", "--layers", "layers.json")
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_too_few_tokens_without_ridge_are_refused_in_one_line(swiftkv):
    few = ["data.sequence_length=32", "calibration.tokens=32", "calibration.ridge=0"]
    status, out, err = swiftkv("calibrate", "recipe.yaml", *few, "--layers", "layers.json")
    assert (status, out) == (2, "")
    assert "tokens do not determine the fit at ridge 0.0" in err.splitlines()[-1]
