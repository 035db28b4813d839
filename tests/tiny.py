"""Small random Llama models in the shapes of the real families."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> what differs from the common small shape
FAMILIES: dict[str, dict] = {
    "llama2": {"num_key_value_heads": 4},
    "llama3.1": {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "llama3.2": {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "smollm2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "bias": {"num_key_value_heads": 2, "attention_bias": True},
    "wide-heads": {"num_key_value_heads": 2, "head_dim": 16},
}


def tiny_llama(family: str = "smollm2", *, layers: int = 6, seed: int = 0, dtype=torch.float64, **changes):
    """A base model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            **FAMILIES[family],
            **changes,
        }
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # these start at constants, which hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def randomise_tail(model, seed: int = 1):
    """Give every `*_swiftkv` tensor values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_swiftkv" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
                parameter.add_(0.1 * noise)
    return model


def random_ids(*shape: int, vocabulary: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
