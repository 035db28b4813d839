"""Rotary positions for caches that outlive the context: angles in fp64, and rotations by a difference of positions.

transformers multiplies position and frequency in fp32. That is off by 0.06 rad at a million tokens and by 0.24 at four
million, and differently for neighbouring tokens, so that even their relative positions are wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

# Their frequencies change with the length of the sequence: a key cannot be rotated once and kept.
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Whose RoPE is Llama's: all of a head, its first half turned with its second.
LLAMA_LIKE = ("llama", "llama_swiftkv", "mistral", "qwen2", "qwen3")


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on queries or keys [B, heads, T, C] with cos, sin [B or 1, T, C]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return states * cos + rotate_half(states) * sin


def rotation(inverse_frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., C] in fp64 (fp32 where the device has no fp64) of integer positions [...], absolute or not."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = positions[..., None].to(dtype) * inverse_frequencies.to(positions.device, dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@torch.no_grad()
def exact_position_embeddings(
    embedding: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, C] as `embedding` gives them for x [B, T, D], but from angles in fp64."""
    if embedding.rope_type in LENGTH_DEPENDENT:
        return embedding(x, position_ids)
    cos, sin = rotation(embedding.inv_freq, position_ids.to(x.device))
    return (cos * embedding.attention_scaling).to(x.dtype), (sin * embedding.attention_scaling).to(x.dtype)


def keep_frequencies(embedding: LlamaRotaryEmbedding) -> None:
    """Make its frequencies fp32 again, which `model.to(torch.bfloat16)` and the like round: by 0.1 rad at a thousand
    tokens, and not as those of a cache."""
    rounded = embedding.inv_freq
    if rounded.dtype.itemsize < 4:
        embedding.register_buffer(
            "inv_freq", LlamaRotaryEmbedding(embedding.config).inv_freq.to(rounded.device), persistent=False
        )


class ExactRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding with its angles in fp64, in the place of another one."""

    def __init__(self, present: LlamaRotaryEmbedding):
        super().__init__(present.config)
        self.inv_freq, self.attention_scaling = present.inv_freq, present.attention_scaling
        keep_frequencies(self)

    def _apply(self, fn: Any, recurse: bool = True) -> ExactRotaryEmbedding:
        super()._apply(fn, recurse)
        keep_frequencies(self)
        return self

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return exact_position_embeddings(self, x, position_ids)


def use_exact_positions(model: torch.nn.Module) -> None:
    """Give a base Llama model an `ExactRotaryEmbedding` in place of its own. SwiftKV models stay as they are.

    Streams longer than some hundred thousand tokens need it. Raises ValueError where there is none to replace.
    """
    decoder: Any = getattr(model, "model", model)
    if hasattr(decoder, "norm_swiftkv"):
        return  # its streams have exact angles by themselves
    present = getattr(decoder, "rotary_emb", None)
    if not isinstance(present, LlamaRotaryEmbedding) or present.rope_type in LENGTH_DEPENDENT:
        raise ValueError(f"{type(model).__name__} has no rotary embedding of fixed frequencies to replace")
    decoder.rotary_emb = ExactRotaryEmbedding(present)


def inverse_frequencies(config: Any, user: str) -> torch.Tensor:
    """RoPE's frequencies [C / 2] of a model, fp32 as it has them.

    Raises ValueError, naming `user`, where they depend on the length of the sequence, or are used in another way.
    """
    if config.model_type not in LLAMA_LIKE or config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{user} needs rotary positions as Llama has them, of whole heads; {config.model_type!r} models may have "
            "others"
        )
    kind = config.rope_parameters["rope_type"]
    if kind in LENGTH_DEPENDENT:
        raise ValueError(f"{user} needs rotary frequencies that do not depend on the length; rope_type is {kind!r}")
    return LlamaRotaryEmbedding(config).inv_freq
