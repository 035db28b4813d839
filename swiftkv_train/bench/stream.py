"""`swiftkv bench stream`: a token of an endless stream, time and memory, against the ways of baselines.py."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import psutil
import torch

from swiftkv_models.rope import use_exact_positions
from swiftkv_models.shared_prefix import num_cached_layers
from swiftkv_train.bench.baselines import Dense, Ours, OursGraphed, Recompute, Stream
from swiftkv_train.bench.rerotate import ReRotate, ReRotatePublished
from swiftkv_train.bench.turns import (
    OURS,
    Cell,
    compare,
    comparison,
    in_turns,
    numbers_from,
    reason,
    seconds_of,
    target,
    target_lines,
)
from swiftkv_train.errors import UserError
from swiftkv_train.loading import Model, load_for_inference
from swiftkv_train.machine import environment, synchronize
from swiftkv_train.progress import Reporter

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts bytes, else tells of each start

STREAMS: dict[str, type[Stream]] = {
    way.name: way for way in (Ours, ReRotate, ReRotatePublished, Dense, Recompute, OursGraphed)
}
TARGETS = {
    Recompute.name: 22.0,
    ReRotate.name: 1.46,
    ReRotatePublished.name: 1.46,
}  # times as fast as these at TARGET_WINDOWS
TARGET_WINDOWS = (1024, 4096)
LENGTHS = 4  # of the stream at which a token is timed: tokens, and half of that, ...
POINTS = 100  # of a long run
STEPS = 8  # tokens one by one, before the chunks of every point
FIRST_POINTS = 10  # of them, in which the window and the allocator's pools fill: left out of its trend


@torch.no_grad()
def measure(
    path: str, windows: str, sinks: int, tokens: int, contenders: str | None, repeats: int, chunk: int, long: int
) -> dict[str, Any]:
    """Seconds of a token (medians, taking turns) and bytes held and allocated in its step, at lengths up to `tokens`.

    `long`: over so many tokens, of ours with the first window, also seconds and the memory of the process.
    """
    sizes = numbers_from("--windows", windows, 1, "256,1024")
    names = _contenders(contenders)
    if sinks < 0:
        raise UserError(f"--sinks must be at least 0, not {sinks}")
    for option, length, largest in (("--tokens", tokens, sizes[-1]), ("--long", long, sizes[0])):
        if (length or option == "--tokens") and length <= sinks + largest:
            raise UserError(
                f"{option} {length} must be more than the {sinks + largest} of sinks and window: only then is it full"
            )
    least = (FIRST_POINTS + 2) * (chunk + STEPS)
    if long and long < least:
        raise UserError(
            f"--long {long} must be at least {least}: a trend takes points, of {chunk} + {STEPS} tokens each"
        )
    model = load_for_inference(path)
    rows, attention = [], []
    with Reporter().bar("stream", len(sizes) * LENGTHS, "lengths") as advance:
        for window in sizes:
            streams = {name: STREAMS[name](model, window=window, attention_sinks=sinks) for name in names}
            failed: dict[str, str] = {}
            lengths = [length for length in _lengths(tokens) if length > sinks + window]
            for length in lengths:
                rows.append(_row(streams, failed, length, length == lengths[-1], repeats, chunk))
                advance(1)
            advance(LENGTHS - len(lengths))
            attention.append(_attention(streams, repeats))
            del streams
            gc.collect()
    endless = _long(model, sizes[0], sinks, long, chunk) if long else None
    targets = _targets(rows, {row["window"]: row["contenders"][OURS]["seconds"] for row in attention})
    return {
        "benchmark": "a token of an endless stream",
        "command": f"swiftkv bench stream {path} --windows {windows} --sinks {sinks} --tokens {tokens} "
        f"--contenders {','.join(names)} --repeats {repeats} --chunk {chunk} --long {long}",
        "environment": environment(model),
        "model_type": model.config.model_type,
        "rows": rows,
        "attention": attention,
        "long": endless,
        "targets": targets,
        "summary": [
            *map(_line, rows),
            *(f"window {row['window']:,}, attention alone: {comparison(row['contenders'])}" for row in attention),
            *([_long_line(endless)] if endless else []),
            *target_lines(targets),
            *(f"{row['what']}: x {row['bound']:.2f} if its attention took no time" for row in targets if row["bound"]),
        ],
    }


def _contenders(text: str | None) -> list[str]:
    names = list(STREAMS) if text is None else [OURS, *(name for name in text.split(",") if name != OURS)]
    for name in names:
        if name not in STREAMS:
            raise UserError(f"--contenders {text!r}: {name!r} is not known; use {', '.join(STREAMS)}")
    return [name for name in names if name != OursGraphed.name or torch.cuda.is_available()]


def _lengths(tokens: int) -> list[int]:
    return [tokens >> halvings for halvings in reversed(range(LENGTHS))]


def _row(
    streams: dict[str, Stream], failed: dict[str, str], length: int, last: bool, repeats: int, chunk: int
) -> dict[str, Any]:
    """All of them at one length; recompute, whose cost does not know it, at the last one only."""
    ours = streams[OURS]
    device = ours.model.device
    token = torch.randint(0, ours.model.config.vocab_size, (1, 1), device=device)
    racing = {}
    for name, stream in streams.items():
        if name in failed or (name == Recompute.name and not last):
            continue
        try:
            stream.reach(length, chunk)
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = reason(error)
            continue
        racing[name] = stream
    cells = in_turns({name: partial(stream.feed, token) for name, stream in racing.items()}, repeats, device)
    for name, cell in cells.items():
        if "failed" in cell:
            failed[name] = cell["failed"]
            continue
        stream = racing[name]
        cell["held_bytes"] = stream.held_bytes
        cell["peak_bytes"] = stream.peak_bytes(token)
    cells |= {name: {"failed": why} for name, why in failed.items()}
    compare(cells)
    return {"window": ours.window, "sinks": ours.sinks, "tokens": length, "contenders": cells}


def _attention(streams: dict[str, Stream], repeats: int) -> dict[str, Any]:
    """Of ours and re-rotate, one token's attention in all layers that have K/V of their own."""
    ours = streams[OURS]
    config, model = ours.model.config, ours.model
    query, states = (
        torch.randn(1, heads, 1, config.head_dim, dtype=model.dtype, device=model.device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    works = {
        name: partial(way.attend, query, states)
        for name, way in streams.items()
        if name in (OURS, ReRotate.name) and isinstance(way, (Ours, ReRotate))
    }
    cells = in_turns(works, repeats, model.device)
    compare(cells)
    return {"window": ours.window, "layers": num_cached_layers(model.config), "contenders": cells}


def _long(model: Model, window: int, sinks: int, tokens: int, chunk: int) -> dict[str, Any]:
    """Ours alone, fed chunks from the first token to the last; now and then a token by itself, in turns with one of a
    stream whose window has just filled, which meets the same machine."""
    use_exact_positions(model)
    stream, young = (Ours(model, window=window, attention_sinks=sinks) for _ in range(2))
    young.fill(sinks + window)
    ids = torch.randint(0, model.config.vocab_size, (1, chunk), device=model.device)
    synchronize(model.device)
    points: list[dict[str, float]] = []
    fed, started = 0, time.perf_counter()

    def feed(size: int) -> float:
        nonlocal fed
        fed += size
        advance(size)
        return seconds_of(lambda: stream.feed(ids[:, :size]), model.device) / size

    with Reporter().bar("long", tokens, "tokens") as advance:
        while fed < tokens:
            turns = [(feed(1), seconds_of(lambda: young.feed(ids[:, :1]), model.device)) for _ in range(STEPS)]
            one_by_one, of_young = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
            in_chunks = [feed(chunk)]
            while fed * POINTS < tokens * (len(points) + 1):
                in_chunks.append(feed(chunk))
            points.append(
                {
                    "tokens": fed,
                    "seconds_per_token": statistics.median(in_chunks),
                    "seconds_of_one": one_by_one,
                    "seconds_of_young": of_young,
                    "resident_bytes": _resident_bytes(model.device),
                }
            )
    full = points[FIRST_POINTS:]
    ratios = [point["seconds_of_one"] / point["seconds_of_young"] for point in full]
    return {
        "window": window,
        "sinks": sinks,
        "tokens": tokens,
        "chunk": chunk,
        "total_seconds": time.perf_counter() - started,
        "held_bytes": stream.held_bytes,
        "points": points,
        "seconds_per_token": statistics.median(point["seconds_per_token"] for point in full),
        "seconds_of_one": statistics.median(point["seconds_of_one"] for point in full),
        **_trend("seconds", [point["seconds_per_token"] for point in full]),
        **_trend("seconds_of_one", [point["seconds_of_one"] for point in full]),
        "over_young": statistics.median(ratios),
        **_trend("over_young", ratios),
        **_trend("memory", [point["resident_bytes"] for point in full]),
        "memory_growth_bytes": full[-1]["resident_bytes"] - full[0]["resident_bytes"],
    }


def _resident_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _trend(name: str, values: Sequence[float]) -> dict[str, float]:
    """Over the run, relative to the median: change by the median slope of all pairs of points (Theil-Sen: a machine
    that runs at another clock for a while does not tilt it), largest distance of one."""
    middle = statistics.median(values)
    pairs = combinations(enumerate(values), 2)
    slope = statistics.median((later - earlier) / (j - i) for (i, earlier), (j, later) in pairs)
    return {
        f"{name}_slope": slope * (len(values) - 1) / middle,
        f"{name}_deviation": max(abs(value - middle) for value in values) / middle,
    }


def _targets(rows: Sequence[Cell], attention: Mapping[int, float]) -> list[Cell]:
    """The least advantage at any length, and its `bound`: what that would be if our attention, of so many seconds by
    window, took no time. Reading the weights is all that is left then, and no way of streaming spares it."""
    found = []
    for window in sorted({row["window"] for row in rows} & set(TARGET_WINDOWS)):
        for name, wanted in TARGETS.items():
            cells = [row["contenders"] for row in rows if row["window"] == window]
            if not any(name in cell for cell in cells):
                continue
            timed = [(cell[name], cell[OURS]) for cell in cells if "speedup" in cell.get(name, {})]
            least = bound = None
            if timed:
                theirs, ours = min(timed, key=lambda pair: pair[0]["speedup"])
                least, rest = theirs["speedup"], ours["seconds"] - attention[window]
                bound = theirs["seconds"] / rest if rest > 0 else None
            found.append({**target(f"ours over {name}, window {window:,}", wanted, least), "bound": bound})
    return found


def _line(row: dict[str, Any]) -> str:
    cells = row["contenders"]
    peaks = "; ".join(
        f"{name} {cell['peak_bytes'] / 2**20:,.1f}" for name, cell in cells.items() if "peak_bytes" in cell
    )
    return f"window {row['window']:,} at {row['tokens']:,} tokens: {comparison(cells)}; MiB: {peaks}"


def _long_line(long: dict[str, Any]) -> str:
    return (
        f"window {long['window']:,} over {long['tokens']:,} tokens, {long['chunk']} at a time: "
        f"{long['seconds_per_token'] * 1e3:.3g} ms a token, {long['seconds_slope']:+.1%} over the run (one point up to "
        f"{long['seconds_deviation']:.1%} off), {long['seconds_of_one'] * 1e3:.3g} ms by itself, "
        f"{long['seconds_of_one_slope']:+.1%}, {long['over_young']:.3f} times a young stream's, "
        f"{long['over_young_slope']:+.1%}; resident memory {long['memory_growth_bytes'] / 2**20:+,.1f} MiB "
        f"({long['memory_slope']:+.2%}), cache {long['held_bytes'] / 2**20:,.1f} MiB"
    )
