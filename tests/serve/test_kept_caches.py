"""K/V that is kept between requests: the answers of a model that never saw it, fewer tokens run, bounded memory."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from serving import WAIT_S, ask_at_once, random_llama, running
from transformers import PreTrainedTokenizerFast

import swiftkv_models
from swiftkv_models import SharedPrefix
from swiftkv_models.growing_cache import GrowingCache
from swiftkv_models.shared_prefix import beginning_of_chat
from swiftkv_train.errors import UserError
from swiftkv_train.kept_caches import KeptCaches, KeptPrefixes, generate
from swiftkv_train.serve import GenerateEngine, GenerationRequest, TokenEvent
from swiftkv_train.serve import engine as engine_module
from swiftkv_train.serve.prompts import chat_prompt
from swiftkv_train.serve.schemas import ChatCompletionRequest

FIRST = list(range(10, 50))


@pytest.fixture(scope="module", params=["base", "swiftkv"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    return random_llama(request.param, tokenizer, seed=3)


@pytest.fixture
def run(model: Any) -> Iterator[list[int]]:
    """How many tokens went through layer 0, call by call."""
    counts: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: counts.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    yield counts
    hook.remove()


@pytest.fixture
def engine(model: Any, tokenizer: PreTrainedTokenizerFast) -> Iterator[GenerateEngine]:
    made = GenerateEngine(model, tokenizer)
    yield made
    made.close()


def answer(engine: GenerateEngine, prompt: list[int], count: int = 8, **more: Any) -> list[TokenEvent]:
    return ask_at_once(engine, [GenerationRequest(prompt, count, **{"temperature": 0, **more})])[0]


def expected(model: Any, prompt: list[int], events: list[TokenEvent]) -> None:
    """What plain generate says to the prompt, without any K/V from before."""
    ids = torch.tensor([prompt])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(events), do_sample=False)
    assert [event.token_id for event in events] == plain[0, len(prompt) :].tolist()


def test_a_second_turn_runs_its_new_tokens_only(engine: GenerateEngine, model: Any, run: list[int]) -> None:
    first = answer(engine, FIRST)
    assert run == [40] + [1] * (len(first) - 1)
    assert {event.cached_tokens for event in first} == {0}
    # The last token of an answer has not run yet.
    prompt = [*FIRST, *(event.token_id for event in first), 100, 101, 102]
    run.clear()
    second = answer(engine, prompt)
    assert run == [4] + [1] * (len(second) - 1)
    assert {event.cached_tokens for event in second} == {len(prompt) - 4}
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (40 + len(prompt), len(prompt) - 4)
    expected(model, FIRST, first)
    expected(model, prompt, second)


def test_prompts_that_part_ways_and_come_back(engine: GenerateEngine, model: Any, run: list[int]) -> None:
    """Two conversations in turn begin alike; each finds its own K/V again, and the same prompt runs its last token."""
    one, other = [*FIRST, 200, 201], [*FIRST, 210, 211, 212]
    for turn, cached in enumerate([(0, 40), (None, None)]):
        for which, prompt in enumerate((one, other)):
            run.clear()
            events = answer(engine, prompt)
            reused = cached[which] if cached[which] is not None else len(prompt) - 9
            assert (events[0].cached_tokens, run[0]) == (reused, len(prompt) - reused), (turn, which)
            expected(model, prompt, events)
            prompt += [*(event.token_id for event in events), *([5] * 8)]
    run.clear()
    again = answer(engine, FIRST)
    assert (run[0], again[0].cached_tokens) == (1, 39)
    expected(model, FIRST, again)


def test_without_reuse_all_runs_again(model: Any, tokenizer: PreTrainedTokenizerFast, run: list[int]) -> None:
    engine = GenerateEngine(model, tokenizer, reuse=False)
    for _ in range(2):
        run.clear()
        assert answer(engine, FIRST)[0].cached_tokens == 0
        assert run[0] == 40
    engine.close()


def test_a_failure_leaves_nothing_behind(
    engine: GenerateEngine, model: Any, run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(engine, FIRST)
    attention = model.model.layers[1].self_attn

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(attention, "forward", fail)  # when layer 0 has its K/V already
        with pytest.raises(Exception):  # noqa: B017, PT011  (the engine's, which says nothing)
            answer(engine, [*FIRST, 60, 61])
    assert engine.wait_idle(WAIT_S)
    run.clear()
    events = answer(engine, [*FIRST, 60, 61])
    assert (run[0], events[0].cached_tokens) == (42, 0)
    expected(model, [*FIRST, 60, 61], events)


def test_what_was_cancelled_stays_right(engine: GenerateEngine, model: Any, run: list[int]) -> None:
    async def leave_early() -> None:
        stream = engine.submit(GenerationRequest(FIRST, 2000, temperature=0))
        for _ in range(3):
            await stream.__anext__()
        await stream.aclose()

    asyncio.run(leave_early())
    assert engine.wait_idle(WAIT_S)
    run.clear()
    events = answer(engine, [*FIRST, 60])
    assert run[0] == 1
    expected(model, [*FIRST, 60], events)


def test_long_prompts_run_in_pieces_and_stop_between_them(
    engine: GenerateEngine, model: Any, run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PIECE", 16)
    events = answer(engine, FIRST)
    assert run[:3] == [16, 16, 8]
    expected(model, FIRST, events)

    async def leave_at_once() -> None:
        stream = engine.submit(GenerationRequest([9, *FIRST], 2000, temperature=0))
        hook = model.model.layers[0].register_forward_hook(lambda *_: engine._cancel(stream._job))  # type: ignore[attr-defined]
        await asyncio.to_thread(engine.wait_idle, WAIT_S)
        hook.remove()

    run.clear()
    asyncio.run(leave_at_once())
    assert (run, engine.stats().cancelled) == ([16], 1)
    run.clear()
    events = answer(engine, [9, *FIRST])
    assert (run[:2], events[0].cached_tokens) == ([16, 9], 16)
    expected(model, [9, *FIRST], events)


def test_usage_and_metrics_tell(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with running(model, tokenizer) as it:
        body = {"prompt": FIRST, "max_tokens": 2, "temperature": 0}
        for cached in (0, 39):
            usage = it.post(body, "/v1/completions").json()["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
        chunks = list(
            it.client().completions.create(model="tiny", stream=True, stream_options={"include_usage": True}, **body)  # type: ignore[call-overload]
        )
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 39
        assert "swiftkv_cached_tokens_total 78" in httpx.get(f"{it.url}/metrics").text.splitlines()


# Streams


def streamed(model: Any, prompt: list[int], count: int, sinks: int = 4, window: int = 16) -> list[int]:
    """The answer of a model with a window of its own, its tokens fed one by one."""
    cache = swiftkv_models.SinkWindowCache(model.config, window=window, attention_sinks=sinks)
    ids = list(prompt)
    with torch.no_grad():
        for token in prompt[:-1]:
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        while len(ids) < len(prompt) + count:
            last = torch.tensor([ids[-1:]])
            ids.append(int(model(input_ids=last, past_key_values=cache, use_cache=True).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_window_lets_conversations_go_on_without_end(
    model: Any, tokenizer: PreTrainedTokenizerFast, run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    engine = GenerateEngine(model, tokenizer, window=16)
    assert engine.info.context_length is None
    prompts = [list(FIRST), [5, *FIRST]]
    for turn in range(3):
        for prompt in prompts:  # in turn; each goes on from its own
            run.clear()
            events = answer(engine, prompt)
            assert run[0] == (len(prompt) if turn == 0 else 9)
            said = [event.token_id for event in events]
            run.clear()
            assert said == streamed(model, prompt, len(said))
            prompt += [*said, *range(60, 68)]
    assert len(prompts[0]) > 64
    run.clear()
    answer(engine, FIRST)  # which others went on from, and cannot be gone back to
    assert run[0] == 40
    engine.close()
    engine = GenerateEngine(model, tokenizer, window=16, context_length=45, reuse=False)
    assert engine.info.context_length == 45
    for _ in range(2):
        run.clear()
        answer(engine, FIRST)
        assert run[0] == 40
    engine.close()


def test_a_stream_keeps_the_system_message_which_runs_once(
    model: Any, tokenizer: PreTrainedTokenizerFast, run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sink: each answer is that of a cache whose sinks are the system message's tokens."""
    system = [{"role": "system", "content": "the cat"}]
    count = len(beginning_of_chat(tokenizer, system))
    with running(model, tokenizer, window=24) as it:
        for turn, question in enumerate(("the dog", "the other mat and the dog sat on the other mat")):
            messages = [*system, {"role": "user", "content": question}]
            run.clear()
            body = {"messages": messages, "max_tokens": 12, "temperature": 0}
            reply = it.post(body).json()
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert run[: 2 - turn] == [count, len(ids) - count][turn:]
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == count * turn
            said = streamed(model, ids, reply["usage"]["completion_tokens"], sinks=count, window=24)
            assert reply["choices"][0]["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)
            assert len(ids) + len(said) > count + 24  # the window has gone by
        for others in ([], [{"role": "system", "content": "the cat " * 9}]):  # none, or longer than the window
            run.clear()
            reply = it.post({**body, "messages": [*others, messages[1]]}).json()
            assert run[0] == reply["usage"]["prompt_tokens"]
    monkeypatch.setattr(model.config, "max_position_embeddings", count + 23)  # no room for both
    with running(model, tokenizer, window=24) as it:
        run.clear()
        it.post(body)
        assert run[0] == len(ids)


@pytest.mark.parametrize("first", ["the dog", " the dog", "\n\n  the dog", "assistant"])
def test_of_the_system_message_as_much_is_kept_as_the_prompt_begins_with(
    tokenizer: PreTrainedTokenizerFast, first: str
) -> None:
    """What follows may make one token with the template's last characters, or not be a user's turn."""
    system = [{"role": "system", "content": "the cat"}]
    role, content = ("assistant", "the dog") if first == "assistant" else ("user", first)
    body = ChatCompletionRequest(messages=[*system, {"role": role, "content": content}])  # type: ignore[arg-type]
    prompt = chat_prompt(tokenizer, body)
    beginning, count = beginning_of_chat(tokenizer, system), prompt.system_tokens
    assert list(prompt.token_ids[:count]) == beginning[:count]
    assert (count == len(beginning)) == (first != "assistant")
    assert "the cat" in tokenizer.decode(prompt.token_ids[:count])
    assert chat_prompt(tokenizer, body.model_copy(update={"messages": body.messages[1:]})).system_tokens == 0


@pytest.mark.parametrize("window", [None, 400])
def test_a_system_message_is_run_once_and_in_memory_once(
    model: Any, tokenizer: PreTrainedTokenizerFast, run: list[int], monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Of requests that come at once, in pieces, and of later ones; each is told what it would be alone."""
    monkeypatch.setattr(engine_module, "PIECE", 64)
    system = [number % 200 + 10 for number in range(280)]
    prompts = [[*system, 200 + count, *FIRST[:count]] for count in (7, 0, 20)]
    engine = GenerateEngine(model, tokenizer, window=window)
    told = ask_at_once(engine, [GenerationRequest(prompt, 8, temperature=0, system_tokens=280) for prompt in prompts])
    assert run[:5] == [64, 64, 64, 64, 24]
    assert not {64, 24} & set(run[5:])
    assert [events[0].cached_tokens for events in told] == [0, 280, 280]
    caches = [cache for _, cache in engine._kept._entries]
    prefixes = {id(prefix) for cache in caches for prefix in (cache.prefixes if window else [cache.prefix])}
    assert (len(caches), len(prefixes)) == (3, 1)
    if window:
        assert [cache.shared_rows for cache in caches] == [1, 1, 1]
    for prompt, events in zip(prompts, told, strict=True):
        expected(model, prompt, events)
    run.clear()
    later = [*prompts[1], *(event.token_id for event in told[1]), 9]
    events = answer(engine, later, system_tokens=280)
    assert (run[0], events[0].cached_tokens) == (2, len(later) - 2)
    expected(model, later, events)
    engine.close()


def test_what_requests_at_once_begin_with_runs_once(model: Any, engine: GenerateEngine, run: list[int]) -> None:
    """Without a word of what they have in common; also of one that has gone on since, and of a short one."""
    document = [number % 200 + 10 for number in range(300)]
    prompts = [[*document, 1, 2], [*document, 3], [*document[:270], 4], [*document[:9], 5], [6]]
    told = ask_at_once(engine, [GenerationRequest(prompt, 12, temperature=0) for prompt in prompts])
    assert [count for count in run if count > 1] == [302]
    assert [events[0].cached_tokens for events in told] == [0, 300, 270, 9, 0]
    for prompt, events in zip(prompts, told, strict=True):
        expected(model, prompt, events)
    assert sorted(cache.shared_tokens for _, cache in engine._kept._entries) == [0, 0, 0, 270, 300]


def test_a_kept_beginning_is_shared_too(model: Any, engine: GenerateEngine, run: list[int]) -> None:
    """Where no system's message says what requests have in common."""
    document = [number % 200 + 10 for number in range(300)]
    answer(engine, document)
    for end in ([1, 2], [3]):
        run.clear()
        events = answer(engine, [*document[:280], *end])
        assert (run[0], events[0].cached_tokens) == (len(end), 280)
        expected(model, [*document[:280], *end], events)
    assert [cache.shared_tokens for _, cache in engine._kept._entries] == [0, 280, 280]
    assert engine._kept._held() == (300 + 7) + 2 * 7 + 3  # the 280 are a part of the first one's


def test_a_request_that_was_left_in_its_system_message_keeps_nothing(
    model: Any, tokenizer: PreTrainedTokenizerFast, run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PIECE", 8)
    engine = GenerateEngine(model, tokenizer, window=64)

    async def leave_at_once() -> None:
        stream = engine.submit(GenerationRequest(FIRST, 2000, temperature=0, system_tokens=20))
        hook = model.model.layers[0].register_forward_hook(lambda *_: engine._cancel(stream._job))  # type: ignore[attr-defined]
        await asyncio.to_thread(engine.wait_idle, WAIT_S)
        hook.remove()

    asyncio.run(leave_at_once())
    assert (run, engine.stats().cancelled) == ([8], 1)
    run.clear()
    events = answer(engine, FIRST, system_tokens=20)
    assert (run[:3], events[0].cached_tokens) == ([8, 8, 4], 0)
    expected(model, FIRST, events)
    engine.close()


def test_a_stream_of_less_than_the_system_message_does_not_become_its_prefix(
    model: Any, tokenizer: PreTrainedTokenizerFast, run: list[int]
) -> None:
    engine = GenerateEngine(model, tokenizer, window=64)
    answer(engine, FIRST[:10], 1)
    run.clear()
    events = answer(engine, FIRST, system_tokens=20)
    assert (run[:2], events[0].cached_tokens) == ([20, 20], 0)
    expected(model, FIRST, events)
    engine.close()


def test_what_is_kept_is_within_the_given_context(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = GenerateEngine(model, tokenizer, context_length=700)
    for first in range(3):
        answer(engine, [first, *FIRST * 8], system_tokens=300)
        assert sum(map(len, engine._prefixes._entries)) == min(first + 1, 2) * 300
        assert engine._kept._held() <= 700
    engine.close()


@pytest.mark.parametrize("window", [0, 4097])
def test_a_window_that_cannot_be(model: Any, tokenizer: PreTrainedTokenizerFast, window: int) -> None:
    with pytest.raises(UserError, match=f"window is {window}; this model allows 1 to 4096"):
        GenerateEngine(model, tokenizer, window=window)


def test_a_stream_has_no_context_length(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with running(model, tokenizer, window=16) as it:
        assert httpx.get(f"{it.url}/v1/models").json()["data"][0]["max_model_len"] is None
        body = {"prompt": FIRST * 110, "max_tokens": 2, "temperature": 0}
        assert it.post(body, "/v1/completions").json()["usage"]["prompt_tokens"] == 4400  # of a model of 4,096


# The store alone


@pytest.fixture
def filled(model: Any) -> Callable[[list[int]], GrowingCache]:
    """The K/V of tokens."""

    def fill(ids: list[int]) -> GrowingCache:
        cache = GrowingCache(model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return cache

    return fill


def test_tokens_and_entries_are_bounded(model: Any, filled: Callable[[list[int]], GrowingCache]) -> None:
    kept = KeptCaches(model.config, max_tokens=100, max_entries=3)
    for first in range(5):
        ids = [first, *FIRST[:19]]
        kept.keep(ids, filled(ids))
    assert kept.lengths == [20, 20, 20]
    assert kept.take([2, *FIRST]).get_seq_length() == 20  # it goes on, so it is no longer kept
    assert kept.take([0, *FIRST]).get_seq_length() == 0
    assert kept.lengths == [20, 20]
    assert kept.take([3, *FIRST[:5]]).get_seq_length() == 5  # of the older one, which is now the last used
    long = [7, *range(69)]
    kept.keep(long, filled(long))
    assert kept.lengths == [20, 70]
    assert kept.take([3, *FIRST[:5], 1]).get_seq_length() == 6
    too_long = [8, *range(100)]
    kept.keep(too_long, filled(too_long))
    assert sorted(kept.lengths) == [20, 70]
    kept.clear()
    assert kept.lengths == []


def test_what_a_longer_one_begins_with_is_not_kept_twice(
    model: Any, filled: Callable[[list[int]], GrowingCache]
) -> None:
    kept = KeptCaches(model.config, max_tokens=1000)
    for length in (20, 30, 25):
        kept.keep(FIRST[:length], filled(FIRST[:length]))
        assert kept.lengths == [max(length, 30) if length > 20 else 20]


def test_a_beginning_leaves_the_kept_one_as_it_is(model: Any, filled: Callable[[list[int]], GrowingCache]) -> None:
    kept = KeptCaches(model.config, max_tokens=1000)
    cache = filled(FIRST)
    before = [layer.held(40)[0].clone() for layer in cache.growing]
    kept.keep(FIRST, cache)
    prompt = [*FIRST[:30], 1, 2]
    start = kept.take(prompt)
    assert start.get_seq_length() == 30
    generate(model, prompt, start, stopped=lambda: False, max_new_tokens=4, do_sample=False)
    assert cache.get_seq_length() == 40
    after = [layer.held(40)[0] for layer in cache.growing]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_prefixes_last_used_stay(model: Any) -> None:
    kept = KeptPrefixes(max_tokens=6, max_entries=2)
    taken = []
    for ids in ([1, 2, 3], [4, 5], [1, 2, 3], [6, 7], [4, 5], [1, 2, 3], [8, 9, 10, 11], [1, 2, 3]):
        taken.append(kept.take(ids) is not None)
        if not taken[-1]:
            kept.keep(SharedPrefix.from_ids(model, ids))
    assert taken == [False, False, True, False, False, False, False, False]
    kept.keep(SharedPrefix.from_ids(model, [1] * 7))
    assert kept.take([1] * 7) is None  # too long to keep, and in place of none
    assert kept.take([1, 2, 3]) is not None
