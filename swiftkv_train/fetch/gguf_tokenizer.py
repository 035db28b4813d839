"""The tokenizer that a GGUF file describes, as files that AutoTokenizer reads.

Byte-level BPE vocabularies are built here, because `tokenizer.ggml.pre` decides how text is cut before merging and a
wrong cut goes unnoticed: SmolLM2 splits digits one by one, GPT-2 does not. Which splits a name stands for is written
down in llama.cpp (`src/llama-vocab.cpp`). SentencePiece vocabularies go through transformers' own converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkv_train.errors import UserError
from swiftkv_train.loading import one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `default` is what llama.cpp's converter wrote before it told vocabularies apart; GPT-2's split is the usual meaning.
PRE_TOKENIZERS = {
    "smollm": "digits",
    "gpt-2": "gpt2",
    "default": "gpt2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
}


def save_tokenizer(path: Path, metadata: dict[str, Any], to: Path) -> None:
    """Write the tokenizer of the GGUF file at `path`, chat template included, into the directory `to`.

    Raises UserError for a kind of tokenizer or a pre-tokeniser that is not known, and for one that makes no sense.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model is {model!r}; known are 'gpt2' and 'llama'")
    for key in ("tokens", "merges"):
        named = metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise UserError(f"{path}: tokenizer.ggml.{key} is not a list of texts")
    if not isinstance(metadata.get("tokenizer.chat_template", ""), str):
        raise UserError(f"{path}: tokenizer.chat_template is not text")
    try:
        tokenizer = _tokenizer(path, metadata)
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever occurs to them
        raise UserError(f"{path}: its tokenizer (tokenizer.ggml.*) cannot be built: {one_line(error)}") from None
    tokenizer.save_pretrained(to)


def _tokenizer(path: Path, metadata: dict[str, Any]) -> Any:
    if metadata["tokenizer.ggml.model"] == "gpt2":
        return _byte_level(path, metadata)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.model_max_length = metadata["llama.context_length"]
    return tokenizer


def _byte_level(path: Path, metadata: dict[str, Any]) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = _backend(path, metadata, tokens)

    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    whole = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in whole if token.special])
    tokenizer.add_tokens([token for token in whole if not token.special])
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(f"{path}: its vocabulary repeats tokens; {tokenizer.get_vocab_size()} of {len(tokens)} differ")

    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            named[f"{name}_token"] = tokens[index]
    _add_bos_and_eos(tokenizer, metadata, named)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **named,
    )


def _backend(path: Path, metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    split = PRE_TOKENIZERS.get(pre)
    if split is None:
        raise UserError(f"{path}: pre-tokeniser {pre!r} (tokenizer.ggml.pre) is not one of {', '.join(PRE_TOKENIZERS)}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "llama3")
    if split == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif split == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"), byte_level]
        )
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: dict[str, Any], named: dict[str, str]) -> None:
    """llama.cpp adds a bos to a Llama-3 vocabulary unless the file says otherwise, and to no other byte-level one."""
    from tokenizers import processors

    llama3 = PRE_TOKENIZERS[metadata.get("tokenizer.ggml.pre", "default")] == "llama3"
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", llama3) and "bos_token" in named
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named
    if not add_bos and not add_eos:
        return
    before = [named["bos_token"]] if add_bos else []
    after = [named["eos_token"]] if add_eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)],
    )
