"""SwiftKV forms of transformers models: configuration, model classes and the conversion of base weights.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` know the new model types, and transformers the
attention implementation `packed_causal`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from swiftkv_models.attention import PACKED_CAUSAL, register
from swiftkv_models.llama import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM, LlamaSwiftKVModel
from swiftkv_models.packed import PackedLinear, pack_linears
from swiftkv_models.rewrite import FAMILIES, RewriteError, rewrite
from swiftkv_models.rope import use_exact_positions
from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_models.shared_prefix import SharedPrefix

register()
AutoConfig.register("llama_swiftkv", LlamaSwiftKVConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM, exist_ok=True)

__all__ = [
    "FAMILIES",
    "PACKED_CAUSAL",
    "LlamaSwiftKVConfig",
    "LlamaSwiftKVForCausalLM",
    "LlamaSwiftKVModel",
    "PackedLinear",
    "RewriteError",
    "SharedPrefix",
    "SinkWindowCache",
    "pack_linears",
    "rewrite",
    "use_exact_positions",
]
