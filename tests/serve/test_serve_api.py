"""Answers, through the real `openai` client, against `model.generate` called directly."""

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serving import MODEL_NAME, WAIT_S, Running, config, running, sse_data, successor_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import swiftkv_models
from swiftkv_train.serve import load_model_and_tokenizer

HELLO: list[Any] = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "sat on the mat 😀"}]
# Every byte of it occurs once, so that a model can say it by heart.
POEM = "x😀 é€b漢g"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()


def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in HELLO) + "<|im_start|>assistant\n"
    return tokenizer.encode(text)


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.fixture(params=["base", "swiftkv"])
def directory(
    request: pytest.FixtureRequest,
    random_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    """A checkpoint of the random model, or of its SwiftKV form with shared K/V."""
    made: Any = random_model
    if request.param == "swiftkv":
        with torch.random.fork_rng():
            torch.manual_seed(2)
            base = LlamaForCausalLM(config(len(tokenizer), num_hidden_layers=4, initializer_range=0.5))
        made = swiftkv_models.rewrite(base, num_key_value_layers=2, key_value_group_size=2)
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_greedy_chat_is_what_generate_gives(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(tokenizer)
    wanted = generated(AutoModelForCausalLM.from_pretrained(directory), ids, 40)
    with running(*load_model_and_tokenizer(directory)) as it:
        answer = it.client().chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=40, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    end = wanted.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in wanted else 40
    assert answer.choices[0].message.content == tokenizer.decode(wanted[:end], skip_special_tokens=True)
    assert counts(answer.usage) == (len(ids), min(end + 1, 40), len(ids) + min(end + 1, 40))
    assert answer.choices[0].finish_reason == ("length" if end == 40 else "stop")
    assert (answer.object, answer.model) == ("chat.completion", MODEL_NAME)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9, "seed": 7}, {"seed": -1}])
def test_streamed_chat_equals_the_whole_one(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": HELLO, "max_completion_tokens": 60, **sampling}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *texts, last, usage = chunks
    assert "".join(c.choices[0].delta.content or "" for c in [*texts, last]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in texts] == [None] * len(texts)
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == []
    assert counts(usage.usage) == counts(whole.usage)


def test_seeds(client: openai.OpenAI) -> None:
    def text(**sampling: Any) -> str | None:
        answer = client.chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=30, **sampling)
        return answer.choices[0].message.content

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text() != text()
    assert text(seed=1, top_p=0) == text(temperature=0)


def test_raw_stream_ends_in_done(server: Running) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=WAIT_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = sse_data(response.iter_lines())
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "role" not in chunks[-1]["choices"][0]["delta"]


def test_completions_of_text_and_of_token_ids(
    client: openai.OpenAI, random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer.encode("the dog")
    wanted = tokenizer.decode(generated(random_model, ids, 20), skip_special_tokens=True)
    for prompt in ("the dog", ids):
        asked: dict[str, Any] = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 20, "temperature": 0}
        answer = client.completions.create(**asked)
        assert answer.choices[0].text == wanted
        assert counts(answer.usage) == (len(ids), 20, len(ids) + 20)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == wanted
        assert chunks[-2].choices[0].finish_reason == "length"
        assert counts(chunks[-1].usage) == counts(answer.usage)


def test_text_parts_and_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "a\nb"}], max_tokens=9, temperature=0
    )
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    neutral: dict[str, Any] = {"n": 1, "logprobs": False, "tools": [], "presence_penalty": 0.0, "logit_bias": {}}
    same = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": parts}],
        max_tokens=9,
        temperature=0,
        user="someone",
        response_format={"type": "text"},
        **neutral,
    )
    assert same.choices[0].message.content == plain.choices[0].message.content
    # An answer can be sent back as it came.
    messages: list[Any] = [{"role": "user", "content": "a"}, plain.choices[0].message, {"role": "user", "content": "b"}]
    assert client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=1).choices


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"}, {}),
        ({"parallel_tool_calls": True, "service_tier": "flex", "max_completion_tokens": -1}, {}),
        ({"min_tokens": 0, "ignore_eos": False, "options": {}, "top_k": -1, "repetition_penalty": 1.0}, {}),
        (
            {},
            {"name": "bob", "reasoning_content": "hm", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
        ),
    ],
)
def test_what_does_not_change_the_answer_is_accepted(
    server: Running, more: dict[str, Any], message: dict[str, Any]
) -> None:
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "temperature": 0}
    plain = server.post(asked).json()
    same = server.post({**asked, "messages": [{"role": "user", "content": "a", **message}], **more})
    assert same.status_code == 200, same.text
    assert same.json()["choices"] == plain["choices"]


def test_developers_are_the_system(server: Running) -> None:
    def said(role: str) -> Any:
        messages = [{"role": role, "content": "the cat"}, {"role": "user", "content": "a"}]
        return server.post({"messages": messages, "max_tokens": 9, "temperature": 0}).json()["choices"]

    assert said("developer") == said("system") != said("user")


@pytest.mark.parametrize("prompt", ["hi", [5, 6]])
def test_a_list_of_one_prompt(server: Running, prompt: Any) -> None:
    asked = {"max_tokens": 9, "temperature": 0}
    plain = server.post({**asked, "prompt": prompt}, "/v1/completions").json()
    assert server.post({**asked, "prompt": [prompt]}, "/v1/completions").json()["choices"] == plain["choices"]


def test_sampling_is_passed_on(server: Running, random_model: LlamaForCausalLM) -> None:
    """Against generate, called with the same; and where only one token is left, every seed is greedy."""
    ids = [5, 6, 7, 5, 6, 7]

    def text(**sampling: Any) -> str:
        answer = server.post({"prompt": ids, "max_tokens": 20, **sampling}, "/v1/completions")
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    greedy = text(temperature=0)
    assert text(seed=1) != greedy
    assert text(seed=1, top_k=1) == greedy
    assert text(seed=1, min_p=1.0) == greedy
    assert text(seed=1, top_k=5) != text(seed=1) == text(seed=1, top_k=0)
    prompt = torch.tensor([ids])
    wanted = random_model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=5.0,
        eos_token_id=server.engine.tokenizer.eos_token_id,
        pad_token_id=0,
    )
    penalised = server.engine.tokenizer.decode(wanted[0, 6:], skip_special_tokens=True)
    assert text(temperature=0, repetition_penalty=5.0) == penalised != greedy


def test_max_tokens_defaults_to_what_is_left(
    tokenizer: PreTrainedTokenizerFast, endless_model: LlamaForCausalLM, server: Running
) -> None:
    with running(endless_model, tokenizer, max_output_tokens=50) as it:
        answer = it.post({"messages": HELLO, "temperature": 0}).json()
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (50, "length")
    ids = [250] * 4090  # of a context of 4096
    answer = server.post({"prompt": ids, "temperature": 0}, "/v1/completions").json()
    usage = {"prompt_tokens": 4090, "completion_tokens": 6, "total_tokens": 4096}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    same = server.post({"prompt": ids, "temperature": 0, "max_tokens": -1}, "/v1/completions").json()
    assert same["choices"][0] == answer["choices"][0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other/model")


def test_many_at_once_are_all_answered(server: Running) -> None:
    def ask(n: int) -> str | None:
        answer = server.client().chat.completions.create(model=MODEL_NAME, messages=HELLO, max_tokens=12, seed=n % 3)
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert answers[:3] == answers[3:6]
    assert len(set(answers)) == 3


@pytest.fixture(scope="module")
def poet(tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    """A model that says POEM and ends: text that is known beforehand."""
    ids = [*tokenizer.encode(POEM), tokenizer.eos_token_id]
    with running(successor_model(tokenizer, ids, start=tokenizer.encode("\n")), tokenizer) as it:
        yield it


def said(poet: Running, **more: Any) -> tuple[list[str], str | None, int]:
    """The pieces of the streamed answer, checked against the whole one; why it ended; its tokens."""
    asked: dict[str, Any] = {"model": MODEL_NAME, "messages": HELLO, "temperature": 0, "max_tokens": 50, **more}
    whole = poet.client().chat.completions.create(**asked)
    chunks = list(poet.client().chat.completions.create(**asked, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None
    return [piece for piece in pieces if piece], whole.choices[0].finish_reason, whole.usage.completion_tokens


def test_emoji_are_never_broken(poet: Running, tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, reason, tokens = said(poet)
    assert (pieces, reason) == (list(POEM), "stop")
    assert tokens == len(tokenizer.encode(POEM)) + 1  # the end token counts


def test_length(poet: Running) -> None:
    assert said(poet, max_tokens=5) == (["x", "😀"], "length", 5)
    assert said(poet, max_tokens=3) == (["x", "\ufffd"], "length", 3)


@pytest.mark.parametrize("stop", ["😀", "é€b", [" é", "never"], "x", "g"])
def test_stop_strings_are_left_out_whole(poet: Running, stop: Any) -> None:
    wanted = POEM.split(stop if isinstance(stop, str) else stop[0])[0]
    pieces, reason, _ = said(poet, stop=stop)
    assert ("".join(pieces), reason) == (wanted, "stop")


def test_stop_string_that_only_begins(poet: Running) -> None:
    assert "".join(said(poet, stop=["é€bz", "g!"])[0]) == POEM


def test_stop_string_that_is_a_special_token(poet: Running, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer.encode("no"), tokenizer.convert_tokens_to_ids("<|im_start|>")]
    with running(successor_model(tokenizer, ids, start=tokenizer.encode("\n")), tokenizer) as it:
        assert said(it, stop="<|im_start|>") == (["n", "o"], "stop", 3)


def test_going_on_behind_the_end(poet: Running, tokenizer: PreTrainedTokenizerFast) -> None:
    """After the end token this model says it again and again, which does not show."""
    count = len(tokenizer.encode(POEM)) + 4
    pieces, reason, tokens = said(poet, max_tokens=count, extra_body={"ignore_eos": True})
    assert ("".join(pieces), reason, tokens) == (POEM, "length", count)
