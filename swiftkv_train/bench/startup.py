"""`swiftkv bench startup`: what a run does to its data before the first step, without and with its token cache.

Every start is a process of its own; timed is what `swiftkv distill` does between its tokenizer and its first batch. A
cold start has an empty cache, a warm one the cache that a cold one left. What a start read is seen from outside: source
files that Python opened, documents of the cache entries that are new, bytes that the system says the process read.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from swiftkv_train.bench.process import answer, in_own_process
from swiftkv_train.data import load_held_out, load_training_data
from swiftkv_train.data.sources import resolve_files
from swiftkv_train.loading import load_config, load_tokenizer, pad_token_id
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import as_override, load_recipe

FIGURES = ("source_files_opened", "documents_tokenised", "tokens_made", "bytes_read")


def measure(recipe: str, overrides: list[str] | None, repeats: int) -> dict[str, Any]:
    """Medians of `repeats` cold starts, each with a cache directory of its own, and of a warm start after each."""
    files = source_files(load_recipe(recipe, overrides))
    starts: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as scratch, Reporter().bar("startup", 2 * repeats, "starts") as advance:
        for turn in range(repeats):
            for found in starts.values():
                arguments = [recipe, *(overrides or []), as_override("data.cache_dir", f"{scratch}/{turn}")]
                found.append(in_own_process("swiftkv_train.bench.startup", arguments, "a start"))
                advance(1)
    rows = [
        {
            "start": name,
            "seconds": statistics.median(start["seconds"] for start in found),
            "all_seconds": [start["seconds"] for start in found],
            # The most that any of them did.
            **{figure: max((s[figure] for s in found if s[figure] is not None), default=None) for figure in FIGURES},
        }
        for name, found in starts.items()
    ]
    cold, warm = rows
    ratio = warm["seconds"] / cold["seconds"]
    return {
        "benchmark": "start-up with and without token cache",
        "command": " ".join(["swiftkv bench startup", recipe, *(overrides or []), f"--repeats {repeats}"]),
        "environment": _environment(),
        "source_files": len(files),
        "source_bytes": sum(os.path.getsize(file) for file in files),
        "rows": rows,
        "seconds_ratio": ratio,
        "summary": [*map(_line, rows), f"warm / cold  x {ratio:.3f}"],
    }


def source_files(recipe: Recipe) -> list[str]:
    """Absolute paths of the text that a recipe names. Raises UserError when there is none where it says."""
    data = recipe.data
    sources = [*data.train, *data.held_out, *data.test]
    return sorted({os.path.abspath(file) for source in sources for file in resolve_files(source)})


def _line(row: dict[str, Any]) -> str:
    read = "" if row["bytes_read"] is None else f", {row['bytes_read'] / 2**20:,.1f} MiB read"
    return (
        f"{row['start']}  {row['seconds']:8.3f} s  {row['source_files_opened']} source files opened, "
        f"{row['documents_tokenised']:,} documents tokenised{read}"
    )


def _environment() -> dict[str, Any]:
    import torch

    from swiftkv_train.machine import environment

    facts = environment(torch.empty(0))
    del facts["dtype"]  # there are only tokens
    return facts


def _start() -> dict[str, Any]:
    """One start, in this process. It loads what a run has loaded before its data."""
    import torch  # noqa: F401

    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    base, data = recipe.model, recipe.data
    vocab_size = load_config(base.base, revision=base.revision, families=("llama",)).vocab_size
    tokenizer = load_tokenizer(base.base, revision=base.revision)
    pad = pad_token_id(tokenizer)
    cache = Path(data.cache_dir)
    cached = set(cache.glob("*/meta.json"))
    opened = _watch_openings(set(source_files(recipe)))
    before, started = _bytes_read(), time.perf_counter()
    training = load_training_data(data, tokenizer, vocab_size, pad, base=base)
    load_held_out(data, tokenizer, vocab_size, base=base)
    training.batch(0, recipe.training.batch_size)
    seconds, after = time.perf_counter() - started, _bytes_read()
    files_opened = len(opened)
    made = [json.loads(meta.read_text(encoding="utf-8")) for meta in set(cache.glob("*/meta.json")) - cached]
    return {
        "seconds": seconds,
        "source_files_opened": files_opened,
        "documents_tokenised": sum(entry["num_documents"] for entry in made),
        "tokens_made": sum(entry["num_tokens"] for entry in made),
        "bytes_read": None if before is None or after is None else after - before,
    }


def _watch_openings(files: set[str]) -> set[str]:
    """Those of `files` (absolute paths) that this process opens from now on, as it opens them."""
    opened: set[str] = set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path in files:
                opened.add(path)

    sys.addaudithook(watch)
    return opened


def _bytes_read() -> int | None:
    """Bytes this process has read, whether from disk or memory; None where the system does not say."""
    try:
        return psutil.Process().io_counters().read_chars
    except (AttributeError, psutil.Error, OSError):
        return None


if __name__ == "__main__":
    answer(_start)
