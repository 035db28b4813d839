"""From a recipe's `data` section to what training and evaluation read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swiftkv_train.data.cache import TokenizedSource, tokenize_source
from swiftkv_train.data.identity import identify
from swiftkv_train.data.mixture import TrainingData
from swiftkv_train.data.tokenize import check_vocabulary, tokenizer_fingerprint
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import DataSection, ModelSection, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swiftkv_train.progress import Reporter


def load_training_data(
    recipe_data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    pad_token_id: int,
    *,
    base: ModelSection | None = None,
    report: Reporter | None = None,
) -> TrainingData:
    """The stream a recipe trains on. Raises UserError: see `tokenize_source`, `check_no_overlap` and `TrainingData`."""
    sources = load_sources(recipe_data.train, recipe_data, tokenizer, vocab_size, base=base, report=report)
    weights = [source.weight for source in recipe_data.train]
    return TrainingData(sources, weights, recipe_data.sequence_length, recipe_data.seed, pad_token_id)


def load_held_out(
    recipe_data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    base: ModelSection | None = None,
    report: Reporter | None = None,
) -> list[TokenizedSource]:
    """The sources a recipe evaluates on, in its order. Raises UserError: see `tokenize_source`, `check_no_overlap`."""
    return load_sources(recipe_data.held_out, recipe_data, tokenizer, vocab_size, base=base, report=report)


def load_sources(
    sources: Sequence[Source],
    recipe_data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    base: ModelSection | None = None,
    report: Reporter | None = None,
) -> list[TokenizedSource]:
    """Some sources of a recipe, tokenised. Raises UserError: see `tokenize_source`, `check_no_overlap`."""
    check_vocabulary(tokenizer, vocab_size)
    check_no_overlap(recipe_data)
    known = tokenizer_fingerprint(tokenizer)
    return [
        tokenize_source(
            source,
            tokenizer,
            vocab_size=vocab_size,
            cache_dir=recipe_data.cache_dir,
            base=base,
            tokenizer_fingerprint=known,
            report=report,
        )
        for source in sources
    ]


def check_no_overlap(recipe_data: DataSection) -> None:
    """Raises UserError when a held-out or test source reads a file of the content of one that is trained on, a dataset
    split that is, or what a base says with the settings that it is trained with."""
    trained: dict[Any, str] = {}
    for source in recipe_data.train:
        trained |= dict.fromkeys(_parts(source, recipe_data.cache_dir), source.name)
    for source in [*recipe_data.held_out, *recipe_data.test]:
        for part, what in _parts(source, recipe_data.cache_dir).items():
            if part in trained:
                own = "give it another seed" if source.generate else "keep some documents in a file of their own"
                raise UserError(
                    f"held-out source {source.name!r} reads {what}, which train source {trained[part]!r} trains on; "
                    f"evaluating on training data measures nothing: {own}"
                )


def _parts(source: Source, cache_dir: str) -> dict[Any, str]:
    """What a source reads, by what no other source may read, and in words."""
    if source.generate is not None:
        settings = source.generate.model_dump(exclude={"conversations"})
        what = f"what the base says with seed {source.generate.seed}"
        return {tuple(settings.items()): what}
    if source.dataset is not None:
        return {(source.dataset, source.subset, source.split): f"split {source.split!r} of dataset {source.dataset}"}
    return {file.sha256: f"file {file.path}" for file in identify(source, cache_dir).files if file.size}
