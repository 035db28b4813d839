"""Serve a checkpoint over the OpenAI API: `run_server(directory)`, or `create_app(engine)` to embed it.

Read in this order: `contract.py` (what an engine is), `engine.py` (the one there is), `jobs.py` (a request on its way
through it), `../kept_caches.py` (K/V for later requests), `text.py` (tokens to text that is safe to send), `schemas.py`
and `bodies.py` (what a client may ask), `prompts.py` (request to token ids), `replies.py` (what a client gets),
`request_log.py` (what the terminal gets), `app.py` (routes), `server.py` (the process).
Names load on first use, so that importing this package costs neither torch nor fastapi.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swiftkv_train.serve.app import create_app
    from swiftkv_train.serve.contract import Engine, EngineStats, GenerationRequest, ModelInfo, TokenEvent
    from swiftkv_train.serve.engine import GenerateEngine, load_model_and_tokenizer
    from swiftkv_train.serve.server import run_server

_MODULE_OF = {
    "create_app": "app",
    "Engine": "contract",
    "EngineStats": "contract",
    "GenerateEngine": "engine",
    "GenerationRequest": "contract",
    "ModelInfo": "contract",
    "TokenEvent": "contract",
    "load_model_and_tokenizer": "engine",
    "run_server": "server",
}

__all__ = [
    "Engine",
    "EngineStats",
    "GenerateEngine",
    "GenerationRequest",
    "ModelInfo",
    "TokenEvent",
    "create_app",
    "load_model_and_tokenizer",
    "run_server",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
