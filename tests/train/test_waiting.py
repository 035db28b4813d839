"""How OpenMP's waiting threads wait, which is settled before torch is loaded."""

import os
import subprocess
import sys

import pytest

SAY = "import os, sys, swiftkv_train; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "2"}, "PASSIVE"),
        ({"WORLD_SIZE": "2", "OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
    ],
)
def test_threads_sleep_where_a_launcher_started_several_processes(given, policy):
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "WORLD_SIZE")}
    result = subprocess.run([sys.executable, "-c", SAY], env={**kept, **given}, capture_output=True, text=True)
    assert result.stdout.split() == [str(policy), "False"], result.stderr
