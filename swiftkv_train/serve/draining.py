"""A uvicorn server that drains before it exits, and says so while it does."""

import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from swiftkv_train.errors import UserError
from swiftkv_train.serve.contract import Engine

try:
    import uvicorn
except ImportError as missing:
    raise UserError(f"serving needs {missing.name}: pip install 'swiftkv-train[serve]'") from missing

CLOSE_TIMEOUT_S = 5  # for answers that are complete to be sent
MAX_CONNECTIONS = 512  # more are answered 503; the system lets a process have 1,024 files and connections


class DrainingServer(uvicorn.Server):
    """On the first signal the engine takes no new requests, while /health and refusals still answer (503); when the
    admitted ones are done, or after `drain_timeout` seconds, the server closes. A second signal ends them: their
    answers at once, the work at the next token or piece of a prompt. `say` gets told what is waited for.
    """

    def __init__(
        self,
        app: Any,
        engine: Engine,
        *,
        drain_timeout: float,
        on_started: Callable[[], None] | None = None,
        say: Callable[[str], None] | None = None,
    ):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._on_started = on_started
        self._say = say or (lambda text: None)
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal; does not note it down, so that a drained server ends with success."""
        if self._draining:
            threading.Thread(target=self._close, name="swiftkv-close", daemon=True).start()
        else:
            self.drain()

    def drain(self) -> None:
        """Begin to shut down and return. In a thread: a signal may have interrupted who holds the engine's lock."""
        self._draining = True
        threading.Thread(target=self._drain, name="swiftkv-drain", daemon=True).start()

    def _drain(self) -> None:
        self._engine.begin_drain()
        self._say(self._waited_for())
        self._engine.wait_idle(self._drain_timeout)
        self._close()

    def _close(self) -> None:
        self._engine.close(timeout=0)  # answers what is left with 503; a prefill may still be running
        self.should_exit = True

    def _waited_for(self) -> str:
        stats = self._engine.stats()
        if not stats.running + stats.waiting:
            return "stopping"
        return (
            f"stopping: up to {self._drain_timeout:g} s for {stats.running} running and {stats.waiting} waiting "
            "requests; another Ctrl-C ends them"
        )
