"""Requests that are cut short: clients that leave, a full queue, a server that drains; and the process itself."""

import asyncio
import concurrent.futures
import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import WAIT_S, Running, running, sse_data, wait_until
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from swiftkv_train.errors import UserError
from swiftkv_train.serve import GenerateEngine, GenerationRequest, run_server
from swiftkv_train.serve.contract import EngineStoppingError, QueueFullError
from swiftkv_train.serve.one_thread import OneThread
from swiftkv_train.serve.server import _listening_socket

MESSAGES = [{"role": "user", "content": "hi"}]
ENDLESS = {"messages": MESSAGES, "max_tokens": 90_000, "temperature": 0}
SHORT = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0}


@contextlib.contextmanager
def streaming(url: str, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=WAIT_S) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert "role" in next(lines)
        yield lines


def wait_for(it: Running, running: int, waiting: int) -> None:
    wait_until(lambda: (it.engine.stats().running, it.engine.stats().waiting) == (running, waiting))


@pytest.fixture
def endless(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    with running(endless_model, tokenizer, max_batch=1, max_queue=2, max_output_tokens=90_000) as it:
        yield it


def test_leaving_a_stream_aborts_it(endless: Running) -> None:
    with streaming(endless.url, ENDLESS) as lines:
        for _ in range(20):
            next(lines)
        assert endless.engine.stats().running == 1
    wait_until(lambda: endless.engine.stats().running == 0)
    stats = endless.engine.stats()
    assert (stats.cancelled, stats.finished, stats.failed) == (1, 0, 0)
    assert 0 < stats.generated_tokens < 90_000
    assert endless.post(SHORT).status_code == 200
    lines = httpx.get(f"{endless.url}/metrics").text.splitlines()
    assert {"swiftkv_requests_finished_total 1", "swiftkv_requests_cancelled_total 1"} <= set(lines)
    assert {"# TYPE swiftkv_requests_running gauge", "swiftkv_requests_running 0"} <= set(lines)
    assert f"swiftkv_generated_tokens_total {endless.engine.stats().generated_tokens}" in lines


def test_leaving_a_whole_answer_aborts_it(endless: Running) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endless.url}/v1/chat/completions", json=ENDLESS, timeout=0.5)
    wait_until(lambda: endless.engine.stats().cancelled == 1)
    assert endless.engine.stats().running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_the_queue_gives_the_place_back(endless: Running, stream: bool) -> None:
    with streaming(endless.url, ENDLESS):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{endless.url}/v1/chat/completions", json={**SHORT, "stream": stream}, timeout=0.3
            ).raise_for_status()
        wait_until(lambda: endless.engine.stats().cancelled == 1)
        assert (endless.engine.stats().running, endless.engine.stats().waiting) == (1, 0)


def test_full_queue_is_429_and_those_that_wait_are_answered(endless: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with streaming(endless.url, ENDLESS):
            waiting = [pool.submit(endless.post, SHORT) for _ in range(2)]
            wait_for(endless, running=1, waiting=2)
            for stream in (False, True):
                refused = endless.post({**SHORT, "stream": stream})
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["code"] == "queue_full"
        assert [future.result(WAIT_S).status_code for future in waiting] == [200, 200]


def test_drain_answers_503_and_lets_the_admitted_finish(
    endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with (
        running(endless_model, tokenizer, max_batch=1, drain_timeout=60, max_output_tokens=90_000) as endless,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        streaming(endless.url, {**ENDLESS, "max_tokens": 1500}) as lines,
    ):
        queued = pool.submit(endless.post, SHORT)
        wait_for(endless, running=1, waiting=1)
        endless.server.drain()
        wait_until(lambda: not endless.engine.accepting)
        for refused in (endless.post(SHORT), httpx.get(f"{endless.url}/health")):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
        rest = sse_data(lines)
        assert rest[-1] == "[DONE]"
        assert len(rest) == 1500 + 1  # a's, the last one with the finish reason
        assert queued.result(WAIT_S).json()["usage"]["completion_tokens"] == 3
        endless.thread.join(WAIT_S)
        assert not endless.thread.is_alive()


def test_drain_is_bounded(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with (
        running(endless_model, tokenizer, max_batch=1, drain_timeout=0.5, max_output_tokens=90_000) as it,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        streaming(it.url, ENDLESS) as lines,
    ):
        queued = pool.submit(it.post, SHORT)
        wait_for(it, running=1, waiting=1)
        began = time.monotonic()
        it.server.drain()
        rest = sse_data(lines)
        assert "shutting_down" in rest[-2]
        assert rest[-1] == "[DONE]"
        assert queued.result(WAIT_S).status_code == 503
        it.thread.join(WAIT_S)
        assert time.monotonic() - began < WAIT_S  # its 90,000 tokens would take longer


def test_second_signal_ends_at_once(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with (
        running(endless_model, tokenizer, drain_timeout=60, max_output_tokens=90_000) as it,
        streaming(it.url, ENDLESS) as lines,
    ):
        wait_for(it, running=1, waiting=0)
        it.server.handle_exit(signal.SIGINT, None)
        wait_until(lambda: not it.engine.accepting)
        assert it.engine.stats().running == 1
        it.server.handle_exit(signal.SIGINT, None)
        assert sse_data(lines)[-1] == "[DONE]"
        it.thread.join(WAIT_S)
        assert not it.thread.is_alive()


def test_engine_alone(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = GenerateEngine(endless_model, tokenizer, max_batch=1, max_queue=0)
    prompt = tokenizer.encode("\n")

    async def use() -> None:
        events = [event async for event in engine.submit(GenerationRequest(prompt, 3, temperature=0))]
        assert [(e.token_id, e.text, e.finish_reason) for e in events] == [
            (tokenizer.encode("a")[0], "a", None),
            (tokenizer.encode("a")[0], "a", None),
            (tokenizer.encode("a")[0], "a", "length"),
        ]
        assert await asyncio.to_thread(engine.wait_idle, WAIT_S)
        stream = engine.submit(GenerationRequest(prompt, 90_000, temperature=0))
        with pytest.raises(QueueFullError):
            engine.submit(GenerationRequest(prompt, 1))
        await stream.__anext__()
        await stream.aclose()
        await stream.aclose()
        assert await asyncio.to_thread(engine.wait_idle, WAIT_S)
        stream = engine.submit(GenerationRequest(prompt, 90_000, temperature=0))
        await stream.__anext__()
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineStoppingError):
            _ = [event async for event in stream]
        with pytest.raises(EngineStoppingError):
            engine.submit(GenerationRequest(prompt, 1))

    asyncio.run(asyncio.wait_for(use(), 2 * WAIT_S))
    stats = engine.stats()
    assert (stats.finished, stats.cancelled, stats.failed, stats.prompt_tokens) == (1, 2, 0, 3)
    assert not engine.accepting
    for wrong in ({"max_queue": -1}, {"max_batch": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            GenerateEngine(endless_model, tokenizer, **wrong)


@pytest.fixture(scope="module")
def checkpoint(
    endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "parrot"
    endless_model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_process_from_start_to_sigterm(checkpoint: Path, endless_model: LlamaForCausalLM) -> None:
    code = "import sys; from swiftkv_train.serve import run_server; run_server(sys.argv[1], port=0, threads=1)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    watchdog = threading.Timer(3 * WAIT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        printed = ""
        while "curl" not in printed:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            printed += line
        millions = f"{endless_model.num_parameters() / 1e6:.1f}"
        assert f"loaded LlamaForCausalLM, {millions} M parameters, torch.float32 on cpu" in printed
        url = re.search(
            r"serving parrot at (http://127\.0\.0\.1:\d+)/v1, up to 8 requests at once, 64 may wait", printed
        )
        assert url is not None
        # The example is one that works.
        example = re.search(r"curl (\S+) -H '(.+?): (.+?)' -d '(.+)'", printed)
        assert example is not None
        answer = httpx.post(example[1], content=example[4], headers={example[2]: example[3]}, timeout=WAIT_S).json()
        assert answer["choices"][0]["message"]["content"] == "a" * 64
        with streaming(url[1], {**ENDLESS, "max_tokens": 1000}) as lines:
            next(lines), next(lines)  # it runs
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url[1]}/health").status_code == 503)
            rest = sse_data(lines)
        assert rest[-1] == "[DONE]"
        assert len(rest) == 1000  # one was read before
        out, err = process.communicate(timeout=WAIT_S)
        assert (process.returncode, out) == (0, "")
        said = [line for line in err.splitlines() if line and not line.startswith("Loading weights")]
        assert [re.sub(r"\d+\.\d", "X", line) for line in said if " /health " not in line] == [
            "POST /v1/chat/completions 200: 23 prompt tokens, 64 new in X s (the first after X s), X tokens/s",
            "stopping: up to 30 s for 1 running and 0 waiting requests; another Ctrl-C ends them",
            "POST /v1/chat/completions 200: 20 prompt tokens (6 reused), 1000 new in X s (the first after X s), "
            "X tokens/s",
        ]
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(WAIT_S)


def test_wrong_arguments_are_found_before_loading(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use"):
        run_server(tmp_path / "missing", port=taken.getsockname()[1])
    # A server that is still loading has its address already.
    first = _listening_socket("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, pytest.raises(UserError, match=f"cannot listen on http://127.0.0.1:{port}: .*in use"):
        run_server(tmp_path / "missing", port=port)
    for wrong, words in (
        ({"port": 70_000}, "port is 70000"),
        ({"host": "no.such.host.invalid"}, "cannot listen"),
        ({"host": "a" * 70}, "cannot listen on http://aaa.*label too long"),
        ({"host": "\udcff"}, "cannot listen on .*give another host"),
        ({"api_key": ""}, "API key is empty"),
        ({"api_key": "a b"}, "API key holds white space"),
        ({"threads": 0}, "threads"),
        ({"cors_origins": ["localhost"]}, "origin 'localhost' is none"),
    ):
        with pytest.raises(UserError, match=words):
            run_server(tmp_path / "missing", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such directory"):
        run_server(tmp_path / "missing", port=0)


def test_the_thread_that_loads_the_model_runs_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftkv_train.serve.draining import DrainingServer

    engine_module = importlib.import_module("swiftkv_train.serve.engine")
    app = importlib.import_module("swiftkv_train.serve.app")
    load, threads = engine_module.load_model_and_tokenizer, []

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        model, tokenizer = load(*arguments)
        model.register_forward_pre_hook(lambda *_: threads.append(threading.current_thread()))
        return model, tokenizer

    def ask(engine: GenerateEngine, **_: Any) -> None:
        async def read() -> None:
            async for _ in engine.submit(GenerationRequest([5, 6, 7], 2, temperature=0)):
                pass

        asyncio.run(asyncio.wait_for(read(), WAIT_S))

    monkeypatch.setattr(engine_module, "load_model_and_tokenizer", watched)
    monkeypatch.setattr(app, "create_app", ask)
    monkeypatch.setattr(DrainingServer, "run", lambda self, sockets: None)
    run_server(checkpoint, port=0, quiet=True)
    assert len(threads) >= 3
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        OneThread("t").call(lambda: 1 / 0)


@pytest.mark.parametrize("quiet", [False, True])
def test_options_reach_the_engine_and_the_routes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    from swiftkv_train.serve.draining import DrainingServer

    app = importlib.import_module("swiftkv_train.serve.app")  # as it is now: another test imports the package anew
    given: dict[str, Any] = {}

    def watched(engine: GenerateEngine, **options: Any) -> Any:
        given.update(options, context_length=engine.info.context_length, kept=engine._kept._max_tokens)
        return None

    monkeypatch.setattr(app, "create_app", watched)
    monkeypatch.setattr(DrainingServer, "run", lambda self, sockets: None)
    limits = {"context_length": 50, "max_output_tokens": 7, "cors_origins": ["http://a"]}
    run_server(checkpoint, port=0, reuse=False, quiet=quiet, **limits)  # type: ignore[arg-type]
    assert given.items() >= {**limits, "kept": 0}.items()
    with monkeypatch.context() as patched:
        patched.setattr(app, "create_app", lambda engine, **_: given.update(streams=type(engine._kept).__name__))
        run_server(checkpoint, port=0, window=8, quiet=True)
    assert given["streams"] == "KeptStreams"
    if quiet:
        assert given["log"] is None
    else:
        given["log"]("a line")
        assert capsys.readouterr().err.endswith("a line\n")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", open(os.devnull))  # noqa: SIM115  (not for writing)
            given["log"]("another")  # which nobody can read


def test_open_to_the_network_without_a_key_warns(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from swiftkv_train.serve.draining import DrainingServer

    monkeypatch.setattr(DrainingServer, "run", lambda self, sockets: None)
    for host, key, warned in (("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("127.0.0.1", None, False)):
        run_server(checkpoint, host=host, port=0, api_key=key)
        assert ("without an API key" in capsys.readouterr().err) == warned
