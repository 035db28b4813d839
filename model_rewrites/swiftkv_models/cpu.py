"""A model made ready for inference on a CPU."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from swiftkv_kernels.backends import multiplies_natively
from swiftkv_models.attention import GROUPED
from swiftkv_models.packed import pack_linears
from swiftkv_models.segment_layer import knows_segments, plain_implementation, use_segment_attention

logger = logging.get_logger(__name__)


def optimize_for_cpu(model: Any) -> Any:
    """`model`, base or SwiftKV, its linear layers packed (`pack_linears`) and its sdpa attention `grouped_sdpa`.

    The same numbers but for rounding, for inference alone. A model on another device stays as it is. Warns of a dtype
    that this CPU is slow with.
    """
    if model.device.type == "cpu":
        if not multiplies_natively(model.dtype, "cpu"):
            name = str(model.dtype).removeprefix("torch.")
            logger.warning_once(
                f"the model computes in {name}, which this CPU multiplies several times slower than float32; "
                "load it with dtype float32 where there is memory for that"
            )
        pack_linears(model)
        streams = knows_segments(model.config)
        if plain_implementation(model.config) == "sdpa":
            model.set_attn_implementation(GROUPED)
            if streams:  # a cache has been made
                use_segment_attention(model.config)
    return model
