"""A model made ready for inference on a CPU."""

from __future__ import annotations

from typing import Any

from swiftkv_models.attention import GROUPED
from swiftkv_models.packed import pack_linears
from swiftkv_models.segment_layer import knows_segments, plain_implementation, use_segment_attention


def optimize_for_cpu(model: Any) -> Any:
    """`model`, base or SwiftKV, its linear layers packed (`pack_linears`) and its sdpa attention `grouped_sdpa`.

    The same numbers but for rounding, for inference alone. A model on another device stays as it is.
    """
    if model.device.type == "cpu":
        pack_linears(model)
        streams = knows_segments(model.config)
        if plain_implementation(model.config) == "sdpa":
            model.set_attn_implementation(GROUPED)
            if streams:  # a cache has been made
                use_segment_attention(model.config)
    return model
