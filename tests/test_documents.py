"""What README and the recipes say holds: commands and their options, recipes, keys and files that are named exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from swiftkv_train.cli import app
from swiftkv_train.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("recipes/*/README.md"), *ROOT.glob("benchmarks/**/README.md")])
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate")
COMMANDS = get_command(app).commands
LAUNCHERS = ("accelerate", "deepspeed")


def relative(path):
    return str(path.relative_to(ROOT))


def command_lines(text):
    """The lines of the shell blocks of a document, comments and variables that are set in front of them removed."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        values: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in values.items():
                line = line.replace(f"${name}/", f"{value}/")
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Za-z_]+=\S*", words[0]):
                name, _, value = words.pop(0).partition("=")
                values[name] = value
            found.append(words)
    return [words for words in found if words]


def recipes_of(words):
    """The recipes that a command names, and the overrides after the first."""
    named = [
        position
        for position, word in enumerate(words)
        if word.startswith("recipes/") and word.endswith(".yaml") and "/accelerate/" not in word
    ]
    behind = words[named[0] + 1 :] if named else []
    return [ROOT / words[position] for position in named], [word for word in behind if re.match(r"[\w.]+=", word)]


SAID = [pytest.param(document, id=relative(document)) for document in DOCUMENTS]
LINES = [
    pytest.param(words, id=f"{relative(document)}: {' '.join(words)}")
    for document in DOCUMENTS
    for words in command_lines(document.read_text(encoding="utf-8"))
]


def test_readme_shows_the_figures_of_the_benchmark_files():
    script = ROOT / "benchmarks" / "tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [line for line in LINES if line.values[0][0] == "swiftkv"])
def test_commands_and_their_options_exist(words):
    command = COMMANDS[words[1]]
    if hasattr(command, "commands"):  # `swiftkv bench init|step|prefill`
        options = {name for part in words[2].split("|") for name in options_of(command.commands[part])}
    else:
        options = options_of(command)
    assert set(re.findall(r"(?<![\w-])--[\w-]+", " ".join(words))) <= options


def options_of(command):
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("words", [line for line in LINES if line.values[0][0] == "python"])
def test_scripts_take_the_options_that_commands_give_them(words):
    told = subprocess.run([sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True, check=True)
    named, taken = (set(re.findall(r"(?<![\w-])--[\w-]+", text)) for text in (" ".join(words), told.stdout))
    assert named <= taken


@pytest.mark.parametrize("words", [line for line in LINES if recipes_of(line.values[0])[0]])
def test_recipes_take_the_overrides_that_commands_give_them(words):
    recipes, overrides = recipes_of(words)
    for recipe in recipes:
        assert load_recipe(recipe, overrides).training.steps > 0


@pytest.mark.parametrize("words", [line for line in LINES if line.values[0][0] in LAUNCHERS])
def test_launchers_understand_what_they_are_told(words):
    launcher, *arguments = words
    if launcher == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments.pop(0) == "launch"
        told = launch_command_parser().parse_args(arguments)
        started, rest = told.training_script, told.training_script_args
    else:
        runner = pytest.importorskip("deepspeed.launcher.runner")
        told = runner.parse_args(arguments)
        started, rest = told.user_script, told.user_args
        if told.hostfile != runner.DLTS_HOSTFILE:  # its default
            assert told.node_rank < len(runner.fetch_hostfile(str(ROOT / told.hostfile)))
    assert told.module
    assert started == "swiftkv_train.distill"
    assert rest == words[-len(rest) :]
    assert rest[0] == "RECIPE" or recipes_of(rest)[0]


@pytest.mark.parametrize("document", SAID)
def test_keys_that_are_named_with_a_value_exist(document):
    for code in re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8")):
        words = code.split()
        if all(re.match(r"[a-z_]+(\.[a-z_]+)+=", word) for word in words):
            load_recipe(ROOT / "recipes/debug/debug.yaml", words)


@pytest.mark.parametrize("document", SAID)
def test_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/-])(?:recipes|scripts|tests)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("recipe", RECIPES, ids=relative)
def test_every_recipe_is_valid_and_in_its_readme(recipe):
    assert load_recipe(recipe).training.steps > 0
    readme = (recipe.parent / "README.md").read_text(encoding="utf-8")
    assert any(relative(recipe) in words for words in command_lines(readme)), "no command uses it"


@pytest.mark.parametrize("document", [said for said in SAID if "recipes/" in said.id])
def test_files_beside_a_readme_that_it_names_exist(document):
    beside = {path.name for path in [*document.parent.iterdir(), *ROOT.glob("recipes/accelerate/*.yaml")]}
    assert set(re.findall(r"`([\w-]+\.yaml)`", document.read_text(encoding="utf-8"))) <= beside
