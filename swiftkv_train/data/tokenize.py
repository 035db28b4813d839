"""Documents to token ids and loss targets, in batches (fast tokenizers use every core on a list)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from swiftkv_train.data.chat import ChatRenderer, tokenize_chats
from swiftkv_train.data.documents import BadRow, ChatDocument, Document, TextDocument, TokenDocument
from swiftkv_train.data.sources import SkippedRows
from swiftkv_train.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Tokens: TypeAlias = "tuple[NDArray[np.int32], NDArray[np.uint8]]"

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 8_000_000  # some 200 MB while it is tokenised; long documents for every core


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str = "") -> None:
    """Raises UserError, naming the model `where`, when the tokenizer knows tokens that it has no embeddings for."""
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))  # ids may leave gaps
    if tokens > vocab_size:
        raise UserError(
            f"vocabulary mismatch{where and f' in {where}'}: the tokenizer has {tokens} tokens, the model only "
            f"{vocab_size}; use the tokenizer that belongs to the model"
        )


def tokenize_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int, skipped: SkippedRows
) -> Iterator[Tokens]:
    """Per document its ids [n] int32 and which of them are loss targets [n] uint8, in order.

    Text gets the tokenizer's default special tokens and is all target; chats see chat.py.

    Raises:
        UserError: an id outside the vocabulary, or a chat the tokenizer cannot render (see chat.py).
    """
    renderer = ChatRenderer(tokenizer)
    for batch in _batches(documents):
        texts = [document for document in batch if isinstance(document, TextDocument)]
        chats = [document for document in batch if isinstance(document, ChatDocument)]
        text_ids = iter(_tokenize_texts(texts, tokenizer))
        chat_tokens = iter(tokenize_chats(chats, renderer))
        for document in batch:
            if isinstance(document, TokenDocument):
                _check_ids(document.input_ids, vocab_size, document.location)
                yield np.asarray(document.input_ids, dtype=np.int32), np.asarray(document.targets, dtype=np.uint8)
                continue
            result: tuple[NDArray[np.int64], NDArray[np.bool_]] | BadRow
            if isinstance(document, TextDocument):
                ids = np.asarray(next(text_ids), dtype=np.int64)
                result = (
                    (ids, np.ones(len(ids), dtype=bool)) if len(ids) else BadRow("the tokenizer makes no token of it")
                )
            else:
                result = next(chat_tokens)
            if isinstance(result, BadRow):
                skipped.add(document.location, str(result))
                continue
            _check_ids(result[0], vocab_size, document.location)
            yield result[0].astype(np.int32), result[1].astype(np.uint8)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all about a tokenizer that decides its output: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding are left behind by whatever call came last, and the calls here set their own.
    rules = None if backend is None else json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    content = {
        "class": type(tokenizer).__name__,
        "rules": sorted(tokenizer.get_vocab().items()) if rules is None else rules,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "flags": [
            getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenize_texts(texts: list[TextDocument], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        [document.text for document in texts],
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # Long documents are cut in packing; the warning about them would be noise.
    )["input_ids"]


def _check_ids(ids: list[int] | NDArray[np.int64], vocab_size: int, location: str) -> None:
    if len(ids) == 0 or (
        min(ids) >= 0 and max(ids) < vocab_size if isinstance(ids, list) else _in_range(ids, vocab_size)
    ):
        return
    wrong = next(int(token) for token in ids if not 0 <= token < vocab_size)
    raise UserError(
        f"{location}: token id {wrong} is outside the model's vocabulary of {vocab_size}; "
        "these tokens were made with another tokenizer"
    )


def _in_range(ids: NDArray[np.int64], vocab_size: int) -> bool:
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += _characters(document)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(document: Document) -> int:
    if isinstance(document, TextDocument):
        return len(document.text)
    if isinstance(document, ChatDocument):
        return sum(len(message["content"]) for message in document.messages)
    return len(document.input_ids)
