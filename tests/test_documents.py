"""What README and the recipes say holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from swiftkv_train.cli import app
from swiftkv_train.recipe import load_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("recipes/*/README.md"), ROOT / "benchmarks" / "README.md"])


def test_readme_shows_the_figures_of_the_benchmark_files():
    script = ROOT / "benchmarks" / "tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    commands = {command.name or command.callback.__name__ for command in app.registered_commands} | {"bench"}
    assert set(re.findall(r"^swiftkv (\w+)", text, flags=re.MULTILINE)) <= commands
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"(?:recipes|scripts)/[\w./-]+\.(?:yaml|sh)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/[!a]*/*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    assert load_recipe(recipe).training.steps > 0
