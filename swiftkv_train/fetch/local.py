"""Check a model directory: a known family, every weight there with the right name and shape, a tokenizer that fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from swiftkv_train.data.tokenize import check_vocabulary
from swiftkv_train.errors import UserError
from swiftkv_train.loading import generation_settings, load_tokenizer, one_line, read_json, weight_map

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


def check_model(directory: Path, origin: Path | None = None) -> list[str]:
    """The names of the files that make up the model in `directory`, weights first.

    Every shard is opened, so a truncated one is found, and the tensors' names and shapes are compared with those of
    the model that config.json describes. The tokenizer is loaded. Raises UserError with the first thing that is wrong,
    there or, where `directory` was made of it, in `origin`.
    """
    try:
        return _checked(directory)
    except UserError as error:
        raise UserError(str(error).replace(str(directory), str(origin or directory))) from None


def _checked(directory: Path) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(directory)
    shards = _shards(directory)
    found: dict[str, tuple[int, ...]] = {}
    for filename, listed in shards.items():
        shapes = _shapes(directory / filename)
        if absent := sorted(set(listed or shapes) - shapes.keys()):
            raise UserError(f"{directory / filename} lacks {absent[0]}, which {INDEX} places in it")
        found |= shapes
    if config.num_hidden_layers > len(found):  # which would take long to find out below
        raise UserError(
            f"{directory}: config.json says {config.num_hidden_layers} layers; there are {len(found)} weights"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # what torch makes of sizes that are none
        raise UserError(f"{directory / 'config.json'} describes no model: {one_line(error)}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - found.keys() - optional):
        raise UserError(f"{directory} lacks {len(missing)} weights of the model, among them {missing[0]}")
    unknown = [name for name in sorted(found.keys() - expected.keys()) if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise UserError(
            f"{directory} holds {len(unknown)} weights that the model does not have, among them {unknown[0]}"
        )
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            raise UserError(f"{directory}: {name} has shape {found[name]}, config.json says {expected[name]}")
    companions = [name for name in COMPANIONS if os.path.lexists(directory / name)]
    for name in companions:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is not a file, or a link to nothing; put it in order, or remove it")
    if not any(name in companions for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{directory} has no tokenizer.json; put the tokenizer's files beside the weights")
    tokenizer = load_tokenizer(str(directory))
    check_vocabulary(tokenizer, config.vocab_size, str(directory))
    _check_template(tokenizer, directory)
    generation_settings(str(directory), config.vocab_size)
    return [*shards, *([INDEX] if (directory / INDEX).is_file() else []), *companions]


def _check_template(tokenizer: Any, directory: Path) -> None:
    """Raises UserError where there is a chat template that no conversation could be put into."""
    from jinja2 import TemplateSyntaxError

    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "0"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{directory}: line {error.lineno} of its chat template is no template: {one_line(error)}"
        ) from None
    except Exception:  # one that refuses this conversation may take others
        pass


def copy_model(directory: Path, names: list[str], to: Path) -> None:
    """Put the files `names` (see check_model) of `directory` into `to`.

    Weights are hard links where the file system allows it: they are large and nothing writes into them. Files that a
    user may edit are copied.
    """
    for name in names:
        source = (directory / name).resolve()  # the hub's cache is made of links
        if name.endswith(".safetensors"):
            try:
                os.link(source, to / name)
                continue
            except OSError:
                pass
        shutil.copyfile(source, to / name)


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    from swiftkv_models import FAMILIES

    raw = read_json(directory / "config.json")
    model_type = str(raw.get("model_type"))
    if model_type.endswith("_swiftkv"):
        raise UserError(f"{directory} is already in SwiftKV form ({model_type}); fetch the base model it was made from")
    if model_type not in FAMILIES:
        raise UserError(f"{directory}: model_type is {model_type!r}; known families: {', '.join(FAMILIES)}")
    if "quantization_config" in raw:
        raise UserError(f"{directory} holds quantised weights; fetch the unquantised model")
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # config classes raise their own types for a field that is out of range
        raise UserError(f"{directory / 'config.json'}: {one_line(error)}") from None


def _shards(directory: Path) -> dict[str, list[str]]:
    """Shard -> the tensors that the index places in it; one shard with no such list where there is no index."""
    shards: dict[str, list[str]] = {}
    for name, filename in weight_map(directory / INDEX).items():
        shards.setdefault(filename, []).append(name)
    shards = shards or {SINGLE: []}
    for filename in shards:
        if not (directory / filename).is_file():
            raise UserError(f"{directory} has no {filename}; only safetensors weights are read")
    return shards


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb"), safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None
