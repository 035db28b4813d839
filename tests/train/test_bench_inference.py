"""The inference benchmarks: what they compare with is right, and each runs on the debug model in seconds."""

import importlib
import json
import shutil
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch

from swiftkv_models import rewrite, segment_cache
from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_train.bench import baselines, kv_memory, relay, relay_model, rerotate, shared_storage, stream
from swiftkv_train.loading import load_model, load_tokenizer

WINDOW, SINKS = 16, 4


@pytest.fixture
def base(make_recipe):
    make_recipe()
    return load_model("models/debug", dtype="float32")


@pytest.fixture(params=["base", "SwiftKV"])
def model(base, request):
    return base if request.param == "base" else rewrite(base, num_key_value_layers=3, key_value_group_size=2)


@pytest.fixture
def result_of(result_of):
    """These draw their results too."""

    def run(*arguments):
        result = result_of(*arguments)
        assert Path("results/result.png").read_bytes().startswith(b"\x89PNG")
        return result

    return run


@pytest.fixture
def random_ids():
    return torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(0))


def check_contenders(cells, ours, repeats):
    """Medians, and ratios of them; the names of those that ran."""
    ran = [name for name, cell in cells.items() if "failed" not in cell]
    for name in ran:
        assert len(cells[name]["all_seconds"]) == repeats
        assert cells[name]["seconds"] == pytest.approx(statistics.median(cells[name]["all_seconds"]))
        if name != ours:
            assert cells[name]["speedup"] == cells[name]["seconds"] / cells[ours]["seconds"]
    return ran


@pytest.fixture
def naive_streaming(monkeypatch):
    """Logits [N, V] in fp64."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "models")
    return importlib.import_module("naive_streaming").naive_streaming_logits


@torch.no_grad()
def test_re_rotating_and_ours_follow_the_rule_of_the_paper(model, random_ids, naive_streaming):
    wanted = naive_streaming(model, random_ids[0], WINDOW, SINKS)[11:]
    for way in (rerotate.ReRotate, rerotate.ReRotatePublished, baselines.Ours):
        streaming = way(model, window=WINDOW, attention_sinks=SINKS)
        parts = [random_ids[:, :12], *random_ids[:, 12:].split(1, dim=1)]
        found = torch.cat([streaming.feed(part) for part in parts], dim=1)[0]
        # fp32, logits of some units, six layers.
        torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=0)
        assert streaming.held_bytes >= 2 * len(streaming.cache.layers) * 20 * 2 * 16 * 4


@torch.no_grad()
def test_dense_and_recomputing_equal_a_plain_forward(model, random_ids):
    dense = baselines.Dense(model)
    dense.feed(random_ids[:, :30])
    found = torch.cat([dense.feed(random_ids[:, at : at + 1]) for at in range(30, 40)], dim=1)
    wanted = model(random_ids[:, :40], use_cache=False).logits[:, 30:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)

    recompute = baselines.Recompute(model, window=8)
    found = torch.cat([recompute.feed(part) for part in random_ids.split(1, dim=1)], dim=1)
    for at in (3, 7, 20, 59):
        wanted = model(random_ids[:, max(0, at - 7) : at + 1], use_cache=False).logits[:, -1]
        torch.testing.assert_close(found[:, at], wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_short_cuts_end_where_feeding_does(model, random_ids):
    fed, filled = (baselines.Ours(model, window=WINDOW, attention_sinks=SINKS) for _ in range(2))
    for part in random_ids.split(7, dim=1):
        fed.feed(part)
    filled.fill(60)
    assert filled.cache.columns == fed.cache.columns == 60
    assert torch.equal(filled.cache.lengths, fed.cache.lengths)
    assert torch.equal(filled.cache.positions[:, :-1], fed.cache.positions[:, :-1])
    assert filled.feed(random_ids[:, :1]).isfinite().all()

    dense = baselines.Dense(model)
    for length in (9, 700):
        dense.reach(length)
        assert dense.cache.get_seq_length() == length
        assert len({float(key) for key in dense.cache.layers[0].keys[0, 0, :9, 0]}) == 9
    again = rerotate.ReRotate(model, window=WINDOW, attention_sinks=SINKS)
    again.reach(60)
    for _ in range(2):
        again.feed(random_ids[:, :1])
        assert again.cache.layers[-1].keys.shape[2] == SINKS + WINDOW


@torch.no_grad()
def test_a_baseline_shares_weights_and_changes_nothing_else(model, random_ids):
    before = model(random_ids, use_cache=False).logits
    twin = rerotate.unrotated_keys(baselines.sharing_weights(model))
    assert {id(tensor) for tensor in twin.parameters()} == {id(tensor) for tensor in model.parameters()}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(random_ids, use_cache=False).logits, before)


@torch.no_grad()
def test_bytes_of_a_step_that_replaces_what_it_holds(base, random_ids):
    dense = baselines.Dense(base)
    dense.reach(4000)
    states = 2 * 4000 * 16 * 4  # K, or V, of a layer
    assert dense.held_bytes == 2 * 6 * states
    peak = dense.peak_bytes(random_ids[:, :1])
    # Beside all of them a layer's new ones, while its old ones are still there, and what the rest of the step takes.
    assert dense.held_bytes + states < peak < dense.held_bytes + 1.5 * states


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("batch", "count", "groups"), [(1, 1, [0]), (3, 1, [0, 0, 0]), (5, 2, [0, 0, 0, 1, 1])])
def test_every_way_over_a_shared_prompt_is_attention_over_all_of_it(batch, count, groups, shared, monkeypatch):
    monkeypatch.setattr(shared_storage, "sharing_pays", lambda *_: shared)
    shape = shared_storage.Shape(batch, 37, 5, heads=6, kv_heads=2, head_dim=16, dtype=torch.float32, prefixes=count)
    layer = shared_storage.LayerTensors.random(shape, torch.device("cpu"))
    assert layer.groups == groups
    keys, values = (
        torch.cat([torch.stack([prefix[group] for group in groups]), own], dim=2).double().repeat_interleave(3, dim=1)
        for prefix, own in ((layer.prefix_key, layer.key), (layer.prefix_value, layer.value))
    )
    scores = layer.query.double() @ keys.transpose(2, 3) / 4
    wanted = torch.softmax(scores, dim=-1) @ values
    for name in ("ours", "plain", "per request"):
        found = shared_storage.WAYS[name](layer)()
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    _, found = shared_storage.attention_with_log_sum_exp(layer.query.view(batch, 2, 3, 16), layer.key, layer.value)
    wanted = scores[..., 37:].logsumexp(-1).view(batch, 2, 3)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    assert shape.ceiling == pytest.approx(batch * 42 / (37 * count + 5 * batch))


@torch.no_grad()
def test_whole_models_over_a_shared_prompt_agree(model, random_ids):
    ids = torch.cat([random_ids[:, :40].expand(3, -1), torch.arange(30).view(3, 10)], dim=1)
    wanted = model(ids, use_cache=False).logits[:, -1:]
    prefix = relay_model.SharedPrefix.from_ids(model, ids[0, :40])
    ways = relay_model.caches(model, ids, prefix, window=12)
    for name, start in ways.items():
        its_model, cache, rest = start()
        assert rest.shape[1] == (10 if name == "ours" else 50)
        logits = its_model(rest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_stream(result_of):
    rewrite(load_model("models/debug"), num_key_value_layers=3).save_pretrained("checkpoint")
    arguments = ["--windows", "16,64", "--tokens", "160", "--repeats", "2", "--chunk", "16", "--long", "1000"]
    result = result_of("stream", "checkpoint", *arguments)
    assert [(row["window"], row["tokens"]) for row in result["rows"]] == [
        (16, 40),
        (16, 80),
        (16, 160),
        (64, 80),
        (64, 160),
    ]
    for row in result["rows"]:
        cells = row["contenders"]
        names = {"ours", "re-rotate", "re-rotate published", "dense"} | (
            {"recompute"} if row["tokens"] == 160 else set()
        )
        assert set(check_contenders(cells, "ours", 2)) == names
        for cell in cells.values():
            assert cell["peak_bytes"] >= cell["held_bytes"] > 0
        # Two steps that are timed, one that is not; K and V of 6 layers, 2 heads, 16 numbers, fp32.
        assert cells["dense"]["held_bytes"] == 2 * 6 * (row["tokens"] + 3) * 2 * 16 * 4
        assert cells["re-rotate"]["held_bytes"] == 2 * 6 * (row["window"] + 4) * 2 * 16 * 4
        assert cells["dense"]["peak_ratio"] == cells["ours"]["peak_bytes"] / cells["dense"]["peak_bytes"]
    held = [row["contenders"]["ours"]["held_bytes"] for row in result["rows"]]
    assert len(set(held)) == 2  # by window, whatever the length
    assert [row["window"] for row in result["attention"]] == [16, 64]
    assert result["targets"] == []  # they are for other windows

    long = result["long"]
    assert long["tokens"] == 1000 <= long["points"][-1]["tokens"] < 1000 + 8 + 16
    assert long["held_bytes"] == held[0]
    for point in long["points"]:
        assert min(point[f"seconds_{name}"] for name in ("per_token", "of_one", "of_young")) > 0
        assert point["resident_bytes"] > 2**20
    assert long["memory_growth_bytes"] < 2**24
    ratios = [point["seconds_of_one"] / point["seconds_of_young"] for point in long["points"][stream.FIRST_POINTS :]]
    assert long["over_young"] == statistics.median(ratios)


def test_trend_of_a_long_run():
    straight = stream._trend("x", [100.0, 110.0, 120.0, 130.0, 140.0])
    assert straight == {"x_slope": pytest.approx(40 / 120), "x_deviation": pytest.approx(20 / 120)}
    assert stream._trend("x", [3.0] * 5) == {"x_slope": 0.0, "x_deviation": 0.0}
    slower_clock = stream._trend("x", [1.0] * 30 + [0.7] * 20 + [1.0] * 50)
    assert slower_clock == {"x_slope": 0.0, "x_deviation": pytest.approx(0.3)}


def test_targets_are_of_the_worst_length():
    ours, failed = {"seconds": 10.0}, {"failed": "no"}
    rows = [
        {
            "window": window,
            "contenders": {"ours": ours, "recompute": failed, "re-rotate": {"speedup": x, "seconds": 10 * x}},
        }
        for window, x in ((1024, 2.0), (1024, 1.2), (256, 0.5))
    ]
    recompute, re_rotate = stream._targets(rows, {1024: 2.0, 256: 1.0})  # none for what was not asked for
    assert recompute["found"] is recompute["bound"] is None
    assert not recompute["reached"]
    assert (re_rotate["found"], re_rotate["wanted"], re_rotate["reached"]) == (1.2, 1.46, False)
    assert re_rotate["bound"] == 12 / (10 - 2)
    assert stream._targets(rows, {1024: 11.0})[1]["bound"] is None  # noise of a tiny model


def test_relay(result_of, monkeypatch):
    monkeypatch.setattr(segment_cache, "sharing_pays", lambda *_: True)  # of so small a model it would not
    model = ["--model", "models/debug", "--model-batch", "1,3", "--model-prefix", "48"]
    sizes = ["--batch", "1,4", "--prefix", "64,16", "--groups", "1,2", "--suffix", "8"]
    result = result_of("relay", *sizes, "--repeats", "3", *model)
    assert [(row["groups"], row["prefix"], row["batch"]) for row in result["rows"]] == [
        *((1, prefix, batch) for prefix in (16, 64) for batch in (1, 4)),
        *((2, prefix, 4) for prefix in (16, 64)),
    ]
    for row in result["rows"]:
        cells = row["contenders"]
        assert check_contenders(cells, "ours", 3) == ["ours", "plain", "per request"]
        assert row["share_of_ceiling"] == cells["plain"]["speedup"] / row["ceiling"]
        if not torch.cuda.is_available():
            assert cells["flashinfer"]["failed"] == "needs a GPU"
    losing = {(cell["batch"], cell["prefix"], cell["groups"]) for cell in result["slower_than_plain"]}
    assert losing == {
        (row["batch"], row["prefix"], row["groups"])
        for row in result["rows"]
        if row["contenders"]["plain"]["speedup"] < 0.95
    }
    for row in result["end_to_end"]["rows"]:
        for figure, repeats in (("first_token", 3), ("token", 16)):
            assert set(check_contenders(row[figure], "ours", repeats)) == {"ours", "unshared", "dense"}
        assert all(cell["difference"] < 1e-4 for cell in row["first_token"].values())
        tokens = row["batch"] * (48 + 8) + 17 * row["batch"]
        assert row["token"]["dense"]["held_bytes"] == 2 * 6 * tokens * 2 * 16 * 4
    ours = result["end_to_end"]["rows"][1]["token"]["ours"]["held_bytes"]
    assert ours < result["end_to_end"]["rows"][1]["token"]["unshared"]["held_bytes"]


def test_a_way_that_is_wrong_counts_as_failed(monkeypatch):
    monkeypatch.setitem(shared_storage.WAYS, "per request", lambda layer: lambda: torch.zeros_like(layer.query))
    shape = shared_storage.Shape(2, 16, 8, 4, 2, 16, torch.float32)
    row = relay._row(shape, 1, torch.device("cpu"))
    assert "its output is" in row["contenders"]["per request"]["failed"]
    assert "speedup" in row["contenders"]["plain"]
    assert "per request not measured" in relay._line(row)


class Cascade:
    """FlashInfer's wrapper as it documents itself, in plain torch: a query attends to its pages of every level."""

    def __init__(self, levels, workspace, layout):
        assert (levels, layout) == (2, "NHD")

    def plan(self, queries, page_bounds, page_indices, last_tokens, heads, kv_heads, size, page, *, sm_scale, **_):
        assert sm_scale == size**-0.5
        self.levels = list(zip(queries, page_bounds, page_indices, last_tokens, strict=True))
        self.page, self.ratio = page, heads // kv_heads

    def run(self, query, pages):
        def tokens_of(row, place):
            parts = []
            for queries, bounds, indices, last in self.levels:
                group = int((queries <= row).sum()) - 1
                chosen = indices[bounds[group] : bounds[group + 1]].long()
                held = (len(chosen) - 1) * self.page + int(last[group])
                parts.append(pages[chosen, place].flatten(0, 1)[:held])
            return torch.cat(parts).transpose(0, 1).repeat_interleave(self.ratio, dim=0)

        rows = [(row[:, None], tokens_of(index, 0), tokens_of(index, 1)) for index, row in enumerate(query)]
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*row).transpose(0, 1) for row in rows])


@pytest.mark.parametrize(("prefix", "suffix"), [(32, 16), (37, 5), (7, 40)])
@pytest.mark.parametrize(("batch", "count"), [(3, 1), (5, 2)])
def test_flashinfer_is_given_the_same_keys_and_values(prefix, suffix, batch, count, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade))
    shape = shared_storage.Shape(batch, prefix, suffix, 6, 2, 16, torch.float32, prefixes=count)
    layer = shared_storage.LayerTensors.random(shape, torch.device("cpu"))
    torch.testing.assert_close(shared_storage.flashinfer(layer)(), shared_storage.plain(layer)(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_sinks(result_of, naive_streaming):
    """Against a plain forward, and against the paper's rule in fp64."""
    config = Path(shutil.copytree("models/debug", "short"), "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 100}))
    rows = [json.loads(line)["text"] for line in Path("data/debug/prose.train.jsonl").read_text().splitlines()]
    texts = (rows[0], " ".join(rows[:20]))
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--data", "prose=texts.jsonl", "--kept", "16,24", "--sinks", "2,0", "--tokens", "150", "--chunk", "40"]
    result = result_of("sinks", "short", *options)
    dense, *others = result["rows"]
    assert [(row["kept"], row["sinks"]) for row in others] == [(16, 0), (16, 2), (24, 0), (24, 2)]
    assert (result["tokens"], result["scored_from"], result["trained_length"]) == (150, 24, 100)

    model = load_model("short", dtype="float32")
    ids = load_tokenizer("short")(texts[1], return_tensors="pt").input_ids[:, :150]
    found = {(row["kept"], row["sinks"]): row for row in others} | {None: dense}
    logits = {key: naive_streaming(model, ids[0], key[0] - key[1], key[1]) for key in found if key is not None}
    logits[None] = model(ids, use_cache=False).logits[0]
    for key, row in found.items():
        losses = torch.nn.functional.cross_entropy(logits[key][:-1].double(), ids[0, 1:], reduction="none")
        # fp32, in which logits are right to 1e-4.
        assert row["perplexity"] == pytest.approx(float(losses[23:99].mean().exp()), rel=1e-3)
        assert row["perplexity_beyond"] == pytest.approx(float(losses[99:].mean().exp()), rel=1e-3)
        assert row["points"][-1]["tokens"] == 150
        pieces = losses.split(4)
        assert [point["perplexity"] for point in row["points"]] == pytest.approx(
            [float(piece.mean().exp()) for piece in pieces], rel=2e-3
        )


def test_decode(result_of):
    rewrite(load_model("models/debug"), num_key_value_layers=3).save_pretrained("checkpoint")
    options = ["--base", "models/debug", "--batch", "1,2", "--context", "32,64", "--repeats", "2"]
    result = result_of("decode", "checkpoint", *options)
    assert [(row["context"], row["batch"]) for row in result["rows"]] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    for row in result["rows"]:
        cells = row["contenders"]
        assert next(iter(cells)) == "base"
        assert len(cells) == 5
        for cell in cells.values():
            assert cell["seconds"] == statistics.median(cell["all_seconds"])
            assert cell["speedup"] == cells["base"]["seconds"] / cell["seconds"]
            assert cell["tokens_per_second"] == row["batch"] / cell["seconds"]


@pytest.mark.parametrize("system", [0, 40])
def test_serve(result_of, system):
    options = ["--clients", "3,1", "--system", str(system), "--prompt", "12", "--tokens", "5"]
    result = result_of("serve", "models/debug", *options)
    assert [row["clients"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        names = ["ours", "one by one", *(["nothing in common"] if system else [])]
        assert check_contenders(row["contenders"], "ours", 3) == names
        for cell in row["contenders"].values():
            assert cell["tokens"] == 5 * row["clients"]
            assert cell["tokens_per_second"] == cell["tokens"] / cell["seconds"]
            assert 0 < cell["first_token_seconds"] < 60
            assert 0 < cell["next_token_seconds"] < 60


def test_kv_memory(result_of):
    rewrite(load_model("models/debug"), num_key_value_layers=3, key_value_group_size=3).save_pretrained("checkpoint")
    text = "prose=data/debug/prose.held_out.jsonl"
    options = ["--data", text, "--checkpoint", "checkpoint", "--tokens", "200", "--sequence-length", "64"]
    result = result_of("kv-memory", "models/debug", *options)
    layers = {(6, 1): 6, (3, 1): 6, (3, 2): 5}  # in 4 groups the 3 layers of the tail cannot be
    forms = [(row["num_key_value_layers"], row["key_value_group_size"]) for row in result["rows"]]
    assert forms == [form for form in layers for _ in range(3)]
    for row, form in zip(result["rows"], forms, strict=True):
        number = {"none": 16 * 4, "int8": 16 + 4, "fp8": 16 + 4}[row["quantization"]]  # of a head: C numbers, a scale
        states = 2 * layers[form] * 2 * number
        assert row["base_bytes_per_token"] == 2 * 6 * 2 * 16 * 4
        # Beside K and V 4 bytes a position, one slot of 1,025 for what is dropped, the keys of 4 sinks as they came.
        sinks = 4 * (layers[form] * 2 * number) / 1024 if row["quantization"] == "none" else 0
        assert row["bytes_per_token"] == pytest.approx((states + 4) * 1025 / 1024 + sinks, abs=0.1)
        assert row["ratio"] == row["bytes_per_token"] / row["base_bytes_per_token"]
        assert row["layers_ratio"] == layers[form] / 6
    assert [(row["model"], row["quantization"]) for row in result["quality_against_base"]] == [
        ("checkpoint", storage) for storage in ("none", "int8", "fp8")
    ]
    # That of a rewrite without calibration or training, beside which a format is little.
    plain, *packed = (row["kl"] for row in result["quality_against_base"])
    assert packed == pytest.approx([plain] * 2, rel=0.2)
    quality = {(row["model"], row["quantization"]): row for row in result["quality"]}
    assert {row["key_value_group_size"] for row in result["quality"]} == {1, 3}
    assert set(quality) == {(name, storage) for name in ("base", "checkpoint") for storage in ("int8", "fp8")}
    for row in quality.values():
        assert row["tokens"] == 3 * 63
        assert 0 < row["kl"] < 0.05
        assert row["perplexity_ratio"] == pytest.approx(row["quantised_perplexity"] / row["perplexity"])
    for name in ("base", "checkpoint"):
        assert quality[name, "int8"]["kl"] < quality[name, "fp8"]["kl"]  # 7 bits against 3 and a sign


@torch.no_grad()
def test_quality_of_a_storage_format_is_what_decoding_with_it_has(model, random_ids):
    of_format, of_all = kv_memory._quality(model, model, random_ids, lambda texts: None)
    int8 = of_format["int8"]
    assert of_all["none"].kl < 1e-6 < of_all["int8"].kl  # here the base is the model itself
    cache = SinkWindowCache(model.config, window=60, attention_sinks=4, quantization="int8")
    steps = [model(part, past_key_values=cache, use_cache=True).logits for part in random_ids.split(1, dim=1)]
    quantised = torch.cat(steps, dim=1)[0, :-1].double().log_softmax(-1)
    plain = model(random_ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    kl = (plain.exp() * (plain - quantised)).sum(-1).mean()
    assert int8.kl == pytest.approx(float(kl), rel=0.02)  # of a KL of 1e-4, in fp32 and by other kernels


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stream", "models/debug", "--windows", "a"], "--windows 'a' must look like"),
        (["stream", "models/debug", "--windows", "0"], "--windows '0': every number must be at least 1"),
        (["stream", "models/debug", "--windows", "64", "--tokens", "68"], "--tokens 68 must be more than the 68"),
        (["stream", "models/debug", "--windows", "64", "--long", "60"], "--long 60 must be more than the 68"),
        (
            ["stream", "models/debug", "--windows", "64", "--long", "863"],
            "--long 863 must be at least 864: a trend takes points, of 64 + 8 tokens",
        ),
        (["kv-memory", "models/debug", "--data", "x=a", "--data", "x=b"], "--data names 'x' twice"),
        (["serve", "models/debug", "--system", "9000"], "9160 tokens are more than the context of models/debug"),
        (["sinks", "models/debug", "--data", "prose"], "--data 'prose' must look like NAME=PATH"),
        (
            ["sinks", "models/debug", "--data", "prose=data/debug/prose.held_out.jsonl", "--kept", "4", "--sinks", "4"],
            "--kept 4 must be more than --sinks 4",
        ),
        (
            ["sinks", "models/debug", "--data", "prose=data/debug/prose.held_out.jsonl", "--tokens", "32"],
            "its longest document, cut to --tokens, has 32 of at least 1065 tokens",
        ),
        (["relay", "--batch", "1,2", "--groups", "4"], "no --batch of 1,2 has that many rows"),
        (["stream", "models/debug", "--contenders", "dense,paged"], "'paged' is not known; use ours, re-rotate"),
        (["stream", "absent/model", "--windows", "16"], "model absent/model"),
        (["relay", "--batch", "1,x"], "--batch '1,x' must look like"),
        (["relay", "--prefix", "0"], "--prefix '0': every number must be at least 1"),
        (["relay", "--dtype", "int8"], "--dtype 'int8' is not known"),
        (["relay", "--heads", "8", "--kv-heads", "3"], "--heads 8 must be a multiple of --kv-heads 3"),
        (
            ["relay", "--batch", "1", "--prefix", "8", "--model", "models/debug", "--model-prefix", "3"],
            "--model-prefix",
        ),
        (["decode", "models/debug", "--base", "models/debug"], "this command takes llama_swiftkv"),
        (["decode", "models/debug", "--base", "models/debug", "--context", "4"], "--context '4': every number"),
        (["kv-memory", "models/debug", "--data", "x"], "--data 'x' must look like NAME=PATH"),
        (["kv-memory", "models/debug", "--data", "x=absent.jsonl"], "absent.jsonl does not exist"),
        (["kv-memory", "models/debug", "--sequence-length", "1"], "Invalid value for '--sequence-length'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(bench, arguments, says):
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert says in err.splitlines()[-1]
