"""Tiny models, a tokenizer, and a real server on a free loopback port; `conftest.py` makes fixtures of them."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import swiftkv_models
from swiftkv_train.serve import GenerateEngine, GenerationRequest, TokenEvent, create_app
from swiftkv_train.serve.contract import TokenStream
from swiftkv_train.serve.draining import DrainingServer

WAIT_S = 60.0  # for what comes in moments, unless the processor is slow and busy
MODEL_NAME = "tiny"
# Refuses a system message that is not the first one, as many real templates do.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system message must come first') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def wait_until(condition: Callable[[], Any], timeout: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.01)


def ask_at_once(
    engine: GenerateEngine, requests: Iterable[GenerationRequest], *, return_exceptions: bool = False
) -> list[Any]:
    """The events that each is told, all of them admitted at once; or the exception, which otherwise is raised."""

    async def read(stream: TokenStream) -> list[TokenEvent]:
        return [event async for event in stream]

    async def all_of_them() -> list[Any]:
        streams = [engine.submit(request) for request in requests]
        return await asyncio.gather(*map(read, streams), return_exceptions=return_exceptions)

    told = asyncio.run(asyncio.wait_for(all_of_them(), WAIT_S))
    assert engine.wait_idle(WAIT_S)
    return told


def sse_data(lines: Iterable[str]) -> list[str]:
    """The events' data; a stream that lasts has comments too, which keep the connection."""
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: the 256 bytes, a few merges that no emoji is part of, and ChatML's tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")],
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the other mat"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def config(vocab_size: int, **changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return LlamaConfig(vocab_size=vocab_size, **(sizes | changes))


def random_llama(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """'base', or 'swiftkv' made of one; ready for the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = LlamaForCausalLM(config(len(tokenizer), num_hidden_layers=4, initializer_range=0.3))
        if kind == "swiftkv":
            made = swiftkv_models.rewrite(made, num_key_value_layers=2, key_value_group_size=2)
    return swiftkv_models.optimize_for_cpu(made.eval())


def successor_model(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], start: list[int], **changes: Any
) -> LlamaForCausalLM:
    """A Llama whose layers add nothing, so that its head alone says which token follows which: `ids` after `start`.

    The last one of `ids` follows itself for ever unless it is the end token.
    """
    assert len(set(ids)) == len(ids), "each token has one successor"
    size = 2 * ((len(tokenizer) + 1) // 2)
    model = LlamaForCausalLM(config(len(tokenizer), hidden_size=size, **changes)).eval()
    follows = {**dict.fromkeys(start, ids[0]), **dict(zip(ids, [*ids[1:], ids[-1]], strict=True))}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size)[: len(tokenizer)])
        model.lm_head.weight.zero_()
        for token, successor in follows.items():
            model.lm_head.weight[successor, token] = 100.0
    return model


@dataclass
class Running:
    url: str
    engine: GenerateEngine
    server: DrainingServer
    thread: threading.Thread

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=WAIT_S)

    def post(self, body: Any, route: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        return httpx.post(self.url + route, json=body, timeout=WAIT_S, **more)


@contextlib.contextmanager
def running(
    model: Any,
    tokenizer: Any,
    *,
    max_batch: int = 4,
    max_queue: int = 8,
    context_length: int | None = None,
    window: int | None = None,
    drain_timeout: float = 5.0,
    say: Callable[[str], None] | None = None,
    **app: Any,
) -> Iterator[Running]:
    limits = {"max_batch": max_batch, "max_queue": max_queue, "context_length": context_length, "window": window}
    engine = GenerateEngine(model, tokenizer, name=MODEL_NAME, **limits)  # type: ignore[arg-type]
    server = DrainingServer(create_app(engine, **app), engine, drain_timeout=drain_timeout, say=say)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Running(url, engine, server, thread)
    finally:
        engine.close()
        server.should_exit = True
        thread.join(WAIT_S)
        listener.close()
    assert not thread.is_alive()
