"""Peak memory of a piece of work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from swiftkv_train.bench.process import in_own_process

# Every tensor a mapping of its own, given back when it dies: resident memory is then what is alive.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


@dataclass
class Peak:
    bytes: int = 0  # above what was in use when it began


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Fills in the result when it ends. CUDA: the allocator's own peak. CPU: resident memory, sampled every 2 ms.

    On CPU only a process's first run of the work is right, unless it has ALLOCATOR: later ones find its freed pages
    still resident.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, process.memory_info().rss)
            time.sleep(0.002)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        peak.bytes = highest - before


def peak_in_own_process(module: str, arguments: Sequence[str | int], what: str) -> int:
    """Bytes that `python -m module arguments` answers, which it has from `peak_memory`. Raises RunError, UserError."""
    return in_own_process(module, arguments, f"the peak of {what}", ALLOCATOR)


def most_allocated(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of torch's allocator that `work` holds at a time, above what was held when it began.

    Exact, and of tensors alone: libraries' own buffers are not seen. On CPU as torch's profiler saw them come and go.
    """
    if device.type == "cuda":
        with peak_memory(device) as peak:
            work()
        return peak.bytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = most = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
        now += change
        most = max(most, now)
    return most
