"""report.json, report.md and the plots of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swiftkv_train.durable import write_text
from swiftkv_train.results import check_target, plotting, save_plot, write_result

BASE_COLOUR, STUDENT_COLOUR = "#7a7a7a", "#1f77b4"
JSON, MARKDOWN = "report.json", "report.md"


def check_report(directory: Path) -> None:
    """Raises UserError unless `write_report` may write there."""

    def is_own(held: Any) -> bool:
        return isinstance(held, dict) and {"checkpoint", "base", "sources", "generations"} <= held.keys()

    beside = [directory / name for name in (MARKDOWN, *PLOTS)]
    check_target("--report", directory / JSON, is_own, beside)


def write_report(report: dict[str, Any], directory: Path) -> None:
    """Raises UserError or OSError when the disk refuses, RunError for a figure that is not finite."""
    # First, for it says that the others are this command's.
    write_result("--report", directory / JSON, report, f"{report['checkpoint']} against {report['base']}")
    if plotting() is not None:
        for name, plot in PLOTS.items():
            plot(report, directory / name)
    write_text(directory / MARKDOWN, to_markdown(report))


def quality_table(report: dict[str, Any]) -> str:
    lines = [
        "| held-out text | kind trained on | tokens | KL | agreement "
        "| perplexity, base | perplexity, SwiftKV | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [*report["sources"].items()]
    if report["held_out"]:
        rows.append(("**all kinds trained on**", {**report["held_out"], "kind_trained_on": True}))
    for name, row in rows:
        lines.append(
            f"| {name} | {'yes' if row['kind_trained_on'] else 'no'} | {row['tokens']:,} | {row['kl']:.3f} "
            f"| {row['agreement']:.1%} | {row['base_perplexity']:.2f} | {row['student_perplexity']:.2f} "
            f"| {row['perplexity_ratio']:.3f} |"
        )
    return "\n".join(lines)


def speed_table(report: dict[str, Any]) -> str:
    lines = ["| | base | SwiftKV | ratio |", "|---|---|---|---|"]
    for row in report["time_to_first_token"]:
        lines.append(
            f"| time to first token, {row['prompt_tokens']} prompt tokens | {row['base_seconds'] * 1e3:.0f} ms "
            f"| {row['student_seconds'] * 1e3:.0f} ms | {row['ratio']:.3f} |"
        )
    cache = report["cache_bytes_per_token"]
    lines.append(
        f"| K/V bytes per token | {cache['base']:,.0f} | {cache['student']:,.0f} "
        f"| {cache['student'] / cache['base']:.3f} |"
    )
    return "\n".join(lines)


def task_table(tasks: dict[str, Any]) -> str:
    lines = [
        "| task | metric | questions | chance | base | SwiftKV | difference | log-probability of the right answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in tasks["rows"]:
        likelihood = "–"
        if row["log_probability_difference"] is not None:
            likelihood = f"{row['log_probability_difference']:+.3f} ± {row['log_probability_standard_error']:.3f}"
        lines.append(
            f"| {row['task']} | {row['metric']} | {row['questions']:,} | {row['chance']:.1%} | {row['base']:.1%} "
            f"| {row['student']:.1%} | {_difference(row)} | {likelihood} |"
        )
    average = tasks["average"]
    if average:
        lines.append(
            f"| **average of {average['tasks']} on which the base is above chance** | | | | {average['base']:.1%} "
            f"| {average['student']:.1%} | {_difference(average)} | |"
        )
    return "\n".join(lines)


def _difference(row: dict[str, Any]) -> str:
    return f"{100 * row['difference']:+.1f} ± {100 * row['standard_error']:.1f} points"


def to_markdown(report: dict[str, Any]) -> str:
    environment = report["environment"]
    parts = [
        f"# {report['checkpoint']} against {report['base']}",
        f"{environment['device']}, {environment['threads']} threads, {environment['dtype']}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}, {environment['date']}.",
        "## Quality\n\nKL(base || SwiftKV) in nats per token at temperature 1; agreement on the most likely next "
        f"token; {'of texts given by --data' if report['own_data'] else 'tokens that no training saw'}.",
        quality_table(report),
        "![KL by source](quality.png)\n\n![KL by position in the document](position.png)",
        "## Speed and memory\n\nThrough `generate`, the models taking turns; medians.",
        speed_table(report),
        "![Time to first token](first_token.png)",
    ]
    if report.get("tasks"):
        parts += [
            "## Tasks\n\nThrough lm-evaluation-harness; differences question by question, ± their standard error.",
            task_table(report["tasks"]),
        ]
    parts.append("## Side by side\n\nGreedy answers to the same prompts.")
    for row in report["generations"]:
        parts.append(f"**{row['prompt']}**\n\n- base: {_quote(row['base'])}\n- SwiftKV: {_quote(row['student'])}")
    return "\n\n".join(parts) + "\n"


def _quote(text: str) -> str:
    return " ".join(text.split())


def _figure(width: float = 6.4, height: float = 3.4) -> Any:
    figure, axes = plotting().subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_quality(report: dict[str, Any], path: Path) -> None:
    figure, axes = _figure()
    names = list(report["sources"])
    values = [report["sources"][name]["kl"] for name in names]
    seen = [report["own_data"] or report["sources"][name]["kind_trained_on"] for name in names]
    labels = [name if known else f"{name}\n(never seen)" for name, known in zip(names, seen, strict=True)]
    bars = axes.bar(labels, values, color=STUDENT_COLOUR, width=0.6)
    axes.bar_label(bars, fmt="%.3f")
    axes.set_ylabel("KL(base || SwiftKV), nats per token")
    axes.set_title("Distance from the base on held-out text")
    save_plot(figure, path)


def plot_by_position(report: dict[str, Any], path: Path) -> None:
    figure, axes = _figure()
    for name, row in report["sources"].items():
        starts = [int(bucket.split("-")[0]) or 1 for bucket in row["by_position"]]
        axes.plot(starts, [quality["kl"] for quality in row["by_position"].values()], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the document (start of the bucket)")
    axes.set_ylabel("KL, nats per token")
    axes.legend(frameon=False)
    save_plot(figure, path)


def plot_first_token(report: dict[str, Any], path: Path) -> None:
    figure, axes = _figure()
    rows = report["time_to_first_token"]
    places = range(len(rows))
    for offset, key, label, colour in (
        (-0.2, "base_seconds", "base", BASE_COLOUR),
        (0.2, "student_seconds", "SwiftKV", STUDENT_COLOUR),
    ):
        bars = axes.bar(
            [place + offset for place in places], [row[key] * 1e3 for row in rows], 0.38, label=label, color=colour
        )
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(list(places), [f"{row['prompt_tokens']} tokens\n(x {row['ratio']:.2f})" for row in rows])
    axes.set_ylabel("time to first token, ms")
    axes.legend(frameon=False)
    save_plot(figure, path)


PLOTS = {"quality.png": plot_quality, "position.png": plot_by_position, "first_token.png": plot_first_token}
