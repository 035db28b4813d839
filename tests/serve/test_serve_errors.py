"""What is refused, and in which words."""

import copy
import json
from typing import Any

import httpx
import openai
import pytest
from serving import WAIT_S, Running, running
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from swiftkv_train.errors import UserError
from swiftkv_train.serve import create_app

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"prompt": "hi", "max_tokens": 2}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("prompt_logprobs", 1),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("modalities", ["audio"]),
        ("store", True),
        ("min_tokens", 5),
        ("options", {"num_ctx": 5}),
    ],
)
def test_unsupported_chat_parameters_are_refused_by_name(server: Running, name: str, value: Any) -> None:
    error = error_of(server.post({**CHAT, name: value}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


@pytest.mark.parametrize(
    ("name", "value"), [("echo", True), ("logprobs", 0), ("best_of", 2), ("suffix", "x"), ("n", 3)]
)
def test_unsupported_completion_parameters_are_refused_by_name(server: Running, name: str, value: Any) -> None:
    error = error_of(server.post({**TEXT, name: value}, "/v1/completions"), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": 3001}, "max_tokens"),  # the server's own limit
        ({"max_completion_tokens": 3}, "max_tokens"),  # they contradict each other
        ({"max_tokens": -2}, "max_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"seed": 2**64}, "seed"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "messages"),  # template
    ],
)
def test_wrong_values_name_the_parameter(server: Running, change: dict[str, Any], param: str) -> None:
    error = error_of(server.post({**CHAT, **change}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", ["", [], [1, "a"], [0, 10_000], [-1], [True], ["a", "b"], [""], [[]], [[1], [2]], 5, None]
)
def test_wrong_prompts(server: Running, prompt: Any) -> None:
    assert error_of(server.post({"prompt": prompt}, "/v1/completions"), 400)["param"] == "prompt"


def test_the_template_says_why(server: Running) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
    assert "system message must come first" in error_of(server.post({"messages": messages}), 400)["message"]


def test_no_braces_of_a_format_reach_the_client(server: Running) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": 5}]}]
    error = error_of(server.post({**CHAT, "messages": messages}), 400)
    assert error["message"] == "Parameter 'messages[0].content': a text part needs a 'text' that is a string"


def test_missing_parameters(server: Running) -> None:
    assert error_of(server.post({}), 400)["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("change", "param", "near"),
    [
        ({"temprature": 1}, "temprature", "temperature"),
        ({"n_predict": 5}, "n_predict", "max_tokens"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "repetition_penalty"),
        ({"mirostat": 1}, "mirostat", None),
        ({"messages": [{"role": "user", "content": "x", "id": 1}]}, "messages[0].id", None),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages[0].nam", "name"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "include_usage"),
    ],
)
def test_unknown_parameters_and_the_nearest_of_their_place(
    server: Running, change: dict[str, Any], param: str, near: str | None
) -> None:
    error = error_of(server.post({**CHAT, **change}), 400)
    assert (error["code"], error["param"]) == ("unknown_parameter", param)
    assert error["message"] == f"Unknown parameter '{param}'" + (f"; did you mean '{near}'?" if near else "")


def test_too_long_for_the_context_names_both_numbers(server: Running) -> None:
    error = error_of(server.post({"prompt": [5] * 4000, "max_tokens": 97}, "/v1/completions"), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "4096" in error["message"]
    assert "4097" in error["message"]
    error = error_of(server.post({"prompt": [5] * 4096}, "/v1/completions"), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 90_000, b"[]", b"null"])
def test_bodies_that_are_no_json_object(server: Running, body: bytes) -> None:
    for route in ("/v1/completions", "/v1/chat/completions"):
        headers = {"content-type": "application/json"}
        error_of(httpx.post(server.url + route, content=body, headers=headers, timeout=WAIT_S), 400)


def test_other_content_types_are_refused(server: Running) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"}
    )
    error_of(response, 415)


def test_large_bodies(server: Running) -> None:
    assert error_of(server.post({"prompt": "x" * 100_001}, "/v1/completions"), 413)["code"] == "body_too_large"

    def chunks() -> Any:  # sent without a Content-Length
        yield b'{"prompt": "'
        for _ in range(11):
            yield b"x" * 10_000
        yield b'"}'

    headers = {"content-type": "application/json"}
    error_of(httpx.post(f"{server.url}/v1/completions", content=chunks(), headers=headers, timeout=WAIT_S), 413)


def test_unknown_routes_methods_and_models(server: Running) -> None:
    assert error_of(httpx.get(f"{server.url}/v2/nothing"), 404)["code"] == "route_not_found"
    response = httpx.get(f"{server.url}/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(server.post({**CHAT, "model": "gpt"}), 404)["code"] == "model_not_found"
    for path, near in (
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/models", "/v1/models"),
    ):
        assert f"did you mean {near}?" in error_of(httpx.post(server.url + path), 404)["message"]
    assert "did you mean" not in error_of(httpx.get(f"{server.url}/v1/responses"), 404)["message"]
    for page in ("/docs", "/openapi.json"):
        error_of(httpx.get(server.url + page), 404)


def test_the_client_library_understands_the_errors(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="tiny", prompt="x", n=2)
    assert (caught.value.param, caught.value.code) == ("n", "unsupported_parameter")


def test_key_is_required_where_work_is_done(random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with running(random_model, tokenizer, api_key="s3cret-ü") as it:
        for given in (None, "Bearer wrong", "Bearer", "Basic s3cret-ü", "Bearer s3cret-ü2", "s3cret-ü"):
            headers = {} if given is None else {"authorization": given.encode()}
            for response in (
                it.post(CHAT, headers=headers),
                it.post(TEXT, "/v1/completions", headers=headers),
                httpx.get(f"{it.url}/v1/models", headers=headers),
                httpx.get(f"{it.url}/v1/models/tiny", headers=headers),
                httpx.get(f"{it.url}/metrics", headers=headers),
            ):
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert it.engine.stats().prompt_tokens == 0
        assert httpx.get(f"{it.url}/health").json() == {"status": "ok"}
        assert it.post(CHAT, headers={"authorization": "Bearer s3cret-ü".encode()}).status_code == 200
    with running(random_model, tokenizer, api_key="s3cret") as it:
        with pytest.raises(openai.AuthenticationError):
            it.client("wrong").models.list()
        assert it.client("s3cret").chat.completions.create(model="tiny", **CHAT).choices  # type: ignore[call-overload]


@pytest.mark.parametrize("key", ["s3cret", "s3cret-ü", "caf\udce9"], ids=["ascii", "utf-8", "latin-1"])
def test_keys_are_compared_as_bytes(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, key: str
) -> None:
    right = key.encode("utf-8", "surrogateescape")
    with running(random_model, tokenizer, api_key=key) as it:
        for given in (b"Bearer \xff\xfe", b"Bearer " + right + b"\xe9", b"\xff " + right, "Bearer ü".encode()):
            error_of(httpx.get(f"{it.url}/v1/models", headers={"authorization": given}), 401)
        assert httpx.get(f"{it.url}/v1/models", headers={"authorization": b"bearer " + right}).status_code == 200


@pytest.mark.parametrize(("template", "reason"), [("{{ 1 + 'a' }}", "operand"), ("{{ '' }}", "makes nothing of them")])
def test_a_template_that_fails_is_not_the_servers_failure(
    random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, template: str, reason: str
) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    with running(random_model, broken) as it:
        error = error_of(it.post(CHAT), 400)
        assert error["param"] == "messages"
        assert reason in error["message"]


def test_failures_do_not_leak(
    random_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(random_model, tokenizer) as it:

        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("secret path")

        monkeypatch.setattr(random_model, "forward", broken)
        error = error_of(it.post(CHAT), 500)
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "secret" not in str(error)
        with pytest.raises(openai.APIError, match="failed while generating"):
            list(it.client().chat.completions.create(model="tiny", stream=True, **CHAT))  # type: ignore[call-overload]
        assert "secret path" in caplog.text
        assert it.engine.stats().failed == 2

        # Outside the engine.
        monkeypatch.setattr(it.engine, "submit", broken)
        error = error_of(it.post(CHAT), 500)
        assert "secret" not in str(error)

        monkeypatch.undo()
        assert it.post(CHAT).status_code == 200  # it goes on


def test_senseless_limits(server: Running) -> None:
    for wrong in (
        {"api_key": ""},
        {"api_key": " "},
        {"api_key": "a b"},
        {"api_key": "a\n"},
        {"max_body_bytes": 0},
        {"max_output_tokens": 0},
        {"cors_origins": ["localhost:3000"]},
        {"cors_origins": ["http://localhost:3000/"]},
    ):
        with pytest.raises(UserError):
            create_app(server.engine, **wrong)  # type: ignore[arg-type]
