"""Models and tokenizers from disk or a hub, checked: what transformers reports in passing is an error here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from swiftkv_train.errors import UserError

if TYPE_CHECKING:
    import torch

# transformers' annotations of `to`, `generate` and the tokenizers' calls reject right uses of them.
Model: TypeAlias = Any  # a causal language model of transformers
Tokenizer: TypeAlias = Any  # a fast tokenizer of transformers


def compute_device() -> torch.device:
    """What training and calibration run on here: a GPU, but not Apple's, which has no fp64; else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else found


def tell_deepspeed_of_cpu() -> None:
    """Before anything imports DeepSpeed, as transformers does to save a model: on CPU it would print a warning."""
    if compute_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def dtype_of(name: str) -> torch.dtype | str:
    import torch

    return name if name == "auto" else getattr(torch, name)


def load_model(
    path: str,
    *,
    dtype: str = "auto",
    attention: str | None = None,
    revision: str | None = None,
    families: tuple[str, ...] = ("llama", "llama_swiftkv"),
) -> Model:
    """The causal language model at `path` (directory or hub id), in eval mode.

    Raises:
        UserError: no such model, a family not in `families`, a damaged file, a tensor missing, unexpected or misshapen.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours would stand between them
    tell_deepspeed_of_cpu()
    config = load_config(path, revision=revision, families=families)
    check_weight_files(Path(path))
    arguments: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of odd tensors fills a screen; one line below says it
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype_of(dtype),
            revision=revision,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info, by name
            trust_remote_code=False,
            **arguments,
        )
    except Exception as error:
        raise UserError(f"model {path} cannot be loaded: {one_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problems := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ()):
            raise UserError(f"model {path}: {len(problems)} {kind.replace('_', ' ')}, the first is {problems[0]}")
    return model.eval()


def load_for_inference(path: str, **arguments: Any) -> Model:
    """`load_model`'s, on the GPU if there is one, on a CPU optimised for it: for inference alone."""
    import torch

    from swiftkv_models import optimize_for_cpu

    return optimize_for_cpu(load_model(path, **arguments).to("cuda" if torch.cuda.is_available() else "cpu"))


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
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"model {path}: config cannot be read: {one_line(error)}") from None
    if config.model_type not in families:
        raise UserError(f"model {path} is of family {config.model_type!r}; this command takes {' or '.join(families)}")
    return config


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


def check_weight_files(directory: Path) -> None:
    """Open every safetensors file of a local directory, so that a truncated one is named (UserError)."""
    if not directory.is_dir():
        return
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
    except (OSError, ValueError, KeyError, AttributeError):
        raise UserError(f"{index} is damaged; fetch or export the model again") from None
    files = [directory / name for name in names] or sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"model {directory} holds no safetensors weights; other formats are not read")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except FileNotFoundError:
            raise UserError(f"{file} is missing; fetch or export the model again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({one_line(error)}); fetch or export the model again") from None


def _check_present(path: str) -> None:
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"model {path} holds no config.json; it is not a model directory")
    elif directory.exists():
        raise UserError(f"model {path} is a file; give the directory that holds config.json and the weights")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1 or directory.parent.is_dir():
        # What can only be a local path is not looked up on a hub, whose error would mislead.
        raise UserError(f"model {path} does not exist; `swiftkv fetch` gets one")


def one_line(error: BaseException) -> str:
    """The part of a library's error message that fits in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if not line.endswith(":")), 0)  # "...:" is a heading
    return (" ".join(lines[: first + 1]) or type(error).__name__)[:300]
