"""Reading recipes: files that extend each other, `key=value` overrides, and what is wrong with one in a line.

Unknown keys are refused with the file, the key's path and the nearest right key. Overrides use dotted paths
(`training.steps=200`). The path of `extends: other.yaml` is relative to the recipe: whatever a recipe leaves out is as
in the one it extends.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Recipe, own_text
from swiftkv_train.recipe_yaml import from_yaml


def as_override(key: str, value: Any) -> str:
    """The `dotted.key=value` that sets a value of JSON's kinds, whatever characters are in it."""
    return f"{key}={json.dumps(value)}"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings; the value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value has the wrong type or is out of range.
    """
    return parse_recipe(_read(Path(path)), str(path), overrides)


def parse_recipe(text: str, origin: str, overrides: list[str] | None = None) -> Recipe:
    """`load_recipe` for text already read; `origin` names it in errors."""
    content = _content(text, Path(origin), [])
    if content.get("data") == "self":  # so that overrides find its keys
        content["data"] = own_text()
    for override in overrides or []:
        _apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"recipe {origin}: {_first_problem(error)}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None


def _content(text: str, origin: Path, extending: list[Path]) -> dict[str, Any]:
    """What a recipe says, together with those it extends; `extending`: the files that have led here."""
    try:
        content = from_yaml(text)
    except ValueError as error:
        raise UserError(f"recipe {origin} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {origin} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    if "extends" not in content:
        return content
    extended = content.pop("extends")
    if not isinstance(extended, str) or "\0" in extended:
        raise UserError(f"recipe {origin}: extends must be the path of another recipe (found {extended!r})")
    path, extending = origin.parent / extended, [*extending, origin.resolve()]
    if path.resolve() in extending:
        raise UserError(f"recipe {origin}: extends leads back to {path}")
    if not os.path.isfile(path):
        raise UserError(f"recipe {origin}: extends {extended}, but {path} is not a file")
    return _merged(_content(_read(path), path, extending), content)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; a list is replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must look like training.steps=200")
    *parents, last = key.split(".")
    node: Any = content
    for depth, name in enumerate(parents):
        place = _place_in(node, name, key)
        # A copy, for an anchor may have put the same section in several places.
        held = node[place] if isinstance(node, list) else node.get(place)
        child = {} if held is None else copy.copy(held)  # a section that a recipe leaves out, or says is null
        if not isinstance(child, dict | list):
            raise UserError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
        node[place] = child
        node = child
    try:
        node[_place_in(node, last, key)] = from_yaml(value)
    except ValueError:
        raise UserError(f"override {override!r}: the value is not YAML") from None


def _place_in(node: Any, name: str, key: str) -> Any:
    """The key of a section, or the position in a list."""
    if isinstance(node, dict):
        return name
    if not name.isdecimal() or len(name) > 9 or int(name) >= len(node):
        raise UserError(f"override {key}: {name!r} must be a position from 0 to {len(node) - 1}")
    return int(name)


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # An unknown key explains a missing one (a typing error makes both), so it is told first.
    problem = min(problems, key=lambda item: item["type"] != "extra_forbidden")
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(Recipe, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    if problem["type"] == "model_type":
        section = _known_keys(Recipe, location)
        return f"{key} must be a section with keys of its own ({', '.join(section)}), found {_short(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = f" (found {_short(value)})" if isinstance(value, str | int | float | bool | None | list) else ""
    return f"{key}: {message}{shown}" if key else message


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _section_type(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if found := _section_type(argument):
                return found
    return None
