"""`swiftkv bench serve`: requests that come at once, answered together (continuous batching) and one after another.

Through the engine of `swiftkv serve`, without the network. Prompts are random tokens, so that no K/V is reused.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from swiftkv_train.bench.turns import OURS, Cell, compare, comparison, in_turns, numbers_from
from swiftkv_train.machine import environment
from swiftkv_train.progress import Reporter
from swiftkv_train.serve import GenerateEngine, GenerationRequest, load_model_and_tokenizer
from swiftkv_train.serve.engine import THREAD
from swiftkv_train.serve.one_thread import OneThread

ONE_BY_ONE = "one by one"


def measure(path: str, clients: str, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds until all of them are answered (medians, taking turns), tokens a second, and the wait for the first one.

    clients: numbers of requests; each has a `prompt` of so many tokens and gets up to `tokens`, greedily.
    """
    numbers = numbers_from("--clients", clients, 1, "1,8")
    thread = OneThread(THREAD)  # that loads the model, as the server's does
    model, tokenizer = thread.call(partial(load_model_and_tokenizer, path))
    engine = GenerateEngine(model, tokenizer, max_batch=numbers[-1], reuse=False, thread=thread)
    rows = []
    try:
        with Reporter().bar("serve", len(numbers), "rows") as advance:
            for number in numbers:
                rows.append(_row(engine, model, number, prompt, tokens, repeats))
                advance(1)
    finally:
        engine.close()
    return {
        "benchmark": "requests that come at once",
        "command": f"swiftkv bench serve {path} --clients {clients} --prompt {prompt} --tokens {tokens} "
        f"--repeats {repeats}",
        "environment": environment(model),
        "model_type": model.config.model_type,
        "prompt_tokens": prompt,
        "rows": rows,
        "summary": [_line(row) for row in rows],
    }


def _row(engine: GenerateEngine, model: Any, number: int, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    prompts = torch.randint(0, model.config.vocab_size, (number, prompt), generator=generator).tolist()
    requests = [GenerationRequest(ids, tokens, temperature=0) for ids in prompts]
    told: dict[str, list[tuple[int, float]]] = {}

    def ask(name: str) -> None:
        told[name] = asyncio.run(_answers(engine, requests, together=name == OURS))

    cells = in_turns({name: partial(ask, name) for name in (OURS, ONE_BY_ONE)}, repeats, model.device)
    for name, cell in cells.items():
        if "failed" not in cell:
            counts, waits = zip(*told[name], strict=True)
            cell |= {"tokens": sum(counts), "tokens_per_second": sum(counts) / cell["seconds"]}
            cell["first_token_seconds"] = statistics.mean(waits)  # of the last turn
    compare(cells)
    return {"clients": number, "contenders": cells}


async def _answers(
    engine: GenerateEngine, requests: Sequence[GenerationRequest], *, together: bool
) -> list[tuple[int, float]]:
    """How many tokens each is answered with, and how long after all have come its first one does."""
    began = time.perf_counter()

    async def read(request: GenerationRequest) -> tuple[int, float]:
        first, count = 0.0, 0
        async for _ in engine.submit(request):
            first = first if count else time.perf_counter() - began
            count += 1
        return count, first

    if together:
        return await asyncio.gather(*map(read, requests))
    return [await read(request) for request in requests]


def _line(row: dict[str, Any]) -> str:
    cells: dict[str, Cell] = row["contenders"]
    rates = "; ".join(
        f"{name} {cell['tokens_per_second']:,.1f} tokens/s, the first after {cell['first_token_seconds']:.2f} s"
        for name, cell in cells.items()
        if "failed" not in cell
    )
    return f"{row['clients']} at once: {comparison(cells)}; {rates}"
