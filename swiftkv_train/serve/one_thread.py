"""A thread that loads a model and then runs it.

OpenMP keeps a team of threads for every thread that computes. Once there are more of them than processors, all sleep
between operations instead of waiting awake, and on two cores a generated token takes 1.7 times as long. So a model is
loaded, which computes too, by the thread that will generate.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class OneThread:
    """Calls what it is given, in turn, and ends after what it was given last. It does not keep the process alive."""

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any] | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Any:
        """What it returns, or raises."""
        found: Future[Any] = Future()
        self._calls.put((function, found))
        return found.result()

    def finish_with(self, function: Callable[[], Any]) -> None:
        """The last one; not waited for. What it raises is reported as of any thread."""
        self._calls.put((function, None))

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            function, found = self._calls.get()
            if found is None:
                function()
                return
            try:
                found.set_result(function())
            except BaseException as error:
                found.set_exception(error)
