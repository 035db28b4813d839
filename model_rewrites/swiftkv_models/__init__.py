"""SwiftKV forms of transformers models: configuration, model classes and the conversion of base weights.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` know the new model types, and transformers the
attention implementations `packed_causal` and `grouped_sdpa`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from swiftkv_models.attention import GROUPED, PACKED_CAUSAL, SDPA
from swiftkv_models.cpu import optimize_for_cpu
from swiftkv_models.llama import LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM, LlamaSwiftKVModel
from swiftkv_models.packed import PackedLinear, num_parameters, pack_linears
from swiftkv_models.rewrite import FAMILIES, RewriteError, rewrite
from swiftkv_models.rope import use_exact_positions
from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_models.shared_prefix import SharedPrefix

AutoConfig.register("llama_swiftkv", LlamaSwiftKVConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaSwiftKVConfig, LlamaSwiftKVForCausalLM, exist_ok=True)

__all__ = [
    "FAMILIES",
    "GROUPED",
    "PACKED_CAUSAL",
    "SDPA",
    "LlamaSwiftKVConfig",
    "LlamaSwiftKVForCausalLM",
    "LlamaSwiftKVModel",
    "PackedLinear",
    "RewriteError",
    "SharedPrefix",
    "SinkWindowCache",
    "num_parameters",
    "optimize_for_cpu",
    "pack_linears",
    "rewrite",
    "use_exact_positions",
]
