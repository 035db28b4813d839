"""`swiftkv prepare`: everything a run does to its text, done beforehand where no GPU waits for it.

A later `swiftkv distill` with the same recipe and cache reads no text: neither where the files are unchanged, nor on
another machine that has the cache directory and not the text.
"""

from __future__ import annotations

from typing import Any

from swiftkv_train.data.load import load_held_out, load_sources, load_training_data
from swiftkv_train.loading import check_context, load_config, load_tokenizer, pad_token_id
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import Recipe


def prepare(recipe: Recipe, *, quiet: bool = False) -> dict[str, Any]:
    """Generate and tokenise every source of a recipe into its cache. The base's weights are read only to generate.

    Returns:
        Where the cache is and one row per train, held-out and test source.

    Raises:
        UserError, RunError: see `tokenize_source`, `check_no_overlap` and `TrainingData`.
    """
    report, data, model = Reporter(enabled=not quiet), recipe.data, recipe.model
    config = load_config(model.base, revision=model.revision, families=("llama",))
    check_context(recipe, config)
    vocab_size = config.vocab_size
    tokenizer = load_tokenizer(model.base, revision=model.revision)
    pad = pad_token_id(tokenizer)
    training = load_training_data(data, tokenizer, vocab_size, pad, base=model, report=report)
    held_out = load_held_out(data, tokenizer, vocab_size, base=model, report=report)
    test = load_sources(data.test, data, tokenizer, vocab_size, base=model, report=report)
    report.data(training.describe())
    report.line(f"cached      {data.cache_dir}")
    return {
        "cache_dir": data.cache_dir,
        "train": training.describe(),
        "held_out": [source.describe() for source in held_out],
        "test": [source.describe() for source in test],
    }
