"""The model and the data named `debug`: a tiny random Llama and made-up text, built on the spot; nothing is downloaded.

The model says nothing of sense. It is for trying the commands and for finding mistakes: a whole run takes seconds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftkv_train.loading import tell_deepspeed_of_cpu

# ChatML, as SmolLM2 and Qwen use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 512
LAYERS = 6
ANIMALS = {"fox": "brown", "hen": "white", "crow": "black", "newt": "green", "carp": "golden", "mole": "grey"}
PLACES = ("in the garden", "by the river", "under the old bridge", "behind the mill", "on the hill", "at the market")
ACTS = ("sleeps", "waits for rain", "looks for food", "sings to itself", "counts the clouds", "hides from the dog")
TIMES = ("Every morning", "At noon", "In winter", "Before the storm", "On Sundays", "Late at night")
DOCUMENTS = {"train": 240, "held_out": 24}


def build_debug_model(to: Path, _report: Callable[[str], None]) -> None:
    """Write the model, its tokenizer and its chat template into the existing directory `to`; always the same ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = debug_tokenizer()
    tokenizer.save_pretrained(to)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough for attention to matter to the logits
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tell_deepspeed_of_cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(to)


def debug_tokenizer() -> Any:
    """A byte-level tokenizer trained on the made-up text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made = random.Random(0)
    texts = [text for _ in range(64) for text in (prose(made)["text"], *(m["content"] for m in chat(made)["messages"]))]
    backend.train_from_iterator([*texts, "system user assistant\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_debug_data(to: Path, report: Callable[[str], None]) -> None:
    """Write prose and chats, to train on and held out, into the existing directory `to`; always the same ones."""
    made = random.Random(1)
    for kind, document in (("prose", prose), ("chats", chat)):
        for split, count in DOCUMENTS.items():
            lines = [json.dumps(document(made)) + "\n" for _ in range(count)]
            (to / f"{kind}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    report(f"wrote {DOCUMENTS['train']} documents each of prose and chats, and {DOCUMENTS['held_out']} held out")


def prose(made: random.Random) -> dict[str, Any]:
    sentences = []
    for _ in range(made.randint(3, 9)):
        animal = made.choice(list(ANIMALS))
        time, act, place = made.choice(TIMES), made.choice(ACTS), made.choice(PLACES)
        sentences.append(f"{time} the {ANIMALS[animal]} {animal} {act} {place}.")
    return {"text": " ".join(sentences)}


def chat(made: random.Random) -> dict[str, Any]:
    messages = []
    for _ in range(made.randint(1, 3)):
        animal, time = made.choice(list(ANIMALS)), made.choice(TIMES).lower()
        act, place = made.choice(ACTS), made.choice(PLACES)
        messages += [
            {"role": "user", "content": f"What does the {animal} do {time}, and what colour is it?"},
            {"role": "assistant", "content": f"The {animal} {act} {place}. It is {ANIMALS[animal]}."},
        ]
    return {"messages": messages}
