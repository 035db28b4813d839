"""`swiftkv bench serve`: requests that come at once, answered together (continuous batching) and one after another.

Through the engine of `swiftkv serve`, without the network. Prompts are random tokens, new ones in every turn, so that
no K/V is there from before. With a system message, which all requests of a turn begin with, requests of the same length
that have nothing in common are a third contender: what the message costs where it is not shared.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from swiftkv_train.bench.turns import OURS, Cell, compare, comparison, in_turns, numbers_from
from swiftkv_train.errors import UserError
from swiftkv_train.machine import environment
from swiftkv_train.progress import Reporter
from swiftkv_train.serve import GenerateEngine, GenerationRequest, load_model_and_tokenizer
from swiftkv_train.serve.engine import THREAD
from swiftkv_train.serve.one_thread import OneThread

ONE_BY_ONE, APART = "one by one", "nothing in common"


def measure(path: str, clients: str, system: int, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds until all of them are answered (medians, taking turns), tokens a second, the wait for the first token,
    and the time from one to the next.

    clients: numbers of requests; each has a `prompt` of so many tokens behind a `system` message, and gets `tokens`,
    greedily.
    """
    numbers = numbers_from("--clients", clients, 1, "1,8")
    thread = OneThread(THREAD)  # that loads the model, as the server's does
    model, tokenizer = thread.call(partial(load_model_and_tokenizer, path))
    engine = GenerateEngine(model, tokenizer, max_batch=numbers[-1], thread=thread)
    rows = []
    try:
        if (needed := system + prompt + tokens) > (engine.info.context_length or needed):
            raise UserError(f"{needed} tokens are more than the context of {path}, {engine.info.context_length}")
        with Reporter().bar("serve", len(numbers), "rows") as advance:
            for number in numbers:
                rows.append(_row(engine, model, number, system, prompt, tokens, repeats))
                advance(1)
    finally:
        engine.close()
    return {
        "benchmark": "requests that come at once",
        "command": f"swiftkv bench serve {path} --clients {clients} --system {system} --prompt {prompt} "
        f"--tokens {tokens} --repeats {repeats}",
        "environment": environment(model),
        "model_type": model.config.model_type,
        "system_tokens": system,
        "prompt_tokens": prompt,
        "rows": rows,
        "summary": [_line(row) for row in rows],
    }


def _row(
    engine: GenerateEngine, model: Any, number: int, system: int, prompt: int, tokens: int, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)

    def drawn(length: int) -> list[int]:
        return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()

    contenders = [OURS, ONE_BY_ONE, *([APART] if system else [])]
    told: dict[str, list[list[float]]] = {name: [] for name in contenders}

    def ask(name: str) -> None:
        common = drawn(system)
        requests = [
            GenerationRequest(
                [*(drawn(system) if name == APART else common), *drawn(prompt)],
                tokens,
                temperature=0,
                ignore_eos=True,
                system_tokens=0 if name == APART else system,
            )
            for _ in range(number)
        ]
        told[name] += asyncio.run(_times(engine, requests, together=name != ONE_BY_ONE))

    cells = in_turns({name: partial(ask, name) for name in contenders}, repeats, model.device)
    for name, cell in cells.items():
        if "failed" not in cell:
            counted = told[name][number:]  # not the first turn's
            cell |= {"tokens": number * tokens, "tokens_per_second": number * tokens / cell["seconds"]}
            cell["first_token_seconds"] = statistics.mean(times[0] for times in counted)
            # Of the later half of each answer, where most others are being answered too.
            gaps = [b - a for times in counted for a, b in pairwise(times[len(times) // 2 :])]
            cell["next_token_seconds"] = statistics.median(gaps) if gaps else None
    compare(cells)
    return {"clients": number, "contenders": cells}


async def _times(engine: GenerateEngine, requests: Sequence[GenerationRequest], *, together: bool) -> list[list[float]]:
    """When each is told its tokens, in seconds after all have come."""
    began = time.perf_counter()

    async def read(request: GenerationRequest) -> list[float]:
        return [time.perf_counter() - began async for _ in engine.submit(request)]

    if together:
        return await asyncio.gather(*map(read, requests))
    return [await read(request) for request in requests]


def _line(row: dict[str, Any]) -> str:
    cells: dict[str, Cell] = row["contenders"]
    told = "; ".join(f"{name} {_figures(cell)}" for name, cell in cells.items() if "failed" not in cell)
    return f"{row['clients']} at once: {comparison(cells)}; {told}"


def _figures(cell: Cell) -> str:
    figures = f"{cell['tokens_per_second']:,.1f} tokens/s, the first after {cell['first_token_seconds']:.2f} s"
    gap = cell["next_token_seconds"]  # None where there is no next one
    return figures if gap is None else f"{figures}, the next after {gap * 1e3:,.0f} ms"
