"""Ending a run when asked to, within seconds and with nothing half done; every process leaves at the same point."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stopped(BaseException):
    """SIGINT or SIGTERM came and what was going on is left. No Exception, so that no library takes it for its own."""


class Stop:
    """What SIGINT and SIGTERM ask for.

    Until `defer` is called there is nothing to save, and the first of them raises Stopped wherever the program is.
    Afterwards it is only noted, and `check` raises Stopped. A second SIGINT interrupts at once in any case.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deferred = False

    @property
    def status(self) -> int:
        """The exit status of a run that was stopped: 130 for Ctrl-C, 0 for SIGTERM, which means to go on later."""
        return 130 if self.signal == signal.SIGINT else 0

    @contextmanager
    def watching(self) -> Iterator[Stop]:
        def note(number: int, _frame: Any) -> None:
            again, self.signal = self.signal is not None, self.signal or number
            if again and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not again and not self._deferred:
                raise Stopped

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def defer(self) -> None:
        """From here on leave only where `check` is called."""
        self._deferred = True

    def check(self, accelerator: Accelerator) -> None:
        """Raises Stopped on every process when any was asked to stop. All call it at the same points."""
        asked = self.signal or 0
        if accelerator.num_processes > 1:
            import torch

            asked = int(accelerator.gather(torch.tensor([asked], device=accelerator.device)).max())
        if asked:
            self.signal = asked
            raise Stopped
