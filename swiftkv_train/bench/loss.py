"""`swiftkv bench loss`: `distillation_kl` against the other ways to the same loss and gradient of contenders.py."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from swiftkv_kernels.distillation_kl import distillation_kl_reference
from swiftkv_train.bench import whole_numbers
from swiftkv_train.bench.contenders import CONTENDERS, OURS, STUDENTS, TEMPERATURE, Setting, gradient, liger_version
from swiftkv_train.bench.memory import peak_in_own_process, peak_memory
from swiftkv_train.bench.process import answer
from swiftkv_train.errors import RunError, UserError
from swiftkv_train.loading import one_line
from swiftkv_train.machine import environment, synchronize
from swiftkv_train.progress import Reporter

MODULE = "swiftkv_train.bench.loss"
DTYPES = ("bfloat16", "float16", "float32")
TIMED = "far"  # the student that time and memory are measured with
ACCURACY_ROWS, EXACT_ROWS = 128, 32  # rows whose gradient is compared, and of them in fp64 at a time


def measure(vocabulary: str, hidden_size: str, rows: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds (medians, taking turns in one process), peak bytes (each in its own process), error of the gradient."""
    sizes = _numbers("--vocabulary", vocabulary, 2)
    widths = _numbers("--hidden-size", hidden_size, 1)
    counts = _numbers("--rows", rows, 1)
    if len(widths) not in (1, len(sizes)):
        raise UserError(f"--hidden-size {hidden_size}: give one for all, or one for each of --vocabulary {vocabulary}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    shapes = list(zip(sizes, widths * (len(sizes) // len(widths)), strict=True))
    found: list[dict[str, Any]] = []
    accuracy: list[dict[str, Any]] = []
    with Reporter().bar("bench", len(shapes) * (len(STUDENTS) + len(counts)), "settings") as advance:
        for shape in shapes:
            race = Race()
            for student in STUDENTS:
                accuracy.append(_accuracy(Setting(*shape, ACCURACY_ROWS, dtype), student, race))
                advance(1)
            for count in counts:
                found.append(_cost(Setting(*shape, count, dtype), repeats, Race(race.failed)))
                advance(1)
    return {
        "benchmark": "distillation loss and its gradient against other implementations",
        "command": f"swiftkv bench loss --vocabulary {vocabulary} --hidden-size {hidden_size} --rows {rows} "
        f"--dtype {dtype} --repeats {repeats}",
        "environment": {**_environment(dtype), "liger_kernel": liger_version()},
        "temperature": TEMPERATURE,
        "rows": found,
        "accuracy": accuracy,
        "summary": [*(line for row in found for line in _cost_lines(row)), *map(_accuracy_line, accuracy)],
    }


class Race:
    """Runs contenders and remembers why one cannot run, which ours must."""

    def __init__(self, failed: dict[str, str] | None = None):
        self.failed = dict(failed or {})
        if liger_version() is None:
            reason = "not installed: pip install --no-deps liger-kernel, beside triton"
            self.failed |= {name: reason for name in CONTENDERS if name.startswith("liger")}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, or None where it fails or `name` has failed before."""
        if name in self.failed:
            return None
        try:
            return work()
        except Exception as error:  # whatever a library raises on a device, version or size that is not for it
            if name == OURS:
                raise
            kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
            self.failed[name] = kind + one_line(error)
        gc.collect()  # what the traceback held
        return None


def _accuracy(setting: Setting, student: str, race: Race) -> dict[str, Any]:
    """|g - g64| / |g64| of every contender's gradient g."""
    torch.compiler.reset()  # each setting is compiled for its own shape
    tensors = setting.tensors(student)
    exact, kl = _exact(*tensors)
    errors = {}
    for name in CONTENDERS:
        found = race.run(name, lambda name=name: gradient(name, *tensors))  # type: ignore[misc]
        if found is not None:
            errors[name] = float((found.double() - exact).norm() / exact.norm())
    return {
        "vocabulary": setting.vocabulary,
        "hidden_size": setting.hidden_size,
        "rows": setting.rows,
        "student": student,
        "kl": kl,
        "gradient_error": errors,
        "failed": dict(race.failed),
    }


def _exact(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, float]:
    """The gradient in fp64, and the mean KL at T = 1."""
    head, gradients, kl = head.double(), [], 0.0
    for near, far in zip(student.double().split(EXACT_ROWS), teacher.double().split(EXACT_ROWS), strict=True):
        leaf = near.requires_grad_()
        loss = distillation_kl_reference(leaf, far, head, temperature=TEMPERATURE) / len(student)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        kl += float(distillation_kl_reference(near.detach(), far, head)) / len(student)
    return torch.cat(gradients), kl


def _cost(setting: Setting, repeats: int, race: Race) -> dict[str, Any]:
    """Peaks first: a contender that is too large for the machine is then found in a process of its own."""
    contenders: dict[str, dict[str, Any]] = {name: {"all_seconds": []} for name in CONTENDERS}
    for name, cell in contenders.items():
        arguments = [*astuple(setting), name]
        cell["peak_bytes"] = race.run(name, lambda: peak_in_own_process(MODULE, arguments, name))  # noqa: B023
    torch.compiler.reset()
    tensors = setting.tensors(TIMED)
    for turn in range(repeats + 1):
        for name, cell in contenders.items():
            elapsed = race.run(name, lambda: _seconds(name, tensors))  # noqa: B023
            if turn:  # the first of each meets cold memory, and compiles
                cell["all_seconds"].append(elapsed)
    ours = contenders[OURS]
    for name, cell in contenders.items():
        if name in race.failed:
            contenders[name] = {"failed": race.failed[name]}
            continue
        cell["seconds"] = statistics.median(cell["all_seconds"])
        if name != OURS:
            cell["seconds_ratio"] = ours["seconds"] / cell["seconds"]
            cell["peak_ratio"] = ours["peak_bytes"] / max(cell["peak_bytes"], 1)
    return {
        "vocabulary": setting.vocabulary,
        "hidden_size": setting.hidden_size,
        "rows": setting.rows,
        "contenders": contenders,
    }


def _seconds(name: str, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    synchronize(tensors[0].device)
    started = time.perf_counter()
    gradient(name, *tensors)
    synchronize(tensors[0].device)
    return time.perf_counter() - started


def _peak() -> int:
    vocabulary, hidden_size, rows, dtype, name = sys.argv[1:]
    tensors = Setting(int(vocabulary), int(hidden_size), int(rows), dtype).tensors(TIMED)
    gradient(name, *tensors)  # compiles, loads libraries
    with peak_memory(tensors[0].device) as peak:
        gradient(name, *tensors)
    return peak.bytes


def _cost_lines(row: dict[str, Any]) -> list[str]:
    what = f"{row['rows']:,} rows of {row['vocabulary']:,} tokens, ours against "
    ours, lines = row["contenders"][OURS], []
    for name, cell in row["contenders"].items():
        if "failed" in cell:
            lines.append(f"{what}{name}: not measured, {cell['failed']}")
        elif name != OURS:
            lines.append(
                f"{what}{name}: {ours['seconds']:.3f} s against {cell['seconds']:.3f} s: "
                f"x {cell['seconds_ratio']:.2f}; peak {ours['peak_bytes'] / 2**20:,.0f} MiB against "
                f"{cell['peak_bytes'] / 2**20:,.0f} MiB: x {cell['peak_ratio']:.2f}"
            )
    return lines


def _accuracy_line(row: dict[str, Any]) -> str:
    errors = ", ".join(f"{name} {error:.2%}" for name, error in row["gradient_error"].items())
    return f"{row['vocabulary']:,} tokens, {row['student']} student (KL {row['kl']:.1e}), error of gradient: {errors}"


def _numbers(option: str, text: str, least: int) -> list[int]:
    numbers = whole_numbers(option, text, "512,2048")
    if min(numbers) < least:
        raise UserError(f"{option} {text!r}: every number must be at least {least}")
    return numbers


def _environment(dtype: str) -> dict[str, Any]:

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return environment(torch.empty(0, dtype=getattr(torch, dtype), device=device))


if __name__ == "__main__":
    answer(_peak)
