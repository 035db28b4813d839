"""What every l and every grouping is predicted to lose (see `swiftkv_train.layer_choice`): file, tables and plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from swiftkv_models.llama import uniform_groups
from swiftkv_train.errors import UserError
from swiftkv_train.results import check_target, plot, plot_of, write_result

BUDGETS = {"prefill": "prefill FLOPs", "kv": "K/V bytes"}
SHOWN = 8  # forms within a budget


def check(path: Path) -> None:
    """Raises UserError unless `write` may write there."""
    check_target("--layers", path, _is_prediction, [plot_of("--layers", path)])


def write(result: dict[str, Any], path: Path) -> None:
    """As JSON, and a plot beside it."""
    write_result("--layers", path, result, f"model {result['base']}")
    plot(result, draw, path)


def read(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What `write` wrote, of the base that the plan is for."""
    how = "make it with `swiftkv calibrate RECIPE --layers FILE`"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--layers {path} does not exist; {how}") from None
    except OSError as error:
        raise UserError(f"--layers {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        result = None
    if not _is_prediction(result):
        raise UserError(f"--layers {path} is no prediction of layers; {how}")
    layers, base = result["num_hidden_layers"], result["base"]
    if (layers, base) != (plan["num_hidden_layers"], plan["base"]):
        raise UserError(f"--layers {path} is of {base} with {layers} layers, not of the recipe's {plan['base']}; {how}")
    return result


def within_budget(
    plan: dict[str, Any], result: dict[str, Any], prefill: float | None, kv: float | None
) -> dict[str, Any]:
    """The forms that leave at most these shares of the base's prefill FLOPs and K/V bytes, the least loss first.

    Behind the recipe of `plan`, of which the form counts. Raises UserError where there is none.
    """
    rows = [*result["uniform"], *result["grouped"]]
    fitting: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["loss"]):
        shares = (row["prefill_ratio"], prefill), (row["cache_ratio"], kv)
        if all(most is None or share <= most for share, most in shares):
            groups = row.get("key_value_groups") or uniform_groups(
                row["num_key_value_layers"], result["num_hidden_layers"], row["key_value_group_size"]
            )
            fitting.setdefault(str(groups), row)  # which tells l as well
    if not fitting:
        least = [f"{min((row[name] for row in rows), default=1):.1%}" for name in ("prefill_ratio", "cache_ratio")]
        raise UserError(
            f"no form is within the budget; there are forms of {least[0]} of the prefill, and of {least[1]} of the K/V"
        )
    has_groups = bool(plan.get("key_value_groups"))
    found = [{"overrides": _overrides(row, has_groups), **row} for row in fitting.values()]
    return {"prefill": prefill, "kv": kv, "rows": found}


def _overrides(row: dict[str, Any], has_groups: bool) -> str:
    """What sets the form behind a recipe, which may have unequal groups itself."""
    groups, size = row.get("key_value_groups") or [], row.get("key_value_group_size", 1)
    words = [f"rewrite.num_key_value_layers={row['num_key_value_layers']}", f"rewrite.key_value_group_size={size}"]
    if any(len(group) > 1 for group in groups):
        words.append(f"'rewrite.key_value_groups={groups}'".replace(", ", ","))
    elif has_groups:
        words.append("rewrite.key_value_groups=null")
    return " ".join(words)


def budget_table(found: dict[str, Any]) -> Table:
    """The best of `within_budget`."""
    given = {what: found[key] for key, what in BUDGETS.items() if found[key] is not None}
    limits = [f"{100 * share:.4g}% of the base's {what}" for what, share in given.items()]
    table = Table(title=f"at most {' and '.join(limits)}: the least loss first", title_justify="left")
    for name in ("l", "prefill", "K/V", "loss"):
        table.add_column(name, justify="right")
    table.add_column("behind the recipe", overflow="fold")
    for row in found["rows"][:SHOWN]:
        shares = f"{row['prefill_ratio']:.1%}", f"{row['cache_ratio']:.1%}"
        table.add_row(str(row["num_key_value_layers"]), *shares, _loss(row), row["overrides"])
    return table


def _is_prediction(held: Any) -> bool:
    """Whether it can be shown, as what `write` writes can."""
    try:
        tables(held)
        numbers = [
            row[name]
            for row in (*held["uniform"], *held["grouped"])
            for name in ("num_key_value_layers", "prefill_ratio", "cache_ratio", "loss")
        ]
        return isinstance(held["base"], str) and all(isinstance(number, int | float) for number in numbers)
    except Exception:  # whatever an odd shape makes of it
        return False


def tables(result: dict[str, Any]) -> list[Table]:
    """One of all l, one of the best groupings at the recipe's own."""
    layers, first = result["num_hidden_layers"], result["num_key_value_layers"]
    rows: dict[int, dict[int, dict[str, Any]]] = {}
    for row in result["uniform"]:
        rows.setdefault(row["num_key_value_layers"], {})[row["key_value_group_size"]] = row
    sizes = sorted({row["key_value_group_size"] for row in result["uniform"]})
    uniform = Table(
        title=f"predicted loss by l, relative to the recipe's form (l = {first} of {layers})", title_justify="left"
    )
    uniform.add_column("l", justify="right")
    uniform.add_column(f"prefill at {result['context']:,}", justify="right")
    for size in sizes:
        uniform.add_column(f"K/V, g = {size}", justify="right")
        uniform.add_column("loss", justify="right")
    for number, found in rows.items():
        cells = [
            text
            for size in sizes
            for text in ((f"{found[size]['cache_ratio']:.1%}", _loss(found[size])) if size in found else ("", ""))
        ]
        style = "bold" if number == first else None
        uniform.add_row(str(number), f"{found[sizes[0]]['prefill_ratio']:.1%}", *cells, style=style)
    grouped = Table(title=f"best groupings, l = {first}", title_justify="left")
    for name in ("K/V", "loss", "sizes of groups"):
        grouped.add_column(name, justify="left" if name.startswith("sizes") else "right")
    for row in result["grouped"]:
        counts = " ".join(str(len(group)) for group in row["key_value_groups"])
        grouped.add_row(f"{row['cache_ratio']:.1%}", _loss(row), counts)
    return [uniform, grouped]


def _loss(row: dict[str, Any]) -> str:
    return "" if row["relative"] is None else f"{row['relative']:.2f}"


def draw(result: dict[str, Any], pyplot: Any) -> Any:
    """Predicted loss over the base's prefill that is left, and over its K/V bytes that are left."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
    for size in sorted({row["key_value_group_size"] for row in result["uniform"]}):
        rows = [row for row in result["uniform"] if row["key_value_group_size"] == size]
        for axes, share in ((left, "prefill_ratio"), (right, "cache_ratio")):
            points = [(row[share], row["relative"]) for row in rows]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"groups of {size}")
    first = result["num_key_value_layers"]
    points = [(row["cache_ratio"], row["relative"]) for row in result["grouped"]]
    right.plot(*zip(*points, strict=True), color="#000000", linewidth=1, label=f"best groups, l = {first}")
    left.set(xlabel=f"FLOPs of a prompt of {result['context']:,} tokens, over the base's")
    right.set(xlabel="K/V bytes, over the base's")
    left.set_ylabel(f"predicted loss, over that of l = {first}")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize="small")
    return figure
