"""A Llama GGUF file as a transformers checkpoint: config, safetensors, tokenizer, chat template, generation config.

Three things differ between the two formats. GGUF names tensors after llama.cpp (`blk.0.attn_q.weight`); it may hold
them quantised; and for Llama its converter permutes the rows of q and k within each head, from the halves that
transformers rotates to the interleaved pairs that ggml rotates (llama.cpp `convert_hf_to_gguf.py`, `permute`).
Un-permuted and dequantised in fp32, the weights equal those of transformers' own GGUF loading bit for bit; that one
leaves a model that cannot be saved, and a slightly wrong tokenizer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkv_train.errors import UserError
from swiftkv_train.fetch.gguf_tokenizer import save_tokenizer
from swiftkv_train.fetch.local import check_model
from swiftkv_train.loading import one_line

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig

SHARD_SIZE = "4GB"
ROPE_FREQUENCIES = "rope_freqs.weight"
TOKEN_IDS = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "unknown", "padding")]
# llama.cpp's name of a tensor -> transformers'; in a layer both follow its prefix
OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(path: Path, to: Path, dtype: str = "bfloat16") -> None:
    """Write the model of the GGUF file at `path` into the existing directory `to`.

    `dtype` is the type the weights are stored in: "bfloat16", "float16" or "float32". Llama models are trained and
    distilled in bfloat16. A dequantised 4-bit value, scale x integer + minimum, has more bits than bfloat16's eight,
    but rounding moves it by at most 2^-9 of itself, where quantisation has already moved it by up to 1/30 of its
    block's range; bfloat16 therefore halves the file and loses nothing that was known. Ask for "float32" to keep
    the dequantised numbers exactly.

    Raises UserError when the file is not a Llama GGUF, or holds something that a LlamaForCausalLM cannot express.
    """
    reader = _open(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    try:
        config = llama_config(path, metadata, reader)
    except (ValueError, TypeError, ArithmeticError) as error:  # LlamaConfig's
        raise UserError(f"{path} describes no Llama model: {one_line(error)}") from None
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(to)
    _save_weights(path, reader, config, to, dtype)
    _generation_config(metadata).save_pretrained(to)
    save_tokenizer(path, metadata, to)
    check_model(to, origin=path)


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a whole GGUF file: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def llama_config(path: Path, metadata: dict[str, Any], reader: GGUFReader) -> LlamaConfig:
    """The LlamaConfig of a GGUF file's metadata. Raises UserError for what LlamaForCausalLM does not compute."""
    from transformers import LlamaConfig

    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: its architecture is {architecture!r}; only 'llama' can be converted")
    if metadata.get("llama.expert_count", 0):
        raise UserError(f"{path} is a mixture of experts; only dense Llama models can be converted")
    if metadata.get("llama.attention.sliding_window"):
        raise UserError(f"{path} has sliding-window attention, which LlamaForCausalLM does not compute")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{path} is one part of a split GGUF; merge the parts first (`llama-gguf-split --merge`)")

    def number(key: str, kind: Any = int, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
            raise UserError(f"{path}: llama.{key} is {value!r}; expected one {'' if kind is float else 'whole '}number")
        return value

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} holds no token_embd.weight: it is not a whole model")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", default=hidden // heads)
    kv_heads = number("attention.head_count_kv", default=heads)
    if heads % kv_heads:
        raise UserError(f"{path}: llama.attention.head_count_kv {kv_heads} does not divide the {heads} heads")
    if (layers := number("block_count")) > len(tensors):
        raise UserError(f"{path}: llama.block_count is {layers}; there are {len(tensors)} tensors")
    vocabulary = int(tensors["token_embd.weight"].shape[-1])
    for key in TOKEN_IDS:
        token = metadata.get(key)
        if token is not None and not (isinstance(token, int) and 0 <= token < vocabulary):
            raise UserError(f"{path}: {key} is {token!r}; expected a token id, 0 to {vocabulary - 1}")
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(f"llama.{key}", head_dim) != head_dim:
            raise UserError(f"{path}: llama.{key} differs from the head size {head_dim}; LlamaForCausalLM has one size")
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=_shortest(number("attention.layer_norm_rms_epsilon", float)),
        rope_parameters=_rope_parameters(path, metadata, head_dim, tensors.get(ROPE_FREQUENCIES), number),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _shortest(value: float) -> float:
    """The short decimal that a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _rope_parameters(
    path: Path, metadata: dict[str, Any], head_dim: int, frequencies: Any, number: Callable[..., Any]
) -> dict[str, Any]:
    theta = _shortest(number("rope.freq_base", float, 10000.0))
    kind = metadata.get("llama.rope.scaling.type", "none")
    if frequencies is not None:
        return _llama3_parameters(path, theta, head_dim, frequencies.data)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _shortest(number("rope.scaling.factor", float))}
    raise UserError(f"{path}: rope scaling {kind!r} is not known; known are none, linear and Llama-3's")


def _llama3_parameters(path: Path, theta: float, head_dim: int, divisors: np.ndarray) -> dict[str, Any]:
    """GGUF stores Llama-3's scaling as one divisor per frequency, not as the parameters it was computed from.

    Every released Llama 3.1, 3.2 and 3.3 has the same three of the four; the fourth, `factor`, is the largest divisor.
    """
    import numpy as np

    unknown = UserError(f"{path}: {ROPE_FREQUENCIES} is not the frequency scaling of a released Llama 3")
    if not 1 <= divisors.max() < math.inf:
        raise unknown
    factor, low, high, original = round(float(divisors.max())), 1.0, 4.0, 8192
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise unknown
    if factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _generation_config(metadata: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def transformers_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a tensor Llama does not have."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OUTSIDE_LAYERS:
        return f"{OUTSIDE_LAYERS[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in IN_A_LAYER:
        return f"model.layers.{parts[1]}.{IN_A_LAYER[parts[2]]}.{parts[3]}"
    return None


def _save_weights(path: Path, reader: GGUFReader, config: LlamaConfig, to: Path, dtype: str) -> None:
    """One shard at a time, so that memory holds a shard and not the model."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from swiftkv_train.progress import Reporter

    tensors = {}
    for tensor in reader.tensors:
        name = transformers_name(tensor.name)
        if name is not None:
            tensors[name] = tensor
        elif tensor.name != ROPE_FREQUENCIES:  # that one is in the config
            raise UserError(f"{path}: tensor {tensor.name} is not part of a Llama model")
    stored = getattr(torch, dtype)
    empty = {
        name: torch.empty(*(int(size) for size in reversed(tensor.shape)), dtype=stored, device="meta")
        for name, tensor in tensors.items()
    }
    plan = split_torch_state_dict_into_shards(
        empty, max_shard_size=SHARD_SIZE, filename_pattern="model{suffix}.safetensors"
    )
    total = sum(int(tensor.n_elements) for tensor in tensors.values())
    with Reporter().bar("dequantise", total, "weights") as advance:
        for filename, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                values = dequantised(path, tensors[name], config)
                shard[name] = torch.from_numpy(values).to(stored)
                advance(values.size)
            save_file(shard, to / filename, metadata={"format": "pt"})
            shutil.copymode(to / "config.json", to / filename)  # safetensors makes files that only their owner may read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def dequantised(path: Path, tensor: Any, config: LlamaConfig) -> np.ndarray:
    """A tensor's values in fp32, rows of q and k in transformers' order."""
    import numpy as np
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name} has quantisation {tensor.tensor_type.name}, which gguf cannot read"
        ) from None
    values = np.array(values, dtype=np.float32)  # a copy: the file is mapped read-only
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {tensor.name} holds nan or infinity; the file is damaged")
    heads: dict[str, Any] = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for part, count in heads.items():
        if part in tensor.name:
            if len(values) % (2 * count):
                raise UserError(f"{path}: {tensor.name} has {len(values)} rows, which {count} heads do not share")
            pairs = values.reshape((count, -1, 2, *values.shape[1:]))
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    return values
