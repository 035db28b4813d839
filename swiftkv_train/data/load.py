"""From a recipe's `data` section to what training and evaluation read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swiftkv_train.data.cache import Progress, TokenizedSource, tokenize_source
from swiftkv_train.data.mixture import TrainingData
from swiftkv_train.data.sources import file_identities
from swiftkv_train.data.tokenize import check_vocabulary, tokenizer_fingerprint
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import DataSection, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_training_data(
    recipe_data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    pad_token_id: int,
    progress: Progress | None = None,
) -> TrainingData:
    """The stream a recipe trains on. Raises UserError: see `tokenize_source`, `check_no_overlap` and `TrainingData`."""
    sources = _tokenize_all(recipe_data, recipe_data.train, tokenizer, vocab_size, progress)
    weights = [source.weight for source in recipe_data.train]
    return TrainingData(sources, weights, recipe_data.sequence_length, recipe_data.seed, pad_token_id)


def load_held_out(
    recipe_data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    progress: Progress | None = None,
) -> list[TokenizedSource]:
    """The sources a recipe evaluates on, in its order. Raises UserError: see `tokenize_source`, `check_no_overlap`."""
    return _tokenize_all(recipe_data, recipe_data.held_out, tokenizer, vocab_size, progress)


def check_no_overlap(recipe_data: DataSection) -> None:
    """Raises UserError when a held-out or test source reads a file, through whatever link, or a dataset split that is
    trained on."""
    trained_files: dict[tuple[int, int], str] = {}
    trained_splits: dict[tuple[str | None, str | None, str], str] = {}
    for source in recipe_data.train:
        trained_files |= dict.fromkeys(file_identities(source), source.name)
        trained_splits[source.dataset, source.subset, source.split] = source.name
    for source in [*recipe_data.held_out, *recipe_data.test]:
        shared = [(path, trained_files[i]) for i, path in file_identities(source).items() if i in trained_files]
        if shared:
            path, name = shared[0]
            raise _overlap(source, f"file {path}", name)
        split = (source.dataset, source.subset, source.split)
        if source.dataset is not None and split in trained_splits:
            raise _overlap(source, f"split {source.split!r} of dataset {source.dataset}", trained_splits[split])


def _overlap(source: Source, what: str, trained: str) -> UserError:
    return UserError(
        f"held-out source {source.name!r} reads {what}, which train source {trained!r} trains on; "
        "evaluating on training data measures nothing: keep some documents in a file of their own"
    )


def _tokenize_all(
    recipe_data: DataSection,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    progress: Progress | None,
) -> list[TokenizedSource]:
    check_vocabulary(tokenizer, vocab_size)
    check_no_overlap(recipe_data)
    known = tokenizer_fingerprint(tokenizer)
    return [
        tokenize_source(
            source,
            tokenizer,
            vocab_size=vocab_size,
            cache_dir=recipe_data.cache_dir,
            tokenizer_fingerprint=known,
            progress=progress,
        )
        for source in sources
    ]
