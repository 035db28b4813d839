"""How much arithmetic a distillation step needs, and how much a GPU can do: together its MFU.

Model FLOPs (PaLM, arXiv 2204.02311, appendix B): matrix products only, 2 FLOPs per multiply-add, what recomputing,
padding and masked attention add left out. A SwiftKV step needs

    trunk           forward of layers 0 .. l-1
    base's tail     forward of layers l .. L-1
    student's tail  forward, and backward: the gradient of every product's input but that of layer l's queries, which
                    is the trunk's, and the gradient of the trained q, k and v weights, or LoRA's, only
    head            on tokens with loss: base's logits, student's logits, and the gradient of the student's state

D hidden size, I width of the MLP, H query heads, G K/V heads, C head size, V vocabulary; a causal *pair* is one query
with one key that it attends to.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from swiftkv_models import LlamaSwiftKVConfig

# Dense bf16 peaks with fp32 accumulation in FLOP/s, without sparsity, by the name that CUDA gives the device.
# NVIDIA's datasheets of A100, H100, H200 (half of their figures "with sparsity"), L40S and HGX B200 (per GPU); the
# Ada (appendix A) and GA102 (table 2) whitepapers.
PEAK_FLOPS = {
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312e12,
    r"H100 80GB HBM3|H200": 989e12,
    r"H100 NVL|H200 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"B200": 2250e12,
    r"L40S": 362e12,
    r"GeForce RTX 4090": 165.2e12,
    r"GeForce RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by CUDA's name of it; None where it is not known (or is a MIG slice)."""
    name = device_name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """`peak_flops` of a device for a compute dtype; None for float32, whose products are another matter."""
    import torch

    if device.type != "cuda" or dtype == torch.float32:
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def causal_pairs(length: int) -> int:
    """Pairs of one document of `length` tokens."""
    return length * (length + 1) // 2


def distillation_flops(
    config: LlamaSwiftKVConfig, *, tokens: int, pairs: int, loss_tokens: int, lora_rank: int = 0
) -> int:
    """Model FLOPs of one step over `tokens` tokens in documents of together `pairs` pairs; `lora_rank` 0: no LoRA."""
    trunk, tail = config.num_key_value_layers, config.num_hidden_layers - config.num_key_value_layers
    leaders = config.num_cached_layers - trunk
    head_dim, groups = cast(int, config.head_dim), cast(int, config.num_key_value_heads)  # set by the config itself
    heads = config.num_attention_heads * head_dim
    query = config.hidden_size * heads
    key_value = 2 * config.hidden_size * groups * head_dim
    rest = query + 3 * config.hidden_size * config.intermediate_size  # o_proj is as large as q_proj

    # Multiply-adds per token.
    frozen = (trunk + tail) * (query + key_value + rest)  # trunk and base's tail
    projections = tail * query + leaders * key_value
    student = projections + tail * rest
    inputs = student - query
    weights = projections
    if lora_rank:
        up = lora_rank * (tail * heads + 2 * leaders * groups * head_dim)
        down = lora_rank * config.hidden_size * (tail + 2 * leaders)
        student += down + up
        # norm_swiftkv is frozen then: nothing in front of k and v, or of layer l's q, wants a gradient.
        inputs += up + lora_rank * config.hidden_size * (tail - 1) - leaders * key_value
        weights = down + up
    per_token = frozen + student + inputs + weights
    per_pair = 2 * heads * (trunk + 4 * tail)  # q k' and p v; twice as much in the backward
    per_loss_token = 3 * config.hidden_size * config.vocab_size
    return 2 * (tokens * per_token + pairs * per_pair + loss_tokens * per_loss_token)
