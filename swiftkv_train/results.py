"""Result files: JSON where the user says, and what is drawn beside it.

What a user has is never overwritten: only an earlier result of the same command is replaced, and every file as a whole.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swiftkv_train.durable import replacing, write_text
from swiftkv_train.errors import RunError, UserError


def check_target(option: str, path: Path, is_own: Callable[[Any], bool], beside: Iterable[Path] = ()) -> None:
    """To be called before anything is computed. `option` names `path` in errors; `beside`: what is drawn with it.

    Raises UserError unless `path` can be written, and is absent (then so must be those `beside`) or holds what `is_own`
    knows as an earlier result.
    """
    check_writable(option, path)
    try:
        if os.path.lexists(path):
            if not path.is_file() or not is_own(json.loads(path.read_text(encoding="utf-8"))):
                raise ValueError("it is something else")
        elif others := [other for other in beside if os.path.lexists(other)]:
            raise UserError(f"{option} {path}: {others[0]} exists already; name another place, or move that file")
    except OSError as error:
        raise UserError(f"{option} {path} exists already and cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{option} {path} exists already and is no earlier result of this command; name another place"
        ) from None


def check_writable(option: str, path: Path) -> None:
    """Raises UserError where there is no place for `path`."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path} cannot be written: no permission to write to {parent}")


def plot_of(option: str, path: Path) -> Path:
    """The plot beside a result. Raises UserError where there cannot be one."""
    if not path.name or path.suffix == ".png":
        raise UserError(f"{option} {path} must name a JSON file, which its plot is put beside as .png")
    return path.with_suffix(".png")


def write_result(option: str, path: Path, result: dict[str, Any], of: str) -> None:
    """Raises UserError when `path` cannot be written, RunError: see `to_json`."""
    text = to_json(result, of)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text + "\n")
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None


def save_plot(figure: Any, path: Path) -> None:
    """A figure of pyplot's as PNG, and close it. Raises UserError when it cannot be written."""
    from matplotlib import pyplot

    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=140, format="png")
    except OSError as error:
        raise UserError(f"plot {path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def to_json(result: Any, of: str) -> str:
    """`of`: the model or command it is of. Raises RunError for a figure that is nan or infinite: JSON knows neither."""
    if odd := _not_finite(result, ""):
        raise RunError(f"{of}: {odd}, so there is no result; look for nan in the weights, or for an overflow")
    return json.dumps(result, indent=2)


def _not_finite(value: Any, name: str) -> str | None:
    """The first number that is not finite, in words."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{name} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((odd for key, item in items if (odd := _not_finite(item, f"{name}.{key}".lstrip(".")))), None)


def plot(result: dict[str, Any], draw: Callable[[dict[str, Any], Any], Any], output: Path) -> None:
    """What `draw` makes of a result, as PNG beside its JSON file `output`."""
    if (pyplot := plotting()) is not None:
        save_plot(draw(result, pyplot), output.with_suffix(".png"))


def plotting() -> Any:
    """matplotlib's pyplot, drawing into files; None, and a line that says so, where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
