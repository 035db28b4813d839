"""Plots of the inference benchmarks, beside their JSON files."""

from __future__ import annotations

from typing import Any

from swiftkv_train.bench.shared_storage import PER_REQUEST, PLAIN
from swiftkv_train.quality import OTHER_KINDS, TRAINED_ON

COLOURS = {
    "ours": "#1f77b4",
    "ours graphed": "#08306b",
    "dense": "#7a7a7a",
    "re-rotate": "#d62728",
    "re-rotate published": "#ff9896",
    "recompute": "#ff7f0e",
    "none": "#7a7a7a",
    "int8": "#1f77b4",
    "fp8": "#2ca02c",
}
MARKERS = "osD^vPX*"


def _panels(pyplot: Any, count: int, height: float = 3.6) -> tuple[Any, list[Any]]:
    figure, grid = pyplot.subplots(1, count, figsize=(4.6 * count, height), layout="constrained", squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[0])


def _doubling(axes: Any, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(values)), [f"{value:,}" for value in sorted(set(values))])


def draw_prefill(result: dict[str, Any], pyplot: Any) -> Any:
    """Time to the first token over the length of the prompt, and SwiftKV's over the base's."""
    figure, panels = _panels(pyplot, 2)
    lengths = [row["prompt_tokens"] for row in result["rows"]]
    for name, marker, label in (("base", "s", "base"), ("student", "o", "SwiftKV")):
        seconds = [row[f"{name}_seconds"] for row in result["rows"]]
        panels[0].plot(lengths, seconds, marker=marker, label=label)
    panels[0].set(xlabel="prompt tokens", ylabel="seconds to the first token", ylim=(0, None))
    panels[0].legend(frameon=False)
    panels[1].plot(lengths, [row["ratio"] for row in result["rows"]], marker="o")
    share = result["num_key_value_layers"] / result["num_hidden_layers"]
    panels[1].axhline(share, color="#000000", linewidth=0.8, linestyle="--", label="share of layers run")
    panels[1].set(xlabel="prompt tokens", ylabel="SwiftKV over base", ylim=(0, 1.05))
    panels[1].legend(frameon=False)
    for axes in panels:
        _doubling(axes, lengths)
    return figure


def draw_stream(result: dict[str, Any], pyplot: Any) -> Any:
    """Milliseconds and memory of a token over the length of the stream, a column a window; then the long run."""
    windows = sorted({row["window"] for row in result["rows"]})
    columns = len(windows) + (1 if result["long"] else 0)
    figure, grid = pyplot.subplots(2, columns, figsize=(4.6 * columns, 6.4), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for column, window in enumerate(windows):
        rows = [row for row in result["rows"] if row["window"] == window]
        for axes, figure_of, factor in ((grid[0, column], "seconds", 1e3), (grid[1, column], "peak_bytes", 2**-20)):
            for name in dict.fromkeys(name for row in rows for name in row["contenders"]):
                points = [(row["tokens"], row["contenders"].get(name, {}).get(figure_of)) for row in rows]
                known = [(tokens, value * factor) for tokens, value in points if value is not None]
                if known:
                    axes.plot(*zip(*known, strict=True), marker="o", label=name, color=COLOURS.get(name))
            axes.set(yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=7)
            axes.locator_params(axis="x", nbins=4)
        grid[0, column].set_title(f"window {window:,}")
        grid[1, column].set_xlabel("tokens so far")
    grid[0, 0].set_ylabel("ms a token")
    grid[1, 0].set_ylabel("peak MiB beside the weights")
    grid[0, 0].legend(frameon=False, fontsize="small")
    if result["long"]:
        _draw_long(result["long"], *grid[:, -1])
    return figure


def _draw_long(long: dict[str, Any], seconds: Any, memory: Any) -> None:
    tokens = [point["tokens"] for point in long["points"]]
    resident = [point["resident_bytes"] / 2**20 for point in long["points"]]
    for label, figure in ((f"{long['chunk']} at a time", "seconds_per_token"), ("one by one", "seconds_of_one")):
        seconds.plot(tokens, [point[figure] * 1e3 for point in long["points"]], label=label)
    seconds.set(ylabel="ms a token", title=f"window {long['window']:,}", yscale="log")
    seconds.yaxis.set_major_formatter("{x:g}")
    seconds.legend(frameon=False)
    memory.plot(tokens, resident, color=COLOURS["ours"])
    memory.set(ylabel="resident MiB of the process", ylim=(0, 1.3 * max(resident)))
    for axes in (seconds, memory):
        axes.locator_params(axis="x", nbins=4)
    memory.set_xlabel("tokens so far")


def draw_sinks(result: dict[str, Any], pyplot: Any) -> Any:
    """Perplexity along the text, a panel for each number of tokens kept, a line for each number of sinks."""
    rows = result["rows"]
    sizes = sorted({row["kept"] for row in rows if row["kept"] is not None})
    figure, panels = _panels(pyplot, len(sizes))
    for axes, size in zip(panels, sizes, strict=True):
        for row in rows:
            if row["kept"] not in (None, size):
                continue
            points = [(point["tokens"], point["perplexity"]) for point in row["points"]]
            dense = {"label": "dense", "color": COLOURS["dense"], "linestyle": ":"}
            axes.plot(*zip(*points, strict=True), **(dense if row["kept"] is None else {"label": str(row["sinks"])}))
        if result["trained_length"] < result["tokens"]:
            axes.axvline(result["trained_length"], color="#000000", linewidth=0.8, linestyle="--")
        axes.set(title=f"{size:,} tokens kept", xlabel="tokens so far (dashed: trained length)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel("perplexity")
    panels[0].legend(frameon=False, title="sinks", ncols=2)
    return figure


def draw_relay(result: dict[str, Any], pyplot: Any) -> Any:
    """How many times as fast as the others, over the batch, a line a prefix; dashed: the ceiling."""
    counts = sorted({row["groups"] for row in result["rows"]})
    size = (9.2, 3.6 * len(counts))
    figure, grid = pyplot.subplots(len(counts), 2, figsize=size, layout="constrained", squeeze=False)
    for count, panels in zip(counts, grid, strict=True):
        rows = [row for row in result["rows"] if row["groups"] == count]
        what = "" if count == 1 else f", {count} prefixes"
        for axes, other in zip(panels, (PLAIN, PER_REQUEST), strict=True):
            _draw_speedups(axes, rows, other)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(title=f"over {other}{what}", xlabel="batch")
        panels[0].set_ylabel("times as fast (dashed: ceiling)")
    grid[0][0].legend(frameon=False, title="shared prefix")
    return figure


def _draw_speedups(axes: Any, rows: list[dict[str, Any]], other: str) -> None:
    prefixes = sorted({row["prefix"] for row in rows})
    for marker, prefix in zip(MARKERS * len(prefixes), prefixes, strict=False):
        known = [row for row in rows if row["prefix"] == prefix and "speedup" in row["contenders"][other]]
        batches = [row["batch"] for row in known]
        speedups = [row["contenders"][other]["speedup"] for row in known]
        (line,) = axes.plot(batches, speedups, marker=marker, label=f"{prefix:,} tokens")
        if other == PLAIN:
            axes.plot(batches, [row["ceiling"] for row in known], linestyle="--", linewidth=1, color=line.get_color())
    axes.axhline(1.0, color="#000000", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    _doubling(axes, [row["batch"] for row in rows])


def draw_decode(result: dict[str, Any], pyplot: Any) -> Any:
    """Milliseconds of a step over the context, a panel a batch."""
    batches = sorted({row["batch"] for row in result["rows"]})
    figure, panels = _panels(pyplot, len(batches))
    for axes, batch in zip(panels, batches, strict=True):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        for marker, name in zip(MARKERS, rows[0]["contenders"], strict=False):
            known = [(row["context"], row["contenders"][name].get("seconds")) for row in rows]
            points = [(context, seconds * 1e3) for context, seconds in known if seconds is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set(title=f"batch {batch}", xlabel="tokens of context")
        _doubling(axes, [row["context"] for row in rows])
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("ms a step")
    panels[0].legend(frameon=False)
    return figure


def draw_serve(result: dict[str, Any], pyplot: Any) -> Any:
    """Tokens a second, and the wait for the first one, over the requests that come at once."""
    figure, panels = _panels(pyplot, 2)
    numbers = [row["clients"] for row in result["rows"]]
    for axes, figure_of, label in (
        (panels[0], "tokens_per_second", "tokens a second, all together"),
        (panels[1], "first_token_seconds", "mean seconds to the first token"),
    ):
        for marker, name in zip(MARKERS, result["rows"][0]["contenders"], strict=False):
            values = [row["contenders"][name].get(figure_of) for row in result["rows"]]
            points = [(number, value) for number, value in zip(numbers, values, strict=True) if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set(xlabel="requests at once", ylabel=label, ylim=(0, None))
        _doubling(axes, numbers)
    panels[0].legend(frameon=False)
    return figure


def draw_kv_memory(result: dict[str, Any], pyplot: Any) -> Any:
    """Bytes of a token over the base's, by form and storage; KL of the storage formats, if it was measured."""
    quality = result["quality"]
    figure, panels = _panels(pyplot, 2 if quality else 1)
    forms = list(dict.fromkeys((row["num_key_value_layers"], row["key_value_group_size"]) for row in result["rows"]))
    labels = [f"l={layers}\ng={size}" for layers, size in forms]
    storages = list(dict.fromkeys(row["quantization"] for row in result["rows"]))
    for place, storage in enumerate(storages):
        ratios = [row["ratio"] for row in result["rows"] if row["quantization"] == storage]
        offsets = [form + 0.27 * (place - 1) for form in range(len(forms))]
        bars = panels[0].bar(offsets, ratios, 0.25, label=storage, color=COLOURS.get(storage))
        panels[0].bar_label(bars, fmt="%.2f", fontsize=7)
    panels[0].set_xticks(range(len(forms)), labels)
    panels[0].set_ylabel("K/V bytes a token, over the base's")
    panels[0].legend(frameon=False)
    if quality:
        forms_of = {row["model"]: f"g={row['key_value_group_size']}" for row in quality} | {"base": "base"}
        names = [f"{row['source']}\n{forms_of[row['model']]}\n{row['quantization']}" for row in quality]
        bars = panels[1].bar(
            names, [row["kl"] for row in quality], color=[COLOURS[row["quantization"]] for row in quality]
        )
        panels[1].bar_label(bars, fmt="%.1e", fontsize=7)
        panels[1].tick_params(axis="x", labelsize=6)
        panels[1].set_ylabel("KL, nats a token")
    return figure


def draw_quality(result: dict[str, Any], pyplot: Any) -> Any:
    """KL, perplexity ratio and agreement over training tokens: a line a variant, a column for each kind of text."""
    from matplotlib.ticker import LogLocator

    variants = result["variants"]
    groups = [group for group in (TRAINED_ON, OTHER_KINDS) if group in variants[0]["points"][-1]]
    measures = {
        "kl": "KL(base || student), nats a token",
        "perplexity_ratio": "perplexity over the base's",
        "agreement": "agreement of the likeliest token",
    }
    size = (4.6 * len(groups), 3.2 * len(measures))
    figure, grid = pyplot.subplots(
        len(measures), len(groups), figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    for row, (measure, label) in zip(grid, measures.items(), strict=True):
        for axes, group in zip(row, groups, strict=True):
            for marker, variant in zip(MARKERS * len(variants), variants, strict=False):
                points = [(point["tokens"], point[group][measure]) for point in variant["points"]]
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=variant["name"])
            axes.spines[["top", "right"]].set_visible(False)
            if measure != "agreement":
                axes.set_yscale("log")
                axes.yaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 4, 5, 7)))  # 9 would touch 10
                axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:.0%}" if measure == "agreement" else "{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=7)
            axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:,.0f}k")
        row[0].set_ylabel(label)
    for axes, group in zip(grid[0], groups, strict=True):
        axes.set_title(group)
    for axes in grid[-1]:
        axes.set_xlabel("training tokens")
    grid[0][0].legend(frameon=False, fontsize="small")
    return figure
