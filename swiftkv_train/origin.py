"""What a run was made from, so that one that is resumed does not go on from something else unnoticed.

Checkpoints hold the keys of the recipe and fingerprints of the base and of every source's tokens. Where files lie may
change, what they hold may not; nor may any key of the recipe but those in `MAY_CHANGE`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkv_train.checksum import sha256_of_each
from swiftkv_train.data.mixture import STREAM_VERSION
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import ModelSection, Recipe

if TYPE_CHECKING:
    from swiftkv_train.data import TokenizedSource, TrainingData

# Keys that change no figure but in its rounding, and places whose content is compared instead.
MAY_CHANGE = (
    "data.cache_dir",
    "data.*.path",
    "data.test.*",
    "distributed.*",
    "logging.*",
    "model.base",
    "model.revision",
    "training.checkpoint_every",
    "training.evaluate_every",
    "training.keep_last",
    "training.log_every",
    "training.max_loss_ratio",
    "training.output_dir",
)
MOST_NAMED = 6  # changes that an error lists
OF_THE_BASE = " of the base"  # ends the names of its files


def recipe_origin(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide its figures, by dotted name."""
    keys = _leaves(recipe.model_dump(mode="json"))
    return {key: value for key, value in keys.items() if not any(fnmatchcase(key, free) for free in MAY_CHANGE)}


def content_origin(model: ModelSection, data: TrainingData, held_out: list[TokenizedSource]) -> dict[str, Any]:
    """Fingerprints of what a recipe's paths hold, by what an error calls it: the base, once loaded, and the sources."""
    return {
        **base_origin(model),
        **{f"train source {packed.source.name!r}": packed.source.fingerprint for packed in data.packed},
        **{f"held-out source {source.name!r}": source.fingerprint for source in held_out},
        "this program's packing of sequences": STREAM_VERSION,
    }


def base_origin(model: ModelSection) -> dict[str, Any]:
    """The base's part of it: the SHA-256 of each of its files."""
    return {f"{name}{OF_THE_BASE}": digest for name, digest in _digests_of_model(model).items()}


def recipe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two `recipe_origin`s, a line each."""
    return [f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in _differing(before, now)]


def content_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which files or sources differ between two `content_origin`s, a line each."""
    return [f"{name} changed" for name in _differing(before, now)]


def base_changes(before: dict[str, Any], model: ModelSection) -> list[str]:
    """What of the base, once loaded, is not what the content `before` was made from."""
    files = {name: digest for name, digest in before.items() if name.endswith(OF_THE_BASE)}
    return content_changes(files, base_origin(model))


def adapter_changes(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """How adapters are no longer merged as they were trained under the keys `before`."""
    kept, now = (
        {key: value for key, value in keys.items() if key.startswith("training.lora")}
        for keys in (before, recipe_origin(recipe))
    )
    return recipe_changes(kept, now)


def refuse(checkpoint: Path, changes: list[str]) -> UserError:
    return UserError(
        f"{checkpoint} cannot be resumed: {listed(changes)}; restore that, choose another training.output_dir, "
        "or go on all the same with --allow-changed"
    )


def listed(changes: list[str]) -> str:
    more = f"; and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
    return "; ".join(changes[:MOST_NAMED]) + more


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _digests_of_model(model: ModelSection) -> dict[str, str]:
    directory = Path(model.base)
    if not directory.is_dir():
        from transformers.utils import cached_file

        config = cached_file(model.base, "config.json", revision=model.revision)
        assert config is not None  # it has been loaded
        directory = Path(config).parent
    return sha256_of_each([directory / "config.json", *directory.glob("*.safetensors")], directory)


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = {str(index): item for index, item in enumerate(value)}.items()
    else:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, item in items for key, leaf in _leaves(item, f"{prefix}{name}.").items()}
