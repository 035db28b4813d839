"""A tiny byte-level tokenizer with a ChatML template, trained here in milliseconds; pad is eos, as in SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from swiftkv_train.data import TokenizedSource

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What is the capital of France? The capital of France is Paris.",
    "Yes. No. I do not know; ask me again in the morning, please.",
    "system user assistant You are a helpful assistant who answers in one sentence.",
]
DEFAULT_SYSTEM = "You are a helpful assistant."
OPENING = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    OPENING + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
CHATML_WITH_GENERATION = (
    OPENING + "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)


def build_tokenizer(*, trim_offsets: bool = False, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def generation_template() -> str:
    """ChatML with the marks transformers itself makes assistant masks from."""
    return CHATML_WITH_GENERATION


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, rows: list[Any]) -> Path:
        """Rows as lines; bytes are written as they are."""
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def make_source() -> Callable[..., TokenizedSource]:
    def make(lengths: list[int], targets: list[int] | None = None, name: str = "made") -> TokenizedSource:
        """Documents of these lengths; token t of the whole source has the id t, so that no two are alike."""
        total = sum(lengths)
        marks = np.ones(total, np.uint8) if targets is None else np.asarray(targets, np.uint8)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(total, dtype=np.int32)
        return TokenizedSource(
            name, tokens, marks, offsets, len(lengths), total, int(marks.sum()), 0, f"{name}{lengths}"
        )

    return make
