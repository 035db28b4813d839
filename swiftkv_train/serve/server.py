"""What `swiftkv serve DIRECTORY` runs: load the model, listen, and shut down cleanly."""

import contextlib
import ipaddress
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from swiftkv_train.errors import UserError

DEFAULT_DRAIN_TIMEOUT_S = 30.0


def run_server(
    model_dir: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    max_batch: int = 8,
    max_queue: int = 64,
    max_body_bytes: int | None = None,
    max_output_tokens: int | None = None,
    context_length: int | None = None,
    reuse: bool = True,
    window: int | None = None,
    cors_origins: Sequence[str] = (),
    dtype: str = "auto",
    threads: int | None = None,
    drain_timeout: float = DEFAULT_DRAIN_TIMEOUT_S,
    quiet: bool = False,
) -> None:
    """Serve the checkpoint until SIGINT or SIGTERM, then finish running requests within `drain_timeout` seconds.

    `port` 0 takes a free one; None for a limit means its default. Standard error gets a line about every request,
    unless `quiet`. For `context_length`, `reuse` and `window` see `GenerateEngine`, for `cors_origins` `create_app`.

    Raises:
        UserError: a missing `serve` extra, a directory that is no checkpoint, limits that make no sense, an address
            that cannot be listened on.
    """
    from swiftkv_train.serve.app import (
        DEFAULT_MAX_BODY_BYTES,
        DEFAULT_MAX_OUTPUT_TOKENS,
        check_api_key,
        check_origins,
        create_app,
    )
    from swiftkv_train.serve.draining import DrainingServer

    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}; it must be 1 or more")
    if not 0 <= port <= 65535:
        raise UserError(f"port is {port}; it must be 0 (a free one) to 65535")
    check_api_key(api_key)
    check_origins(cors_origins)
    listener = _listening_socket(host, port)  # before the model loads: a port in use is found out at once
    try:
        import torch

        from swiftkv_models import num_parameters
        from swiftkv_train.serve.engine import THREAD, GenerateEngine, load_model_and_tokenizer
        from swiftkv_train.serve.one_thread import OneThread

        if threads is not None:
            torch.set_num_threads(threads)
        name = served_model_name or Path(model_dir).resolve().name
        name = os.fsencode(name).decode("utf-8", "replace")  # what is not UTF-8 cannot be sent
        print(f"loading {model_dir} ...", flush=True)
        began = time.perf_counter()
        thread = OneThread(THREAD)
        model, tokenizer = thread.call(partial(load_model_and_tokenizer, model_dir, dtype))
        print(
            f"loaded {type(model).__name__}, {num_parameters(model) / 1e6:.1f} M parameters, {model.dtype} "
            f"on {model.device} in {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        engine = GenerateEngine(
            model,
            tokenizer,
            name=name,
            max_batch=max_batch,
            max_queue=max_queue,
            context_length=context_length,
            reuse=reuse,
            window=window,
            thread=thread,
        )
        try:
            app = create_app(
                engine,
                api_key=api_key,
                max_body_bytes=DEFAULT_MAX_BODY_BYTES if max_body_bytes is None else max_body_bytes,
                max_output_tokens=DEFAULT_MAX_OUTPUT_TOKENS if max_output_tokens is None else max_output_tokens,
                cors_origins=cors_origins,
                log=None if quiet else _say,
            )
            address = _address(host, listener.getsockname()[1])
            if api_key is None and not _is_loopback(host):
                _say(f"warning: {address} is open to the network without an API key")
            greeting = _greeting(
                name,
                address,
                keyed=api_key is not None,
                chats=bool(tokenizer.chat_template),
                max_batch=max_batch,
                max_queue=max_queue,
            )
            server = DrainingServer(
                app,
                engine,
                drain_timeout=drain_timeout,
                on_started=lambda: print(greeting, flush=True),
                say=_say,
            )
            server.run(sockets=[listener])
        finally:
            engine.close()
    finally:
        listener.close()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more, or its disk is full: no reason not to serve
        print(text, file=sys.stderr, flush=True)


def _listening_socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # at once, for two sockets that only have the address can have the same
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter: what cannot be a host's name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {_address(host, port)}: {reason}; give another host or port") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greeting(name: str, address: str, *, keyed: bool, chats: bool, max_batch: int, max_queue: int) -> str:
    key = "-H 'Authorization: Bearer KEY' " if keyed else ""
    route = "/v1/chat/completions" if chats else "/v1/completions"
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello"}
    body = shlex.quote(json.dumps({"model": name, **asked, "max_tokens": 64}, ensure_ascii=False))
    return (
        f"serving {name} at {address}/v1, up to {max_batch} requests at once, {max_queue} may wait (Ctrl-C drains and "
        "stops)\n"
        f"try: curl {address}{route} -H 'Content-Type: application/json' {key}-d {body}"
    )
