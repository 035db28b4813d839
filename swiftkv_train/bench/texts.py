"""A text as tokens, for a benchmark that reads it once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from swiftkv_train.data import tokenize_source
from swiftkv_train.data.cache import TokenizedSource
from swiftkv_train.loading import Model, load_tokenizer
from swiftkv_train.recipe import Source


@contextmanager
def tokenized(source: Source, path: str, model: Model) -> Iterator[TokenizedSource]:
    """By the tokenizer at `path`; its files go with the context."""
    with tempfile.TemporaryDirectory() as scratch:
        yield tokenize_source(source, load_tokenizer(path), vocab_size=model.config.vocab_size, cache_dir=scratch)
