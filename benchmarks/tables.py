"""Put the measured figures of this folder into the project's README: python benchmarks/tables.py [--check]"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def where(result: dict[str, Any]) -> str:
    facts = result["environment"]
    return (
        f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, {facts['date']}"
    )


def quickstart() -> str:
    from swiftkv_train.evaluate.report import quality_table, speed_table

    report = load("quickstart.json")
    source = f"`benchmarks/quickstart.json`: {where(report)}."
    return "\n\n".join([quality_table(report), speed_table(report), source])


def targets() -> str:
    init, step, prefill = load("init.json"), load("step.json"), load("prefill.json")
    lines = ["| measured side by side | ours | theirs | ratio | file |", "|---|---|---|---|---|"]
    for name, row in init["sources"].items():
        lines.append(
            f"| held-out KL before training, calibrated / copied start, {name} | {row['calibrated']['kl']:.3f} "
            f"| {row['copied']['kl']:.3f} | {row['kl_ratio']:.2f} | `init.json` |"
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
    return "\n".join([*lines, "", f"{where(step)}."])


TABLES: dict[str, Callable[[], str]] = {"quickstart": quickstart, "targets": targets}


def filled(readme: str) -> str:
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"README.md has no markers for {name}")
        readme = f"{before}{begin}\n{table()}\n{end}{after}"
    return readme


def main() -> None:
    readme = README.read_text(encoding="utf-8")
    wanted = filled(readme)
    if "--check" in sys.argv[1:]:
        if readme != wanted:
            raise SystemExit("README.md does not show the figures of benchmarks/; run python benchmarks/tables.py")
        return
    README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
