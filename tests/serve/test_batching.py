"""Requests that are answered together: what each would be told alone, and none waits for another's end."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving import WAIT_S, ask_at_once, random_llama, wait_until
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from swiftkv_train.serve import GenerateEngine, GenerationRequest, TokenEvent
from swiftkv_train.serve import engine as engine_module
from swiftkv_train.serve.contract import GenerationError

PROMPTS = [list(range(10, 50)), [7, 8, 9], list(range(100, 190)), [60]]
COUNTS = [12, 30, 5, 20]


@pytest.fixture(scope="module", params=["base", "swiftkv"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    return random_llama(request.param, tokenizer, seed=4)


@pytest.fixture
def batches(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every forward."""
    shapes: list[tuple[int, int]] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    yield shapes
    hook.remove()


def ask(engine: GenerateEngine, requests: list[GenerationRequest]) -> list[list[TokenEvent] | Exception]:
    return ask_at_once(engine, requests, return_exceptions=True)


def ids_of(told: list[TokenEvent] | Exception) -> list[int]:
    assert not isinstance(told, Exception), told
    return [event.token_id for event in told]


def greedy(prompts: list[list[int]] = PROMPTS) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, count, temperature=0) for prompt, count in zip(prompts, COUNTS, strict=False)]


@pytest.mark.parametrize("window", [None, 16])
def test_each_is_told_what_it_would_be_alone(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    batches: list[tuple[int, int]],
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in pieces, answers of different lengths, more requests than places."""
    for name in ("PIECE", "SHORT_PIECE"):
        monkeypatch.setattr(engine_module, name, 32)
    alone = GenerateEngine(model, tokenizer, max_batch=1, window=window, reuse=False)
    wanted = [ids_of(told) for told in ask(alone, greedy())]
    assert {rows for rows, _ in batches} == {1}
    alone.close()
    batches.clear()
    engine = GenerateEngine(model, tokenizer, max_batch=3, window=window)
    assert [ids_of(told) for told in ask(engine, greedy())] == wanted
    assert max(rows for rows, _ in batches) == 3
    # Of every answer the first token comes with its prompt.
    steps = [rows for rows, tokens in batches if tokens == 1]
    assert len(steps) < sum(steps) * 2 / 3
    assert engine.stats().finished == 4
    # What they left is gone on from, together again.
    again = [[*prompt, *answer, 5] for prompt, answer in zip(PROMPTS, wanted, strict=True)]
    told = ask(engine, greedy(again))
    assert [events[0].cached_tokens for events in told] == [len(prompt) - 2 for prompt in again]  # type: ignore[index]
    engine.close()


def test_a_short_answer_does_not_wait_for_a_long_one(
    endless_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = GenerateEngine(endless_model, tokenizer, max_batch=2)
    prompt = tokenizer.encode("\n")

    async def use() -> None:
        long = engine.submit(GenerationRequest(prompt, 90_000, temperature=0))
        await long.__anext__()
        for _ in range(2):
            short = engine.submit(GenerationRequest(prompt, 3, temperature=0))
            assert len([event async for event in short]) == 3
        await asyncio.to_thread(wait_until, lambda: engine.stats().finished == 2)
        assert engine.stats().running == 1
        await long.aclose()

    asyncio.run(asyncio.wait_for(use(), WAIT_S))
    assert engine.wait_idle(WAIT_S)
    engine.close()


@pytest.mark.parametrize("where", ["prompt", "step"])
def test_what_fails_in_a_prompt_is_its_own_and_in_a_step_everybodys(
    model: Any, tokenizer: PreTrainedTokenizerFast, where: str
) -> None:
    engine = GenerateEngine(model, tokenizer)
    wanted = [ids_of(told) for told in ask(engine, greedy())]

    def fail(layer: Any, args: Any, kwargs: Any) -> None:
        rows, tokens = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        if (where == "prompt" and tokens == 4) or (where == "step" and rows > 2):
            raise RuntimeError("no memory")

    hook = model.model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    told = ask(engine, greedy([*PROMPTS[:2], [1, 2, 3, 4], PROMPTS[3]]))
    hook.remove()
    failed = [isinstance(answer, GenerationError) for answer in told]
    if where == "prompt":
        assert failed == [False, False, True, False]
    assert any(failed)
    for answer, right, ended in zip(told, wanted, failed, strict=True):
        if not ended:
            assert ids_of(answer) == right
    assert engine.stats().failed == sum(failed)
    assert [ids_of(answer) for answer in ask(engine, greedy())] == wanted
    engine.close()


@pytest.mark.parametrize(
    ("asked", "own"),
    [
        ({"temperature": 1.0}, {}),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 40}, {}),
        ({"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.4}, {"top_k": 20}),
        ({"temperature": 1.0, "top_k": 0}, {"typical_p": 0.6, "no_repeat_ngram_size": 2, "top_k": 5}),
        ({"temperature": 0.0}, {"no_repeat_ngram_size": 1, "repetition_penalty": 2.0}),
    ],
)
def test_tokens_are_chosen_as_generate_chooses_them(
    model: Any, tokenizer: PreTrainedTokenizerFast, asked: dict[str, Any], own: dict[str, Any]
) -> None:
    """With the same seed the same ones, by settings of the request and of the checkpoint."""
    before = {key: getattr(model.generation_config, key) for key in own}
    model.generation_config.update(**own)
    try:
        engine = GenerateEngine(model, tokenizer)
        (told,) = ask(engine, [GenerationRequest(PROMPTS[0], 24, seed=11, **asked)])
        engine.close()
        sampling = {**own, **asked} if asked["temperature"] else {**own, "temperature": 1.0}
        sampling = {"top_k": 0, **sampling}
        ids = torch.tensor([PROMPTS[0]])
        with torch.random.fork_rng():
            torch.manual_seed(11)
            plain = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=bool(asked["temperature"]),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
                **sampling,
            )
    finally:
        model.generation_config.update(**before)
    assert ids_of(told) == plain[0, len(PROMPTS[0]) :].tolist()
