"""The plan of a run against what is really allocated, kept, counted and cached."""

import json
import shutil
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swiftkv_models import rewrite
from swiftkv_train.bench.plan import SETTINGS as STEPS
from swiftkv_train.bench.plan import recipe_for, step_memory
from swiftkv_train.cli import main
from swiftkv_train.distill import Distillation
from swiftkv_train.errors import UserError
from swiftkv_train.evaluate.speed import cache_bytes_per_token as cache_bytes_found
from swiftkv_train.loading import compute_dtype
from swiftkv_train.moments import accumulate_moments
from swiftkv_train.plan import model_on_meta, plan
from swiftkv_train.plan.advice import RESERVED, first_that_fits
from swiftkv_train.plan.inference import cache_bytes_per_token, decode_flops, prefill_flops
from swiftkv_train.plan.memory import TailMemory, training_memory
from swiftkv_train.student import add_adapters, build_model, trainable_parameters, use_training_attention
from tiny import random_ids, tiny_llama

SETTINGS = {
    "rewrite__init": "copy",
    "data__train": [{"name": "prose", "path": "data/debug/prose.train.jsonl"}],
    "data__held_out": [],
    "data__sequence_length": 256,
    "training__batch_size": 8,
    "training__micro_batch_size": 8,
}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measured on the CPU, training takes the GPU")


def by_name(changes):
    return ",".join(f"{key.rpartition('__')[2]}={value}" for key, value in changes.items())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def check_step(recipe):
    """A step must take, beside weights and moments, what the plan says to 15%, its promise."""
    memory = step_memory(recipe)
    predicted, found = memory.predicted, memory.measured
    print(f"predicted {predicted / 2**20:.1f} MiB, found {found / 2**20:.1f} MiB: x {predicted / found:.3f}")
    assert predicted == pytest.approx(found, rel=0.15)


@on_cpu
@pytest.mark.parametrize("settings", STEPS["debug"], ids=str)
def test_the_peak_of_the_debug_model_is_the_measured_one(scratch, settings):
    check_step(recipe_for("debug", settings, scratch))


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("settings", STEPS["135m"], ids=str)
def test_the_peak_of_a_model_of_135m_is_the_measured_one(scratch, settings):
    check_step(recipe_for("135m", settings, scratch))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", STEPS["1b"], ids=str)
def test_the_peak_on_a_gpu_is_the_measured_one(scratch, settings):
    check_step(recipe_for("1b", settings, scratch))


@pytest.mark.parametrize("family", ["smollm2", "llama2", "bias", "wide-heads"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model__dtype": "float32"},
        {"model__dtype": "bfloat16"},
        {"model__dtype": "bfloat16", "model__attention": "eager"},
        {"model__dtype": "float32", "model__attention": "eager"},
        {"model__dtype": "bfloat16", "training__lora": {"rank": 4}, "training__trainable": "lora"},
        {"model__dtype": "float32", "training__lora": {"rank": 4}, "training__trainable": "lora"},
    ],
    ids=by_name,
)
@pytest.mark.parametrize("group", [1, 2])
def test_the_tail_keeps_for_its_backward_pass_what_autograd_is_seen_to_keep(make_recipe, family, changes, group):
    rows, length = 2, 48
    recipe = make_recipe(data__sequence_length=length, **changes)
    dtype = compute_dtype(recipe.model.dtype)
    base = tiny_llama(family, dtype=dtype, attn_implementation=recipe.model.attention)
    model = rewrite(base, num_key_value_layers=3, key_value_group_size=group).requires_grad_(False)
    use_training_attention(model)
    if recipe.training.lora is not None:
        add_adapters(model, recipe.training.lora)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        copy_of_a_weight = tensor.ndim == 2 and len(tensor) != rows * length
        if tensor.untyped_storage().data_ptr() not in weights and not copy_of_a_weight:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = torch.arange(length // 2).repeat(2).expand(rows, length)  # two documents in every row
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            trunk = model.model.run_trunk(random_ids(rows, length), position_ids=positions, use_cache=False)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model.run_tail(trunk)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert TailMemory(model, recipe, rows=rows, dtype=dtype, device="cpu").saved() == found


@pytest.mark.parametrize(("first", "group"), [(1, 1), (2, 2), (4, 2), (5, 1)])
def test_the_flops_of_inference_are_what_torch_counts(first, group):
    length = 12
    ids = random_ids(1, length)
    base = tiny_llama("wide-heads", dtype=torch.float32, attn_implementation="eager")
    models = {first: rewrite(base, num_key_value_layers=first, key_value_group_size=group), 6: base}
    config = models[first].config
    for layers, model in models.items():
        config.num_key_value_layers = layers
        with FlopCounterMode(display=False) as counter:
            cache = model(ids, logits_to_keep=1, use_cache=True).past_key_values
        # Eager attention multiplies every query of the trunk with every key, the later ones too.
        later = length * (length - 1) // 2 * layers * 4 * config.num_attention_heads * config.head_dim
        assert counter.get_total_flops() == prefill_flops(config, length) + later
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert counter.get_total_flops() == decode_flops(config, length + 1)


@pytest.mark.parametrize("family", ["llama2", "smollm2"])
def test_the_bytes_of_the_cache_are_those_of_a_filled_one(family):
    model = rewrite(tiny_llama(family, dtype=torch.bfloat16), num_key_value_layers=3, key_value_group_size=2)
    assert cache_bytes_per_token(model.config, 2) == cache_bytes_found(model)
    model.config.num_key_value_layers = 6
    assert cache_bytes_per_token(model.config, 2) == cache_bytes_found(tiny_llama(family, dtype=torch.bfloat16))


@pytest.mark.parametrize("changes", [{}, {"training__trainable": "lora"}], ids=by_name)
def test_parameters_and_tokens_are_those_of_the_run(make_recipe, changes):
    recipe = make_recipe(rewrite__init="copy", training__steps=7, **changes)
    distillation = Distillation(recipe, quiet=True)
    distillation.prepare()
    parameters = list(distillation.strategy.model.parameters())
    row = distillation.train_step()
    planned = plan(recipe)
    assert planned["parameters"] == {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
    }
    assert planned["training"]["tokens"] == 7 * row["tokens"]


def test_only_the_configuration_of_the_base_is_read(make_recipe, tmp_path):
    expected = plan(make_recipe())
    (tmp_path / "bare").mkdir()
    shutil.copy("models/debug/config.json", "bare")
    assert plan(make_recipe(model__base="bare")) == {**expected, "base": "bare"}


@pytest.mark.parametrize(
    ("strategy", "frozen", "trained", "gradients", "optimizer"),
    [  # bytes per frozen and per trained parameter on each of four processes
        ("ddp", 2, 4, 4, 8),
        ("zero1", 2, 4, 4, 12 / 4),  # and DeepSpeed's fp32 copy
        ("zero2", 2, 4, 4 / 4, 12 / 4),
        ("zero3", 2 / 4, 4 / 4, 4 / 4, 12 / 4),
        ("fsdp2", 2 / 4, 4 / 4, 4 / 4, 8 / 4),
    ],
)
def test_processes_share_what_the_strategy_says(make_recipe, strategy, frozen, trained, gradients, optimizer):
    recipe = make_recipe(model__dtype="bfloat16", distributed__strategy=strategy, training__batch_size=16)
    planned = plan(recipe, processes=4)
    parameters, memory = planned["parameters"], planned["memory"]["bytes"]
    copies = 2 * parameters["trained"]  # of autocast
    weights = frozen * parameters["frozen"] + trained * parameters["trained"] + copies
    assert memory["weights"] == pytest.approx(weights, abs=1)
    assert memory["gradients"] == pytest.approx(gradients * parameters["trained"], abs=1)
    assert memory["optimizer"] == pytest.approx(optimizer * parameters["trained"], abs=1)


@pytest.fixture
def swiftkv(make_recipe, monkeypatch, capsys):
    """Run `swiftkv plan recipe.yaml ARGUMENTS`: exit status, standard output, standard error."""

    def run(*arguments, **changes):
        make_recipe(**{**SETTINGS, **changes})
        monkeypatch.setattr(sys, "argv", ["swiftkv", "plan", "recipe.yaml", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def gib(size):
    return ["--gpu-memory", str(size / 2**30)]


def peak_with(swiftkv, *arguments):
    status, out, _ = swiftkv("--json", *arguments)
    assert status == 0
    return json.loads(out)["memory"]["bytes"]["peak"]


@pytest.mark.parametrize(
    ("enough", "milder", "says"),
    [
        (["training.micro_batch_size=2"], ["training.micro_batch_size=4"], "training.micro_batch_size=2 fits"),
        (
            ["training.micro_batch_size=1", "training.gradient_checkpointing=true"],
            ["training.micro_batch_size=1"],
            "training.micro_batch_size=1 training.gradient_checkpointing=true fits",
        ),
    ],
)
def test_where_a_run_does_not_fit_the_mildest_change_that_does_is_named(swiftkv, enough, milder, says):
    needed = peak_with(swiftkv, *enough)
    assert needed < peak_with(swiftkv, *milder)
    status, out, err = swiftkv(*gib(needed + RESERVED))
    assert status == 1
    assert "loss chunk" in out
    assert err.startswith("error: does not fit")
    assert says in err
    assert swiftkv(*enough, *gib(needed + RESERVED))[0] == 0


@pytest.mark.parametrize("zero", [{"stage": 2}, None])
def test_a_users_deepspeed_settings_leave_the_strategy_as_it_is(swiftkv, tmp_path, zero):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = ["distributed.strategy=zero2", "distributed.deepspeed_config=ds.json", "--processes", "2"]
    status, _, err = swiftkv(*settings, *gib(RESERVED))
    assert status == 1
    assert "no settings" in err


def test_a_run_that_cannot_fit_is_told_so(swiftkv):
    status, _, err = swiftkv(*gib(RESERVED))
    assert status == 1
    assert "no settings" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--device", "cpu", "--gpu-memory", "24"], "--gpu-memory goes with --device cuda"),
        (["--processes", "9"], "training.batch_size 8 is smaller"),
        (["--processes", "3", "distributed.sequence_parallel=2"], "does not divide"),
        (
            ["--processes", "2", "distributed.sequence_parallel=2", "data.sequence_length=63"],
            "does not divide data.",
        ),
        (
            ["--processes", "4", "distributed.strategy=zero2", "model.dtype=float16"],
            "trains under distributed.strategy",
        ),
        (["model.base=nobody/nothing"], "model nobody/nothing: config cannot be read"),
        (["--processes", "4", "distributed.sequence_parallel=4"], "4 does not divide the model's 2 K/V heads"),
        (["data.sequence_length=5000"], "data.sequence_length 5000 is longer than the context"),
        (["rewrite.num_key_value_layers=6"], "leaves no layer to train"),
        (["rewrite.key_value_group_size=4"], "key_value_group_size is 4"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(swiftkv, arguments, says):
    status, out, err = swiftkv(*arguments)
    assert (status, out) == (2, "")
    assert says in err.splitlines()[-1]
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("group", [1, 2])
def test_the_sums_of_a_calibration_are_counted(make_recipe, group):
    """What a K/V head's own weighting holds more than a layer's, against the sums themselves."""
    shared = {"rewrite__key_value_group_size": group}
    recipes = {kind: make_recipe(calibration__weighting=kind, **shared) for kind in ("head", "layer")}
    model = model_on_meta(recipes["head"], "cpu")
    planned = [training_memory(model, recipe, device="cpu").calibration for recipe in recipes.values()]
    found = []
    for kind, recipe in recipes.items():
        moments = accumulate_moments(build_model(recipe), [], "cpu", weighting=kind)
        tensors = [*moments.inputs, *moments.attended, *moments.attended_products]
        found.append(sum(tensor.numel() for tensor in tensors) * 8)
    assert planned[0] - planned[1] == found[0] - found[1] > 0
    copied = make_recipe(rewrite__init="copy")
    assert training_memory(model, copied, device="cpu").calibration == 0


def test_a_lighter_calibration_is_proposed_where_it_is_what_does_not_fit(make_recipe):
    recipe = make_recipe()
    model = model_on_meta(recipe, "cpu")
    memory = training_memory(model, recipe, device="cuda")
    light = training_memory(model, make_recipe(calibration__weighting="layer"), device="cuda")
    assert memory.calibration > light.calibration > memory.step  # of so small a model
    fit = first_that_fits(model, recipe, processes=1, gpu_memory=RESERVED + light.calibration)
    assert fit.changes == ["calibration.weighting=layer"]


@pytest.mark.parametrize(
    ("key", "value"), [("head_dim", 0), ("num_key_value_heads", 0), ("hidden_act", "x"), ("vocab_size", -3)]
)
def test_a_base_whose_config_makes_no_model_is_named(make_recipe, key, value):
    recipe = make_recipe(model__base="odd")
    shutil.copytree("models/debug", "odd")
    with open("odd/config.json") as file:
        config = json.load(file)
    with open("odd/config.json", "w") as file:
        json.dump({**config, key: value}, file)
    with pytest.raises(UserError, match="model odd: ") as error:
        plan(recipe)
    assert "\n" not in str(error.value)
