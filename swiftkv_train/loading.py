"""Models and tokenizers from disk or a hub, checked: what transformers reports in passing is an error here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from swiftkv_train.errors import UserError
from swiftkv_train.generation_settings import check_settings, kept_settings, unused_settings

if TYPE_CHECKING:
    import torch

    from swiftkv_train.recipe import Recipe

# transformers' annotations of `to`, `generate` and the tokenizers' calls reject right uses of them.
Model: TypeAlias = Any  # a causal language model of transformers
Tokenizer: TypeAlias = Any  # a fast tokenizer of transformers
DTYPES = ("auto", "float32", "bfloat16", "float16")


def compute_device() -> torch.device:
    """What training and calibration run on here: a GPU, but not Apple's, which has no fp64; else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else found


def tell_deepspeed_of_cpu() -> None:
    """Before anything imports DeepSpeed, as transformers does to save a model: on CPU it would print a warning."""
    if compute_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def compute_dtype(name: str, device: torch.device | str | None = None) -> torch.dtype:
    """What a recipe's `model.dtype` is on `device`, `compute_device()` by default.

    'auto' is bfloat16 where the device multiplies that natively, else float32.
    """
    import torch

    from swiftkv_kernels.backends import multiplies_natively

    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if multiplies_natively(torch.bfloat16, device or compute_device()) else torch.float32


def describe_dtype(name: str, dtype: torch.dtype) -> str:
    """A recipe's `model.dtype`, which is `dtype` here, in a line: what a user would want to change."""
    import torch

    from swiftkv_kernels.backends import multiplies_natively

    found, device = str(dtype).removeprefix("torch."), compute_device()
    if not multiplies_natively(dtype, device):
        return f"{found}, which this {device.type.upper()} multiplies several times slower than float32"
    missing = name == "auto" and dtype == torch.float32
    return found + f" (this {device.type.upper()} has no bfloat16 products)" * missing


def load_model(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    revision: str | None = None,
    families: tuple[str, ...] = ("llama", "llama_swiftkv"),
) -> Model:
    """The causal language model at `path` (directory or hub id), in eval mode; `dtype` 'auto': as it is stored.

    Raises:
        UserError: no such model, a family not in `families`, a damaged file, a tensor missing, unexpected or misshapen
            or with values that are no numbers, settings for generation that make no sense.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours would stand between them
    tell_deepspeed_of_cpu()
    config = load_config(path, revision=revision, families=families)
    generation_settings(path, config.vocab_size, revision=revision)
    tensors = check_weight_files(Path(path))
    if tensors is not None and tensors < config.num_hidden_layers:  # which would take long to find out below
        raise UserError(
            f"model {path}: config.json says {config.num_hidden_layers} layers; there are {tensors} tensors"
        )
    arguments: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    try:
        with _quiet():  # its report of odd tensors fills a screen; one line below says it
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                revision=revision,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the loading info, by name
                trust_remote_code=False,
                **arguments,
            )
    except Exception as error:
        raise UserError(f"model {path} cannot be loaded: {one_line(error)}") from None
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problems := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ()):
            raise UserError(f"model {path}: {len(problems)} {kind.replace('_', ' ')}, the first is {problems[0]}")
    check_finite(model, path)
    return model.eval()


def load_for_inference(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    optimized: bool = True,
    **arguments: Any,
) -> Model:
    """`load_model`'s, on the GPU if there is one, on a CPU `optimized` for it: for inference alone.

    With dtype 'auto' a model stored in 16 bits is `in_native_dtype`. Of its settings for generation only those are left
    that answers are sampled with here.
    """
    import torch

    from swiftkv_models import optimize_for_cpu

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, dtype=dtype, revision=revision, **arguments)
    if dtype == "auto":
        in_native_dtype(model, device)
    model.generation_config = kept_settings(model.generation_config)
    if unused := unused_settings(generation_settings(path, model.config.vocab_size, revision=revision)):
        print(f"note: of {path}'s generation_config.json is not used: {', '.join(unused)}", file=sys.stderr)
    model.to(device)
    return optimize_for_cpu(model) if optimized else model


def in_native_dtype(model: Model, device: torch.device) -> Model:
    """A model stored in 16 bits made float32, in place, where `device` has no such products and there is room."""
    from swiftkv_kernels.backends import multiplies_natively

    if not multiplies_natively(model.dtype, device) and _room_for_float32(model, device):
        model.float()
    return model


def _room_for_float32(model: Model, device: torch.device) -> bool:
    """Whether a 16-bit model, still in the CPU's memory, would take at most 3/4 of what is free as fp32 on `device`."""
    import psutil
    import torch

    size = sum(parameter.nbytes for parameter in model.parameters())
    if device.type == "cuda":
        return 2 * size < 0.75 * torch.cuda.mem_get_info(device)[0]
    return size < 0.75 * psutil.virtual_memory().available


def check_finite(model: Model, path: str) -> None:
    """Raises UserError, naming the tensor, when a weight is nan or infinite: such a model says nothing, or nonsense."""
    import torch

    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta:
            extremes = torch.stack(torch.aminmax(tensor.detach()))  # which nan is passed on by; the fastest there is
            if not extremes.isfinite().all():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"model {path}: {name} holds nan or infinity (as {kind}); fetch or export it again")


def generation_settings(path: str, vocab_size: int, *, revision: str | None = None) -> dict[str, Any]:
    """What the generation_config.json of the model at `path` says; nothing where there is none.

    Raises:
        UserError: it is damaged, or holds a value that makes no sense.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    file: Path | None = Path(path) / "generation_config.json"
    if not Path(path).is_dir():
        try:
            found = cached_file(path, "generation_config.json", revision=revision)
        except OSError:  # it has none, or the hub is out of reach, which is said where the weights are asked for
            found = None
        file = Path(found) if found else None
    if file is None or not os.path.lexists(file):
        return {}
    settings = read_json(file)
    check_settings(settings, vocab_size, file)
    try:
        with _quiet():
            GenerationConfig(**settings)
    except Exception as error:  # which loading the model would end with, without naming the file
        raise UserError(f"{file}: {one_line(error)}") from None
    return settings


def read_json(file: Path) -> dict[str, Any]:
    """A model's JSON file. Raises UserError, naming it, when it cannot be read or holds no mapping."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {one_line(error)}; fetch or export the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no keys; fetch or export the model again")
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings, which would stand around our one line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_config(
    path: str, *, revision: str | None = None, families: tuple[str, ...] = ("llama", "llama_swiftkv")
) -> Any:
    """The configuration of the model at `path` (directory or hub id).

    Raises:
        UserError: no such model, or a family not in `families`.
    """
    from transformers import AutoConfig

    import swiftkv_models  # noqa: F401  (registers its model types)

    _check_present(path)
    if Path(path).is_dir():
        if revision is not None:
            raise UserError(f"model {path} is a directory, which has no revision {revision}; that goes with a hub id")
        read_json(Path(path) / "config.json")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"model {path}: config cannot be read: {one_line(error)}") from None
    if config.model_type not in families:
        raise UserError(f"model {path} is of family {config.model_type!r}; this command takes {' or '.join(families)}")
    return config


def check_context(recipe: Recipe, config: Any) -> None:
    """Raises UserError where a recipe's sequences are longer than the context of its base, whose `config` this is."""
    length, context = recipe.data.sequence_length, config.max_position_embeddings
    if length > context:
        raise UserError(f"data.sequence_length {length} is longer than the context of {recipe.model.base}, {context}")


def load_tokenizer(path: str, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer beside the model at `path`. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    import swiftkv_models  # noqa: F401  (AutoTokenizer reads the config too)

    _check_present(path)
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"model {path}: tokenizer cannot be read: {one_line(error)}") from None


def pad_token_id(tokenizer: Tokenizer) -> int:
    """The id that fills up a batch: the tokenizer's own, or the end token where it names none."""
    own = tokenizer.pad_token_id
    return own if own is not None else tokenizer.eos_token_id or 0


def check_weight_files(directory: Path) -> int | None:
    """Open every safetensors file of a local directory: the number of tensors in them, None where it is no directory.

    Raises:
        UserError: a file is missing, cannot be read, or is damaged.
    """
    if not directory.is_dir():
        return None
    from safetensors import SafetensorError, safe_open

    index, tensors = directory / "model.safetensors.index.json", 0
    files = [directory / name for name in sorted(set(weight_map(index).values()))]
    files = files or sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"model {directory} holds no safetensors weights; other formats are not read")
    for file in files:
        try:
            with file.open("rb"), safe_open(file, framework="pt") as opened:
                tensors += len(opened.keys())
        except FileNotFoundError:
            raise UserError(f"{file} is missing; fetch or export the model again") from None
        except PermissionError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is damaged ({one_line(error)}); fetch or export the model again") from None
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the safetensors index `index`; empty where there is no index. Raises UserError."""
    if not os.path.lexists(index):
        return {}
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index} is damaged, its weight_map names no files beside it; fetch or export the model again")
    if outside := [name for name in named.values() if Path(name).name != name]:
        raise UserError(f"{index} points outside its directory: {outside[0]}")
    return named


def _check_present(path: str) -> None:
    directory = Path(path)
    try:
        if directory.is_dir():
            if not (directory / "config.json").is_file():
                raise UserError(f"model {path} holds no config.json; it is not a model directory")
        elif directory.exists():
            raise UserError(f"model {path} is a file; give the directory that holds config.json and the weights")
        elif path.startswith((".", "/", "~")) or path.count("/") != 1 or directory.parent.is_dir():
            # What can only be a local path is not looked up on a hub, whose error would mislead.
            raise UserError(f"model {path} does not exist; `swiftkv fetch` gets one")
    except OSError as error:
        raise UserError(f"model {path} cannot be read: {error.strerror}") from None


def one_line(error: BaseException) -> str:
    """The part of a library's error message that fits in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if not line.endswith(":")), 0)  # "...:" is a heading
    return (" ".join(lines[: first + 1]) or type(error).__name__)[:300]
