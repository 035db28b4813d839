"""Put measured figures into the project's README and those beside this file: python benchmarks/tables.py [--check]"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
KINDS = ("all kinds trained on", "other kinds")  # of text, in files


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def where(result: dict[str, Any]) -> str:
    facts = result["environment"]
    dtype = [facts["dtype"]] if "dtype" in facts else []  # a file may hold figures of several, or of none
    versions = [f"torch {facts['torch']}", f"transformers {facts['transformers']}"]
    return ", ".join([named(facts), f"{facts['threads']} threads", *dtype, *versions, facts["date"]])


def named(facts: dict[str, Any]) -> str:
    """A processor, with its instructions, which early files lack."""
    return facts["device"] + (f" ({facts['instructions']})" if "instructions" in facts else "")


def report_of(name: str, *, speed: bool) -> str:
    """What `swiftkv evaluate` found."""
    from swiftkv_train.evaluate.report import quality_table, speed_table

    report = load(name)
    tables = [quality_table(report), *([speed_table(report)] if speed else [])]
    return "\n\n".join([*tables, f"`benchmarks/{name}`: {where(report)}."])


def loss_rows(loss: dict[str, Any]) -> list[str]:
    """Ours against each of the others, which share a cell; those that could not run there too."""
    lines = []
    for row in loss["rows"]:
        ours, *others = row["contenders"].values()
        against = "; ".join(list(row["contenders"])[1:])
        shape = f"{row['rows']:,} rows x {row['vocabulary']:,} tokens, hidden size {row['hidden_size']}"
        for figure, what, show in (
            ("seconds", f"loss and gradient, {shape}, against {against}", lambda value: f"{value:.2f} s"),
            ("peak_bytes", "its peak memory", lambda value: f"{value / 2**20:,.0f} MiB"),
        ):
            ratio = f"{figure.removesuffix('_bytes')}_ratio"
            theirs = "; ".join("not measured" if "failed" in cell else show(cell[figure]) for cell in others)
            ratios = "; ".join("–" if "failed" in cell else f"{cell[ratio]:.2f}" for cell in others)
            lines.append(f"| {what} | {show(ours[figure])} | {theirs} | {ratios} | `loss.json` |")
    for row in loss["accuracy"]:
        (_, ours), *others = row["gradient_error"].items()
        against = "; ".join(name for name, _ in others)
        what = f"error of its gradient, {row['vocabulary']:,} tokens, KL {row['kl']:.1g}, against {against}"
        theirs = "; ".join(f"{error:.2%}" for _, error in others)
        ratios = "; ".join(f"{ours / error:.2f}" for _, error in others)
        lines.append(f"| {what} | {ours:.2%} | {theirs} | {ratios} | `loss.json` |")
    return lines


def startup_rows(startup: dict[str, Any]) -> list[str]:
    cold, warm = startup["rows"]
    what = (
        f"start-up to the first batch, filled / empty token cache ({warm['source_files_opened']} of "
        f"{startup['source_files']} source files opened, {warm['documents_tokenised']:,} documents tokenised)"
    )
    figures = f"{warm['seconds']:.3f} s | {cold['seconds']:.3f} s | {startup['seconds_ratio']:.3f}"
    return [f"| {what} | {figures} | `startup.json` |"]


def plan_rows(plan: dict[str, Any]) -> list[str]:
    """The worst setting of each model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in plan["rows"]):
        rows = [row for row in plan["rows"] if row["model"] == model and "failed" not in row]
        if not rows:
            continue
        worst = max(rows, key=lambda row: abs(math.log(row["ratio"])))
        planned, measured = (f"{worst[f'{kind}_bytes'] / 2**20:,.1f} MiB" for kind in ("predicted", "measured"))
        what = f"bytes of a training step, planned / measured, {model} model, worst of {len(rows)} settings"
        lines.append(f"| {what} | {planned} | {measured} | {worst['ratio']:.2f} | `plan.json` |")
    return lines


MEASURED_LATER: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "loss.json": loss_rows,
    "startup.json": startup_rows,
    "plan.json": plan_rows,
}


def milliseconds(cell: dict[str, Any]) -> str:
    value = cell["seconds"] * 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def against(row: dict[str, Any], what: str, file: str) -> list[str]:
    """Ours against the contenders of a row that were measured."""
    ours, names, theirs, ratios = compared(row)
    return [f"| {what}, against {names} | {ours} | {theirs} | {ratios} | `{file}` |"] if names else []


def compared(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """The time of the first contender; names, times and speed-ups of those of the others that were measured."""
    (_, first), *others = row["contenders"].items()
    others = [(name, cell) for name, cell in others if "failed" not in cell]
    names = "; ".join(name for name, _ in others)
    times = "; ".join(milliseconds(cell) for _, cell in others)
    return milliseconds(first), names, times, "; ".join(f"{cell['speedup']:.2f}" for _, cell in others)


def stream_rows(file: str, stream: dict[str, Any], few: bool) -> list[str]:
    """Of every window the longest stream, at which all were measured."""
    model = "base model" if stream["model_type"] == "llama" else "SwiftKV"
    longest = {row["window"]: row for row in stream["rows"] if row["window"] == 1024 or not few}
    lines = []
    for window, row in longest.items():
        what = f"{processor(stream)}: a token of a stream, {model}, window {row['sinks']} + {window:,}"
        lines += against(row, f"{what}, {row['tokens']:,} tokens on", file)
        peaks = {name: cell["peak_bytes"] / 2**20 for name, cell in row["contenders"].items() if "failed" not in cell}
        (_, peak), *others = peaks.items()
        cells = [[f"{other:,.1f} MiB", f"{peak / other:.2f}"] for _, other in others]
        cells = ["; ".join(column) for column in zip(*cells, strict=True)]
        names = "; ".join(name for name, _ in others)
        what = f"its peak memory beside the weights, against {names}"
        lines.append(f"| {what} | {peak:,.1f} MiB | {cells[0]} | {cells[1]} | `{file}` |")
    return lines


def stream_targets() -> str:
    """What was aimed for of streams, and what would be reached if our attention took no time."""
    lines = ["| file | ours over | window | wanted | found | bound |", "|---|---|---|---|---|---|"]
    for file in STREAMS:
        for row in load(file)["targets"]:
            other, _, window = row["what"].removeprefix("ours over ").partition(", window ")
            found, bound = (
                "not measured" if row.get(name) is None else f"{row[name]:.2f}" for name in ("found", "bound")
            )
            found = found if row["reached"] else f"**{found}**"
            lines.append(f"| `{file}` | {other} | {window} | {row['wanted']} | {found} | {bound} |")
    return "\n".join(lines)


def sinks() -> str:
    """Perplexity up to the trained length / beyond it, by tokens kept and by sinks."""
    results = {name: load(name) for name in ("sinks_base.json", "sinks.json")}
    numbers = sorted({row["sinks"] for row in next(iter(results.values()))["rows"] if row["kept"]})
    columns = ["file", "kept", *(f"{number} sinks" for number in numbers), "dense"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def cell(row: dict[str, Any]) -> str:
        values = (row["perplexity"], row["perplexity_beyond"])
        return " / ".join("–" if value is None else f"{value:,.1f}" for value in values)

    for name, result in results.items():
        cells = {(row["kept"], row["sinks"]): cell(row) for row in result["rows"]}
        for kept in sorted({kept for kept, _ in cells if kept}):
            found = [cells.get((kept, number), "not measured") for number in numbers]
            lines.append(f"| `{name}` | {kept:,} | {' | '.join(found)} | {cells[None, None]} |")
    return "\n".join([*lines, "", origin(results)])


def processor(result: dict[str, Any]) -> str:
    return named(result["environment"]).replace("(R)", "").replace(" Processor", "")


def relay_rows(file: str, relay: dict[str, Any], few: bool) -> list[str]:
    """One cell; `relays` has all."""
    lines = []
    for row in relay["rows"]:
        if (row["batch"], row["prefix"]) == (16, 4096):
            groups = row.get("groups", 1)  # which early files lack
            over = f"{'a shared prefix' if groups == 1 else f'{groups} shared prefixes'} of {row['prefix']:,} tokens"
            what = f"{processor(relay)}: attention, batch {row['batch']}, over {over}"
            lines += against(row, what, file)
    return lines


def relays() -> str:
    """How many times as fast as plain and as shared storage read per request, and the share of the ceiling."""
    parts = []
    for name in ("relay.json", "relay_avx2.json"):
        result = load(name)
        rows = {(row.get("groups", 1), row["batch"], row["prefix"]): row for row in result["rows"]}
        groups, batches, lengths = (sorted(set(numbers)) for numbers in zip(*rows, strict=True))
        columns = ["prefixes", "batch", *(f"{length:,} tokens" for length in lengths)]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for group in groups:
            for batch in batches:
                cells = [relay_cell(rows.get((group, batch, length))) for length in lengths]
                if any(cells):
                    lines.append(f"| {group} | {batch} | {' | '.join(cells)} |")
        parts.append("\n".join([*lines, "", f"`{result['command']}`; {where(result)}."]))
    return "\n\n".join(parts)


def relay_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    cells = row["contenders"]
    ratios = [f"{cells[name]['speedup']:.2f}" for name in ("plain", "per request") if "speedup" in cells.get(name, {})]
    if not row["shared"]:
        return f"{' / '.join(ratios)}, copied"
    share = row["share_of_ceiling"]
    return " / ".join(ratios) + ("" if share is None else f", {share:.0%}")


def decode_rows(file: str, decode: dict[str, Any], few: bool) -> list[str]:
    """The corners, or those of the longest context."""
    lines = []
    batches, contexts = (sorted({row[key] for row in decode["rows"]}) for key in ("batch", "context"))
    for row in decode["rows"]:
        if row["batch"] in (batches[0], batches[-1]) and row["context"] in (contexts[-1], contexts[-1 if few else 0]):
            base, names, ours, ratios = compared(row)
            what = f"{processor(decode)}: a generated token, batch {row['batch']}, context {row['context']:,}"
            lines.append(f"| {what}: {names}, against base | {ours} | {base} | {ratios} | `{file}` |")
    return lines


def serve_rows(file: str, serve: dict[str, Any], few: bool) -> list[str]:
    """Until all are answered; with a system message also from one token to the next."""
    lines = []
    system = serve["system_tokens"]
    behind = f" behind a system message of {system:,}" if system else ""
    for row in serve["rows"]:
        if few and row["clients"] != max(row["clients"] for row in serve["rows"]):
            continue
        tokens = row["contenders"]["ours"]["tokens"] // row["clients"]
        what = f"{processor(serve)}: {row['clients']} requests at once, {serve['prompt_tokens']} tokens each{behind}"
        lines += against(row, f"{what}, {tokens} answered", file)
        if system and row["clients"] > 1 and tokens > 1:
            ours = row["contenders"]["ours"]["next_token_seconds"]
            cells = {
                name: {"seconds": cell["next_token_seconds"], "speedup": cell["next_token_seconds"] / ours}
                for name, cell in row["contenders"].items()
                if name != "one by one" and "failed" not in cell
            }
            lines += against({"contenders": cells}, "of these, from one token to the next", file)
    return lines


def long_stream_rows(file: str, result: dict[str, Any], few: bool) -> list[str]:
    long = result["long"]
    cache = f"one cache of {long['sinks']} + {long['window']:,}"
    how, times = f"{long['chunk']} at a time", f"{long['seconds_slope']:+.1%}"
    if "over_young_slope" in long:  # which early files lack
        how = f"{how}; one by one; that over a young stream's"
        times = f"{times}; {long['seconds_of_one_slope']:+.1%}; {long['over_young_slope']:+.1%}"
    what = f"{processor(result)}: {long['tokens']:,} tokens through {cache}: change over them of a token's time ({how})"
    change = f"{times}; {long['memory_growth_bytes'] / 2**20:+,.1f} MiB"
    return [f"| {what}; of memory | {change} | – | – | `{file}` |"]


def kv_memory_rows(memory: dict[str, Any], few: bool) -> list[str]:
    def form(row: dict[str, Any]) -> str:
        first, layers = row["num_key_value_layers"], row["num_hidden_layers"]
        model = "base" if first == layers else f"l = {first} of {layers}, g = {row['key_value_group_size']}"
        return model if row["quantization"] == "none" else f"{model}, {row['quantization']}"

    lines = [
        f"| K/V bytes per token, {form(row)}, against the base | {row['bytes_per_token']:,.0f} "
        f"| {row['base_bytes_per_token']:,.0f} | {row['ratio']:.3f} | `kv_memory.json` |"
        for row in memory["rows"]
        if not few or (row["num_key_value_layers"] < row["num_hidden_layers"] and row["quantization"] != "fp8")
    ]
    for row in memory["quality"]:
        if few and (row["key_value_group_size"] != 1 or row["quantization"] == "fp8" or row["model"] == "base"):
            continue
        lines.append(
            f"| perplexity on {row['source']}, {form(row)}, against K/V as they are (KL {row['kl']:.1e}) "
            f"| {row['quantised_perplexity']:.2f} | {row['perplexity']:.2f} | {row['perplexity_ratio']:.4f} "
            "| `kv_memory.json` |"
        )
    for row in memory["quality_against_base"] if not few else ():
        lines.append(
            f"| perplexity on {row['source']}, {form(row)}, calibrated alone, against the base (KL {row['kl']:.3f}) "
            f"| {row['quantised_perplexity']:.2f} | {row['perplexity']:.2f} | {row['perplexity_ratio']:.3f} "
            "| `kv_memory.json` |"
        )
    return lines


STREAMS = ("stream.json", "stream_amd.json", "stream_base.json", "stream_base_amd.json")
INFERENCE: dict[str, Callable[[dict[str, Any], bool], list[str]]] = {
    **{file: partial(stream_rows, file) for file in STREAMS},
    **{file: partial(long_stream_rows, file) for file in ("stream_long.json", "stream_long_avx2.json")},
    **{file: partial(relay_rows, file) for file in ("relay.json", "relay_avx2.json")},
    **{file: partial(decode_rows, file) for file in ("decode.json", "decode_amd.json")},
    **{file: partial(serve_rows, file) for file in ("serve.json", "serve_system.json")},
    "kv_memory.json": kv_memory_rows,
}


def inference(*, few: bool) -> str:
    """`few`: what a reader asks for first."""
    results = {name: load(name) for name in INFERENCE if (FOLDER / name).exists()}
    lines = ["| measured side by side | ours | theirs | ratio | file |", "|---|---|---|---|---|"]
    for name, result in results.items():
        lines += INFERENCE[name](result, few)
    return "\n".join([*lines, "", origin(results)])


def targets() -> str:
    results = {name: load(name) for name in ("init.json", "step.json", "prefill.json")}
    # No row where no machine has measured yet.
    results |= {name: load(name) for name in MEASURED_LATER if (FOLDER / name).exists()}
    init, step, prefill = results["init.json"], results["step.json"], results["prefill.json"]
    lines = ["| measured side by side | ours | theirs | ratio | file |", "|---|---|---|---|---|"]
    for name, row in init["sources"].items():
        lines.append(
            f"| KL on test documents before training, calibrated / copied start, {name} "
            f"| {row['calibrated']['kl']:.3f} | {row['copied']['kl']:.3f} | {row['kl_ratio']:.2f} | `init.json` |"
        )
    rates, peaks = step["tokens_per_second"], step["peak_bytes"]
    shape = f"{step['batch_size']} x {step['sequence_length']} tokens"
    lines.append(
        f"| training tokens/s, {shape}, against a reference-style step | {rates['swiftkv_train']:,.0f} "
        f"| {rates['reference']:,.0f} | {step['throughput_ratio']:.2f} | `step.json` |"
    )
    lines.append(
        f"| its peak memory above weights and optimizer | {peaks['swiftkv_train'] / 2**20:,.0f} MiB "
        f"| {peaks['reference'] / 2**20:,.0f} MiB | {step['peak_memory_ratio']:.2f} | `step.json` |"
    )
    for row in prefill["rows"]:
        ours, theirs = row["student_seconds"] * 1e3, row["base_seconds"] * 1e3
        what = f"time to first token, {row['prompt_tokens']} tokens, SwiftKV / base"
        lines.append(f"| {what} | {ours:.0f} ms | {theirs:.0f} ms | {row['ratio']:.2f} | `prefill.json` |")
    for name, rows in MEASURED_LATER.items():
        lines += rows(results[name]) if name in results else []
    return "\n".join([*lines, "", *unmeasured(results), origin(results)])


def unmeasured(results: dict[str, dict[str, Any]]) -> list[str]:
    """Why cells say so."""
    rows = results["loss.json"]["rows"] if "loss.json" in results else []
    reasons = {
        f"{name}: {cell['failed']}" for row in rows for name, cell in row["contenders"].items() if "failed" in cell
    }
    return [f"Not measured: {'; '.join(sorted(reasons))}.", ""] if reasons else []


def origin(results: dict[str, dict[str, Any]]) -> str:
    """Where the files were measured: once for those that agree."""
    files: dict[str, list[str]] = {}
    for name, result in results.items():
        files.setdefault(where(result), []).append(f"`{name}`")
    if len(files) == 1:
        return f"{next(iter(files))}."
    return " ".join(f"{', '.join(names)}: {place}." for place, names in files.items())


def variants(name: str) -> str:
    """KL over training tokens of a file's variants, and how they end, kinds trained on / other kinds."""
    result = load(name)
    points = [point["tokens"] for point in result["variants"][0]["points"]]
    columns = [
        "variant",
        *(f"{tokens:,}" for tokens in points),
        "agreement",
        "perplexity ratio",
        "tokens to the first's last KL",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for variant in result["variants"]:
        *before, last = map(measures, variant["points"])
        cells = [kl for kl, *_ in before] + last
        cells.append(
            " / ".join(
                "not reached" if row["tokens"] is None else f"{row['tokens']:,}"
                for group, row in variant["as_good_as_first"].items()
                if group in KINDS
            )
        )
        name = ": ".join([variant["name"], *([idea] if (idea := variant["settings"].get("idea")) else [])])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{result['command']}`; {where(result)}."])


def measures(row: dict[str, Any]) -> list[str]:
    """KL, agreement, perplexity ratio: of kinds of text that are trained on / others; of all if a row has no more."""
    kinds = [row[kind] for kind in KINDS] if KINDS[-1] in row else [row]
    formats = {"kl": ".3f", "agreement": ".1%", "perplexity_ratio": ".3f"}
    return [" / ".join(format(kind[name], how) for kind in kinds) for name, how in formats.items()]


def forms(name: str) -> str:
    """Predicted loss and KL of a file's forms."""
    result = load(name)
    lines = ["| form | K/Vs in the tail | predicted | KL | agreement | perplexity ratio |", "|---|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: row["predicted"]):
        cells = [row["form"], str(len(row["key_value_groups"])), f"{row['predicted']:.3f}", *measures(row)]
        lines.append(f"| {' | '.join(cells)} |")
    correlation = f"Spearman's rank correlation: {result['rank_correlation']:.3f}."
    return "\n".join([*lines, "", correlation, "", f"`{result['command']}`; {where(result)}."])


def fit() -> str:
    """How much of the variance of each tail layer's K and V the calibration's linear maps explain."""
    rows = load("quality/fit.json")
    lines = [f"| layer | {' | '.join(str(row['layer']) for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name, figure in (("K", "r2_keys"), ("V", "r2_values")):
        lines.append(f"| R² of {name} | {' | '.join(f'{row[figure]:.2f}' for row in rows)} |")
    return "\n".join(lines)


def tasks() -> str:
    from swiftkv_train.evaluate.report import task_table

    result = load("quality/tasks.json")
    return f"{task_table(result['tasks'])}\n\n`benchmarks/quality/tasks.json`: {where(result)}."


def limit() -> str:
    """The calibrated model with the base's own K or V in place of the fitted ones."""
    result = load("quality/limit.json")
    lines = ["| the base's own | KL | agreement | perplexity ratio |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {' | '.join([row['own'], *measures(row)])} |")
    return "\n".join([*lines, "", f"`{result['command']}`; {where(result)}."])


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": partial(report_of, "quickstart.json", speed=True),
    "targets": targets,
    "inference": partial(inference, few=True),
}
STUDY: dict[str, Callable[[], str]] = {
    "fit": fit,
    "tasks": tasks,
    "variants": partial(variants, "quality/start.json"),
    "schedule": partial(variants, "quality/schedule.json"),
    "million": partial(variants, "quality/million.json"),
    "tried": partial(variants, "quality/tried.json"),
    "ideas": partial(variants, "quality/ideas.json"),
    "full": partial(report_of, "quality/full.json", speed=False),
    "groups2": partial(variants, "quality/groups2.json"),
    "groups4": partial(variants, "quality/groups4.json"),
    "ideas_of_groups": partial(variants, "quality/ideas_g2.json"),
    "million_groups2": partial(variants, "quality/million_groups2.json"),
    "forms": partial(forms, "quality/layers.json"),
    "calibration": partial(forms, "quality/calibration.json"),
    "forms_on_tests": partial(forms, "quality/forms.json"),
    "limit": limit,
}
FILES = {
    README: TABLES,
    FOLDER / "README.md": {
        "inference": partial(inference, few=False),
        "relay": relays,
        "stream_targets": stream_targets,
        "sinks": sinks,
    },
    FOLDER / "quality/README.md": STUDY,
}


def filled(readme: str, tables: dict[str, Callable[[], str]]) -> str:
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"the README has no markers for {name}")
        readme = f"{before}{begin}\n{table()}\n{end}{after}"
    return readme


def main() -> None:
    for file, tables in FILES.items():
        text = file.read_text(encoding="utf-8")
        wanted = filled(text, tables)
        if "--check" not in sys.argv[1:]:
            file.write_text(wanted, encoding="utf-8")
        elif text != wanted:
            raise SystemExit(f"{file} does not show the figures of benchmarks/; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
