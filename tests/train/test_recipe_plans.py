"""Every recipe's plan, on the public architecture numbers of its model in tests/configs and without any weights."""

import json
import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from swiftkv_kernels import backends
from swiftkv_train.cli import main
from swiftkv_train.plan import plan
from swiftkv_train.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate")
READMES = sorted({path.parent / "README.md" for path in RECIPES})

# As their publishers state them: the safetensors indices and model cards of the hub.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
}


@dataclass(frozen=True)
class Hardware:
    """What a README says that a recipe needs."""

    why: str
    memory: float  # GiB, of one GPU or of the machine
    processes: int = 1
    device: str = "cuda"


HARDWARE = {
    "debug/debug": Hardware("any computer at all", 1, device="cpu"),
    "smollm2-135m/quickstart": Hardware("a laptop with two cores", 8, device="cpu"),
    "smollm2-135m/self": Hardware("a laptop with two cores", 8, device="cpu"),
    "smollm2-135m/full": Hardware("a laptop with two cores", 8, device="cpu"),
    "llama-3.2-1b/one-gpu": Hardware("one consumer GPU: RTX 3090, RTX 4090", 24),
    "llama-3.1-8b/one-gpu": Hardware("one A100 or H100", 80),
    "llama-3.1-8b/acrosskv": Hardware("one A100 or H100", 80),
    "llama-3.1-8b/cluster": Hardware("the fewest and smallest GPUs that its README names", 24, processes=4),
    "llama-3.1-70b/zero3": Hardware("one machine of 8 x 80 GB; more of them leave more room", 80, processes=8),
}
LIBRARIES = 0.5  # GiB that Python and its libraries take of a machine: 406 MiB resident once all are imported


def name_of(recipe):
    return f"{recipe.parent.name}/{recipe.stem}"


@pytest.fixture
def config_of(debug_files):
    """The directory with the configuration, and nothing else that a plan reads, of a recipe's base."""

    def find(recipe):
        return (
            debug_files / "models/debug"
            if recipe.parent.name == "debug"
            else ROOT / "tests/configs" / recipe.parent.name
        )

    return find


@pytest.fixture
def swiftkv_plan(config_of, monkeypatch, capsys):
    """Run `swiftkv plan RECIPE ARGUMENTS --json`: exit status, the plan, what was said."""

    def run(recipe, *arguments):
        words = ["swiftkv", "plan", str(recipe), f"model.base={config_of(recipe)}", *arguments, "--json"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, json.loads(out), err

    return run


def added_parameters(config, first, group):
    """Elements of the `*_swiftkv` tensors, from the numbers of a config.json: a norm; Q of every tail layer; K and V of
    the first of every group of them."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    tail = config["num_hidden_layers"] - first
    leaders = math.ceil(tail / group)
    return hidden + hidden * head_dim * (tail * heads + leaders * 2 * config["num_key_value_heads"])


def test_every_recipe_has_its_hardware_stated():
    assert {name_of(recipe) for recipe in RECIPES} == HARDWARE.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_has_the_published_parameters_and_fits_its_hardware(recipe, config_of, swiftkv_plan):
    hardware = HARDWARE[name_of(recipe)]
    arguments = ["--processes", str(hardware.processes), "--device", hardware.device]
    if hardware.device == "cuda":
        arguments += ["--gpu-memory", str(hardware.memory)]
    status, planned, said = swiftkv_plan(recipe, *arguments)
    assert status == 0, said
    if hardware.device == "cuda":
        assert said.startswith("fits: ")
    else:
        assert planned["memory"]["bytes"]["peak"] / 2**30 + LIBRARIES < hardware.memory

    config = json.loads((config_of(recipe) / "config.json").read_text())
    added = added_parameters(config, planned["num_key_value_layers"], planned["key_value_group_size"])
    assert planned["parameters"]["trained"] == added
    if recipe.parent.name in PARAMETERS:
        # Beside them the base is whole, its tail's own projections too: they are the teacher's.
        assert planned["parameters"]["frozen"] == PARAMETERS[recipe.parent.name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_configurations_scale_their_positions_as_published(name, config_of):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ROOT / "tests/configs" / name)
    assert config.model_type == "llama"
    rope = config.rope_parameters
    if name == "smollm2-135m":
        assert (rope["rope_type"], rope["rope_theta"]) == ("default", 100_000)
        return
    scaling = (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"])
    assert (rope["rope_type"], rope["rope_theta"]) == ("llama3", 500_000)
    assert scaling == ((32, 1, 4) if name == "llama-3.2-1b" else (8, 1, 4))
    assert (rope["original_max_position_embeddings"], config.max_position_embeddings) == (8192, 131_072)


def said_of(readme):
    """The `swiftkv plan` commands of a README: recipe, arguments, what is said to come out, GiB, GiB in float32."""
    gib = r"([\d.]+) GiB(?: in bfloat16, ([\d.]+) in float32)?"
    command = rf"^swiftkv plan (recipes/\S+)(.*?) +# (fits|does not fit|peak): {gib}"
    return re.findall(command, readme.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_readme_states_what_the_plan_says(readme, swiftkv_plan, monkeypatch):
    commands = said_of(readme)
    assert len(commands) == readme.read_text().count("\nswiftkv plan "), "a plan whose outcome is not stated"
    for path, arguments, outcome, *figures in commands:
        for native, stated in zip((True, False), filter(None, figures), strict=False):
            monkeypatch.setattr(backends, "multiplies_natively", lambda dtype, device, native=native: native)
            status, planned, said = swiftkv_plan(ROOT / path, *shlex.split(arguments))
            assert status == (outcome == "does not fit"), said
            found = planned["memory"]["bytes"]["peak"] / 2**30
            # Stated to the last digit that is given.
            digits = len(stated.partition(".")[2])
            assert found == pytest.approx(float(stated), abs=0.51 * 10**-digits), f"swiftkv plan {path}{arguments}"


def launched(readme):
    """The launches of a README: recipe, overrides, number of processes."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:\w+=\w+ )?((?:accelerate launch|deepspeed) .*)$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        recipe = words.index("swiftkv_train.distill") + 1
        if "--hostfile" in words:
            hosts = (ROOT / words[words.index("--hostfile") + 1]).read_text()
            processes = sum(int(slots) for slots in re.findall(r"^\S+ slots=(\d+)$", hosts, flags=re.MULTILINE))
        elif "--num_gpus" in words:
            processes = int(words[words.index("--num_gpus") + 1])
        else:
            processes = yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text())["num_processes"]
        yield ROOT / words[recipe], words[recipe + 1 :], processes


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_what_a_readme_launches_has_work_for_every_process(readme, config_of):
    launches = list(launched(readme))
    assert launches
    for recipe, overrides, processes in launches:
        checked = load_recipe(recipe, [*overrides, f"model.base={config_of(recipe)}"])
        assert plan(checked, processes=processes)["memory"]["processes"] == processes
