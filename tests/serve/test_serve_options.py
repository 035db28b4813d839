"""What the one who starts a server decides: limits, who may use it from a web page, what it says about requests."""

import asyncio
import json
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from serving import WAIT_S, running, wait_until
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import swiftkv_train.serve
from swiftkv_train.cli import main
from swiftkv_train.errors import UserError
from swiftkv_train.serve import GenerateEngine, app, bodies, create_app
from swiftkv_train.serve.draining import DrainingServer
from swiftkv_train.serve.server import _greeting

TEXT = {"prompt": "hi", "max_tokens": 3, "temperature": 0}


def test_a_shorter_context(random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with running(random_model, tokenizer, context_length=40) as it:
        assert httpx.get(f"{it.url}/v1/models").json()["data"][0]["max_model_len"] == 40
        assert it.post({"prompt": [250] * 37, "max_tokens": 3}, "/v1/completions").status_code == 200
        refused = it.post({"prompt": [250] * 38, "max_tokens": 3}, "/v1/completions").json()["error"]
        assert (refused["code"], "41 are needed" in refused["message"]) == ("context_length_exceeded", True)
        # What is kept is bounded by it too.
        it.post({"prompt": [251] * 37, "max_tokens": 3}, "/v1/completions")
        again = it.post({"prompt": [250] * 37, "max_tokens": 3}, "/v1/completions").json()
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    for wrong in (0, 4097):
        with pytest.raises(UserError, match=f"context_length is {wrong}; this model allows 1 to 4096"):
            GenerateEngine(random_model, tokenizer, context_length=wrong)


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(swiftkv_train.serve, "run_server", lambda directory, **options: given.update(options))
    command = "serve m --context-length 50 --max-output-tokens 7 --window 9 --no-reuse --quiet"
    origins = ["http://a:1", "https://b"]
    monkeypatch.setattr(sys, "argv", ["swiftkv", *command.split(), *(f"--cors-origin={origin}" for origin in origins)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    options = {"context_length": 50, "max_output_tokens": 7, "window": 9, "reuse": False, "quiet": True}
    options["cors_origins"] = origins
    assert given.items() >= options.items()


def test_web_pages_of_a_given_origin(random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    mine, other = "http://localhost:3000", "http://evil.example"
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with running(random_model, tokenizer, cors_origins=[mine], api_key="k") as it:
        url = f"{it.url}/v1/completions"
        preflight = httpx.options(url, headers={"origin": mine, **ask})  # which carries no key
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == mine
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert httpx.options(url, headers={"origin": other, **ask}).status_code == 400
        for key, status in (("k", 200), ("wrong", 401)):
            answer = it.post(TEXT, "/v1/completions", headers={"origin": mine, "authorization": f"Bearer {key}"})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, mine)
        assert "access-control-allow-origin" not in it.post(TEXT, "/v1/completions", headers={"origin": other}).headers
    with running(random_model, tokenizer) as it:
        refused = httpx.options(f"{it.url}/v1/completions", headers={"origin": mine, **ask})
        assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
        assert "access-control-allow-origin" not in refused.headers


def test_a_line_about_every_request(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with running(random_model, tokenizer, log=lines.append) as it:

        def line() -> str:
            """The one that the last request got."""
            wait_until(lambda: lines)
            assert len(lines) == 1
            return re.sub(r"\d+\.\d", "X", lines.pop())

        it.post(TEXT, "/v1/completions")
        whole = "POST /v1/completions 200: 2 prompt tokens, 3 new in X s (the first after X s), X tokens/s"
        assert line() == whole
        it.post({**TEXT, "stream": True}, "/v1/completions")
        assert line() == whole.replace("tokens,", "tokens (1 reused),")
        it.post({**TEXT, "max_tokens": 1}, "/v1/completions")
        assert line().endswith("(1 reused), 1 new in X s (the first after X s)")
        it.post({**TEXT, "n": 2}, "/v1/completions")
        assert line() == "POST /v1/completions 400: unsupported_parameter"
        httpx.get(f"{it.url}/a%0Ab%1b[31m" + "x" * 200)
        assert re.fullmatch(r"GET /a%0Ab%1B%5B31mx+ 404: route_not_found", refused := line())
        assert len(refused) < 150
        httpx.get(f"{it.url}/v1/models")
        assert line() == "GET /v1/models 200: in X s"
        for path in ("/health", "/metrics"):
            assert httpx.get(it.url + path).status_code == 200

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError

        with monkeypatch.context() as patched:
            patched.setattr(random_model, "forward", broken)
            it.post({**TEXT, "stream": True}, "/v1/completions")
            assert line() == "POST /v1/completions 200: 2 prompt tokens, 0 new in X s; internal_error"
            patched.setattr(it.engine, "submit", broken)
            it.post(TEXT, "/v1/completions")
            assert line() == "POST /v1/completions 500: internal_error"
    assert lines == []


def test_the_line_about_a_client_that_left(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lines: list[str] = []
    body = {"prompt": "\n", "max_tokens": 90_000, "temperature": 0}
    with running(endless_model, tokenizer, log=lines.append, max_output_tokens=90_000) as it:
        url = f"{it.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=WAIT_S) as response:
            next(response.iter_lines())
        wait_until(lambda: len(lines) == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.5)
        wait_until(lambda: len(lines) == 2)
    for line, status in zip(lines, (200, 499), strict=True):
        assert re.fullmatch(rf"POST /v1/completions {status}: 1 prompt tokens.*; the client left", line)


def ask_directly(application: Any, body: bytes, then: str, send: Callable[[Any], Awaitable[None]]) -> Any:
    """One request without a server: a first part of its body, then a message of another type. Returns its scope."""
    messages = [{"type": "http.request", "body": body, "more_body": then == "http.disconnect"}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        if then == "nothing":
            await asyncio.Event().wait()
        return {"type": then}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    asyncio.run(asyncio.wait_for(application(scope, receive, send), WAIT_S))
    return scope


def test_a_client_that_does_not_read_is_left(
    endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "SEND_TIMEOUT_S", 0.3)
    engine = GenerateEngine(endless_model, tokenizer)
    lines: list[str] = []
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 4:
            await asyncio.Event().wait()

    body = json.dumps({"prompt": "\n", "max_tokens": 4000, "temperature": 0, "stream": True}).encode()
    ask_directly(create_app(engine, log=lines.append), body, "nothing", send)
    assert len(sent) == 4
    assert engine.wait_idle(WAIT_S)
    assert engine.stats().cancelled == 1
    engine.close()
    assert lines[0].endswith("; send_timeout")


def test_a_body_that_does_not_arrive(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.2)
    with running(random_model, tokenizer) as it:
        host, port = it.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99"
            client.sendall(head.encode() + b'\r\n\r\n{"prompt"')
            answer = b""
            while piece := client.recv(4096):  # until the server closes the connection
                answer += piece
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        assert b'"request_timeout"' in answer


def test_a_client_that_leaves_within_its_body(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = GenerateEngine(random_model, tokenizer)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    ask_directly(create_app(engine), b"{", "http.disconnect", send)
    engine.close()
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["message"] == "The body is incomplete"


def test_prompts_that_wait_to_be_tokenized_are_bounded(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_UNTOKENIZED", 1)
    begun, go_on, statuses = threading.Semaphore(0), threading.Event(), []

    def slow(*_: Any) -> list[int]:
        begun.release()
        go_on.wait(WAIT_S)
        return [5]

    monkeypatch.setattr(app, "completion_token_ids", slow)
    with running(random_model, tokenizer) as it:

        def ask() -> None:
            statuses.append(it.post(TEXT, "/v1/completions").status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert begun.acquire(timeout=WAIT_S)
        wait_until(lambda: statuses == [429, 429])  # one is being tokenized, one waits
        go_on.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert statuses == [429, 429, 200, 200]


def test_connections_are_bounded(random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = GenerateEngine(random_model, tokenizer)
    assert DrainingServer(create_app(engine), engine, drain_timeout=1).config.limit_concurrency == 512
    engine.close()


def test_signals_are_told(endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    for ask in (False, True):
        with running(endless_model, tokenizer, max_output_tokens=90_000, drain_timeout=0.5, say=said.append) as it:
            if ask:
                body = {"prompt": "\n", "max_tokens": 90_000, "stream": True}
                with httpx.stream("POST", f"{it.url}/v1/completions", json=body, timeout=WAIT_S):
                    wait_until(lambda: it.engine.stats().running)
                    it.server.drain()
                    wait_until(lambda: len(said) == 2)
            else:
                it.server.drain()
                wait_until(lambda: said)
    assert said == ["stopping", "stopping: up to 0.5 s for 1 running and 0 waiting requests; another Ctrl-C ends them"]


def test_the_greeting_names_the_model_and_a_route_it_has() -> None:
    text = _greeting("o'hara", "http://h:1", keyed=True, chats=False, max_batch=3, max_queue=5)
    assert "up to 3 requests at once, 5 may wait" in text
    assert "curl http://h:1/v1/completions -H 'Content-Type: application/json' -H 'Authorization: Bearer KEY'" in text
    assert """-d '{"model": "o'"'"'hara", "prompt": "Hello", "max_tokens": 64}'""" in text
