"""What a model's generation_config.json says, checked, and how this project decodes by it and by what it was asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swiftkv_train.errors import UserError

GREEDY_BELOW = 1e-5  # a smaller temperature is greedy: dividing logits by it would overflow


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


# What is kept: key -> what its value must be, and in words. null is as good as absent.
KEPT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bos_token_id": (_whole, "a token id"),
    "eos_token_id": (lambda value: all(map(_whole, value if isinstance(value, list) else [value])), "token ids"),
    "pad_token_id": (_whole, "a token id"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _number(value) and value >= 0, "a number, 0 or more"),
    "top_k": (lambda value: _whole(value) and value >= 0, "a whole number, 0 or more"),
    "top_p": (_share, "a number from 0 to 1"),
    "min_p": (_share, "a number from 0 to 1"),
    "typical_p": (lambda value: _share(value) and value > 0, "a number above 0, at most 1"),
    "repetition_penalty": (lambda value: _number(value) and value > 0, "a number above 0"),
    "no_repeat_ngram_size": (lambda value: _whole(value) and value >= 0, "a whole number, 0 or more"),
}
# How long an answer gets, what is kept in a cache and what is returned is said by whoever calls.
CALLERS = ("max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version")


def check_settings(settings: Mapping[str, Any], vocab_size: int, file: Path) -> None:
    """Raises UserError, naming `file` and the key, for a value that generation would stumble over."""
    for key, (fits, words) in KEPT.items():
        value = settings.get(key)
        if value is not None and not fits(value):
            raise UserError(f"{file}: {key} is {repr(value)[:80]}; it must be {words}")
    ends = settings.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not 0 <= end < vocab_size:
            raise UserError(
                f"{file}: eos_token_id {end} is no token of this model (0 to {vocab_size - 1}): its answers had no end"
            )


def unused_settings(settings: Mapping[str, Any]) -> list[str]:
    """The keys that would change what the model says, or how it is found, and that are left out here."""
    odd = (key for key, value in settings.items() if value not in (None, False, 0, 1, [], {}))
    return sorted(key for key in odd if key not in KEPT and key not in CALLERS and not key.startswith(("_", "output_")))


def kept_settings(generation_config: Any) -> Any:
    """A GenerationConfig of nothing but KEPT: no beams, time limits, stop strings or assistants."""
    from transformers import GenerationConfig

    return GenerationConfig(**{key: getattr(generation_config, key, None) for key in KEPT})


def default_temperature(settings: Any) -> float:
    """What to sample at where nobody says: 0 (greedy) for a model whose settings say so, else its own, else 1."""
    if settings.do_sample is False:
        return 0.0
    return 1.0 if settings.temperature is None else float(settings.temperature)


def end_token_ids(settings: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the model's and the tokenizer's."""
    ends = settings.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def decoding_config(
    settings: Any,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Any:
    """The GenerationConfig for one answer; None stands for what the model's own `settings` say.

    `top_k` below 1 means all tokens, as do settings without one.
    """
    from transformers import GenerationConfig

    temperature = default_temperature(settings) if temperature is None else temperature
    greedy = temperature < GREEDY_BELOW
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # unset values: others warn if greedy
    if not greedy:
        top_k = settings.top_k if top_k is None else top_k
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": max(top_k or 0, 0), "min_p": min_p}
    ends = sorted(end_token_ids(settings, tokenizer))
    pads = (settings.pad_token_id, tokenizer.pad_token_id, *ends, 0)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        **sampling,
        repetition_penalty=repetition_penalty,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=ends or None,
        pad_token_id=next(pad for pad in pads if pad is not None),
    )


def logits_processors(decoding: Any, settings: Any) -> Any:
    """What `generate` does to logits by a `decoding_config`, where that is silent by the model's own `settings`: its
    processors, in its order."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    def asked(name: str, idle: float) -> Any:
        """None where it would change nothing."""
        value = getattr(decoding, name, None)
        value = getattr(settings, name, None) if value is None else value
        return None if value == idle else value

    made = LogitsProcessorList()
    if (penalty := asked("repetition_penalty", 1.0)) is not None:
        made.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if (size := asked("no_repeat_ngram_size", 0)) is not None:
        made.append(NoRepeatNGramLogitsProcessor(size))
    if not decoding.do_sample:
        return made
    for name, idle, kind in (
        ("temperature", 1.0, TemperatureLogitsWarper),
        ("top_k", 0, TopKLogitsWarper),
        ("top_p", 1.0, TopPLogitsWarper),
        ("min_p", 0.0, MinPLogitsWarper),
        ("typical_p", 1.0, TypicalLogitsWarper),
    ):
        if (value := asked(name, idle)) is not None:
            made.append(kind(value))
    return made
