"""Pieces of text against the tokenizer's own decoding of everything, and against `str.split`."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swiftkv_train.serve.text import IncrementalDecoder, StopScanner

TEXTS = [
    "the cat 😀👍🏽 sat",
    "äöü€ — 漢字",
    "👩‍👩‍👧‍👦 family",
    "plain",
    "",
    "\ufffd real \ufffd\ufffd replacements \ufffd",
]

# How a byte-level tokenizer writes the bytes: those that can be seen as themselves, the others from U+0100 on.
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
BYTE_CHARACTERS = {byte: chr(byte if byte in _SEEN else 0x100 + _UNSEEN.index(byte)) for byte in range(256)}


def pieces(decoder: IncrementalDecoder, token_ids: list[int]) -> list[str]:
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert len(token_ids) > len(text) or text.isascii()  # characters are cut
    out = pieces(IncrementalDecoder(tokenizer, tokenizer.encode("a prompt")), token_ids)
    assert "".join(out) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in out)


def test_any_bytes_decode_as_all_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    for _ in range(50):
        token_ids = [draw.randrange(len(tokenizer)) for _ in range(60)]
        whole = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces(IncrementalDecoder(tokenizer), token_ids)) == whole


@pytest.mark.parametrize(
    "unit",
    [[0x80], [0xF0, 0x9F], [0xE6, 0xBC, 0xA2, 0x80], [0xFF], None],
    ids=["80", "f09f", "e6bca280", "ff", "special"],
)
def test_text_that_never_becomes_a_character_is_given_out(
    tokenizer: PreTrainedTokenizerFast, unit: list[int] | None
) -> None:
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [special] if unit is None else tokenizer.convert_tokens_to_ids([BYTE_CHARACTERS[byte] for byte in unit])
    token_ids = [*tokenizer.encode("a"), *(ids * 400), *tokenizer.encode("漢 b")]
    lengths = []

    class Watched:
        def decode(self, window: list[int], **options: Any) -> str:
            lengths.append(len(window))
            return tokenizer.decode(window, **options)

    out = pieces(IncrementalDecoder(Watched()), token_ids)
    assert "".join(out) == tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert max(lengths) < 50
    assert unit is None or any(out[200:250])


def test_text_cut_inside_a_character_ends_in_a_replacement(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(IncrementalDecoder(tokenizer), tokenizer.encode("a😀")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_prompt_that_ends_inside_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    smile = tokenizer.encode("😀")
    assert "".join(pieces(IncrementalDecoder(tokenizer, smile[:2]), tokenizer.encode("ok"))) == "ok"


def test_sentencepiece_keeps_the_space_after_the_prompt() -> None:
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([1, 2]) == "cats"  # alone, the space is lost
    assert pieces(IncrementalDecoder(tokenizer, [0]), [1, 2]) == [" cat", "s", ""]


@pytest.mark.parametrize("stop", ["END", "aab", "\n\n", "é😀"])
@pytest.mark.parametrize("text", ["no such thing", "xENxEND rest END", "aaaab", "a\n\nb", "oh é😀", "aaEN", "E"])
def test_stop_string_wherever_the_text_is_cut(text: str, stop: str) -> None:
    wanted = text.split(stop)[0]
    draw = random.Random(1)
    for _ in range(30):
        scanner, at, out = StopScanner([stop]), 0, []
        while at < len(text):
            cut = draw.randint(1, 4)
            out.append(scanner.push(text[at : at + cut]))
            at += cut
            assert wanted.startswith("".join(out)), "a part of the stop string was passed on"
        assert "".join([*out, scanner.flush()]) == wanted
        assert scanner.found == (stop in text)


def test_the_stop_string_complete_first_wins_however_the_text_is_cut() -> None:
    for cuts in (["abcd"], ["ab", "cd"], ["a", "b", "c", "d"]):
        scanner = StopScanner(["abcd", "bc"])
        assert "".join(map(scanner.push, cuts)) + scanner.flush() == "a"
