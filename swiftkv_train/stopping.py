"""Ending a run when asked to, within seconds and with nothing half done; every process leaves at the same point."""

from __future__ import annotations

import os
import signal
import sys
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
        self._at_once = False  # whether a signal has raised Stopped in this process, wherever the others are

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
                self._at_once = True
                raise Stopped

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def not_alone(self) -> Iterator[None]:
        """Around a run: of several processes, one that a signal takes out of it by itself ends here.

        The others wait for it where it does not come any more, so it must not wait for them. It ends as a process that
        the signal has killed: at a status of 0 the launcher would not end the others.
        """
        try:
            yield
        finally:
            if self.signal and self._at_once and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(128 + self.signal)

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
