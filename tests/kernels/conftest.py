"""Where the operations' tests run: one set of tests for the CPU path, the interpreted kernel and the GPU's paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Place(NamedTuple):
    device: str
    backend: str


PLACES = {
    "cpu": Place("cpu", "cpu"),
    "interpreted": Place("cpu", "triton"),
    "cuda-triton": Place("cuda", "triton"),
    "cuda-torch": Place("cuda", "torch"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `place` on each path; on the interpreted one only in the child process made for it."""
    if "place" in metafunc.fixturenames:
        gpu = [pytest.param(PLACES[name], id=name, marks=pytest.mark.gpu) for name in ("cuda-triton", "cuda-torch")]
        name = "interpreted" if INTERPRETING else "cpu"
        here = pytest.param(PLACES[name], id=name)
        metafunc.parametrize("place", [here] if INTERPRETING else [here, *gpu])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small calls: where other processes hold the cores, threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def run_interpreted() -> Callable[[str], int]:
    """Runs the `interpreted` tests of a file under TRITON_INTERPRET=1; returns how many passed.

    In a child process: triton reads the variable when it is first imported, which an earlier test may have done.
    """

    def run(path: str) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", "-p", "no:cacheprovider", path]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
        passed = re.search(r"(\d+) passed", child.stdout)
        return int(passed[1]) if passed else 0

    return run
