"""Where tests of the operations, and of what calls them, run: the CPU path, the interpreted kernel, the GPU's paths.

A conftest that imports `pytest_generate_tests` and `run_interpreted` gives them to the tests beside it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

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


def pytest_generate_tests(metafunc):
    """Runs a test that asks for `place` on each path; on the interpreted one only in the child process made for it."""
    if "place" in metafunc.fixturenames:
        gpu = [pytest.param(PLACES[name], id=name, marks=pytest.mark.gpu) for name in ("cuda-triton", "cuda-torch")]
        name = "interpreted" if INTERPRETING else "cpu"
        here = pytest.param(PLACES[name], id=name)
        metafunc.parametrize("place", [here] if INTERPRETING else [here, *gpu])


@pytest.fixture
def run_interpreted() -> Callable[[str], int]:
    """Runs the `interpreted` tests of a file under TRITON_INTERPRET=1; returns how many passed.

    In a child process: triton reads the variable when it is first imported, which an earlier test may have done.
    """

    def run(path: str) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", "-p", "no:cacheprovider", path]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("SHARD", None)
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
        passed = re.search(r"(\d+) passed", child.stdout)
        return int(passed[1]) if passed else 0

    return run
