"""Kernels are made on first use, whichever thread that is in."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from swiftkv_kernels.backends import made_once


def test_threads_that_ask_at_once_get_one():
    barrier, made = threading.Barrier(4), []

    @made_once
    def make():
        """It."""
        time.sleep(0.05)  # as an import takes
        made.append(object())
        return made[-1]

    def ask(_):
        barrier.wait()
        return make()

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ask, range(4))) == {made[0]}
    assert len(made) == 1
    assert make.__doc__ == "It."
