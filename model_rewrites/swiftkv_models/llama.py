"""Llama in SwiftKV form (arXiv 2410.03960), as its difference from transformers' Llama.

With L layers, l = `num_key_value_layers` and g = `key_value_group_size`:

- layers below l, the *trunk*, are the base model's;
- the residual stream that enters layer l goes through one RMSNorm, `norm_swiftkv`, and every K and V of the layers from
  l on, the *tail*, is a projection of that one tensor (SingleInputKV). So the K/V of a prompt token needs the trunk
  only, and the tail runs for just the positions whose logits are wanted (`logits_to_keep`);
- g neighbouring tail layers share the K/V of the first of them, their *leader* (AcrossKV). The cache holds one K/V per
  leader: (l + ceil((L - l) / g)) / L of the base's bytes. `key_value_groups` lists groups of any size in place of g.

With `base_projections` the tail keeps the base's own q/k/v_proj as well, and the same module is also the base model:
`run_tail(..., base=True)`. That is how it is distilled; exported checkpoints drop them.

Shapes: B batch, T new tokens, S cached + new tokens, K kept positions (a suffix of T), D hidden size, H query heads,
G K/V heads, C head size.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from swiftkv_models.attention import SDPA
from swiftkv_models.cpu import optimize_for_cpu
from swiftkv_models.rope import exact_position_embeddings, keep_frequencies, rotate
from swiftkv_models.segment_cache import SinkWindowCache
from swiftkv_models.segment_layer import KeyValues, plain_implementation
from swiftkv_models.shared_prefix import SharedPrefix
from swiftkv_models.tail_projection import TailProjection


@strict
class LlamaSwiftKVConfig(LlamaConfig):
    """Llama's configuration with the layers of SwiftKV.

    Raises huggingface_hub's StrictDataclassClassValidationError, with a ValueError as its cause, when they are out of
    range.
    """

    model_type = "llama_swiftkv"

    if TYPE_CHECKING:
        num_key_value_layers: int = 0
    else:
        num_key_value_layers: int | None = None  # l; left out: all layers, the base model itself
    key_value_group_size: int = 1  # g
    key_value_groups: list[list[int]] | None = None  # the tail's layers, in groups of any size, in place of g
    swiftkv: bool = True
    base_projections: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_layers is None:
            self.num_key_value_layers = self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        super().validate_architecture()
        first, last = self.num_key_value_layers, self.num_hidden_layers
        if not 1 <= first <= last:
            raise ValueError(f"num_key_value_layers is {first}; this model allows 1 to {last}")
        largest = max(1, last - first)
        if not 1 <= self.key_value_group_size <= largest:
            raise ValueError(f"key_value_group_size is {self.key_value_group_size}; this model allows 1 to {largest}")
        groups = self.key_value_groups
        if groups is None:
            return
        if self.key_value_group_size != 1:
            raise ValueError("key_value_groups and key_value_group_size do not go together; give one of them")
        if not all(groups) or [layer for group in groups for layer in group] != list(range(first, last)):
            raise ValueError(
                f"key_value_groups must be lists of neighbouring layers, all of {first} to {last - 1} in their order, "
                f"like [[{first}], [{first + 1}, ...], ...]"
            )

    @property
    def tail_groups(self) -> list[list[int]]:
        """The tail's layers in the groups that share K/V."""
        if self.key_value_groups is not None:
            return self.key_value_groups
        return uniform_groups(self.num_key_value_layers, self.num_hidden_layers, self.key_value_group_size)

    @property
    def num_cached_layers(self) -> int:
        """Number of K/V tensors a cache holds: l, and one of every group."""
        return self.num_key_value_layers + len(self.tail_groups)

    # How transformers' caches learn that trailing entries store nothing: up to 5.17 the first form, then the second.
    @property
    def num_kv_shared_layers(self) -> int:
        return self.num_hidden_layers - self.num_cached_layers

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        return [None if index < self.num_cached_layers else "reuse" for index in range(self.num_hidden_layers)]


def uniform_groups(first: int, last: int, size: int) -> list[list[int]]:
    """Layers `first` to `last` - 1 in groups of `size`."""
    return [list(range(leader, min(leader + size, last))) for leader in range(first, last, size)]


class SharedKeyValues:
    """K and V [B, G, S, C] of every leader, by layer. An object and no dict, so that device hooks pass it on uncopied.

    All groups are kept: with activation checkpointing the members of an early group run again after the late ones.
    """

    def __init__(self) -> None:
        self.by_leader: dict[int, tuple[Any, Any]] = {}  # K, V; with a SinkWindowCache twice its KeyValues
        self.complete = False  # whether all are there before the first layer runs


class LlamaSwiftKVAttention(LlamaAttention):
    """Attention of a tail layer. Without `swiftkv_states` it is the base's own attention."""

    def __init__(self, config: LlamaSwiftKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        place, group = next((place, group) for place, group in enumerate(config.tail_groups) if layer_idx in group)
        self.leader_idx, self.cache_idx = group[0], config.num_key_value_layers + place
        self.q_proj_swiftkv = nn.Linear(self.q_proj.in_features, self.q_proj.out_features, bias=config.attention_bias)
        if self.leader_idx == layer_idx:
            self.k_proj_swiftkv = nn.Linear(self.k_proj.in_features, self.k_proj.out_features, config.attention_bias)
            self.v_proj_swiftkv = nn.Linear(self.v_proj.in_features, self.v_proj.out_features, config.attention_bias)
        if not config.base_projections:
            del self.q_proj, self.k_proj, self.v_proj

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # [B, K, D]
        position_embeddings: tuple[torch.Tensor, torch.Tensor],  # cos, sin [B, T, C]
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        swiftkv_states: torch.Tensor | None = None,  # [B, T, D]
        shared_key_values: SharedKeyValues | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if swiftkv_states is None or shared_key_values is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        if self.leader_idx == self.layer_idx and not shared_key_values.complete:
            keys, values = self.project_key_values(swiftkv_states, position_embeddings)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.cache_idx)
            shared_key_values.by_leader[self.layer_idx] = keys, values
        keys, values = shared_key_values.by_leader[self.leader_idx]
        if isinstance(keys, torch.Tensor):
            keys, values = keys.to(hidden_states.device), values.to(hidden_states.device)

        kept = hidden_states.shape[1]
        cos, sin = (table[:, -kept:].to(hidden_states.device) for table in position_embeddings)
        queries = rotate(self._heads(self.q_proj_swiftkv(hidden_states)), cos, sin)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights

    def project_key_values(
        self, swiftkv_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated K, and V, [B, G, T, C] of the new tokens from the shared states [B, T, D]."""
        keys = self._heads(self.k_proj_swiftkv(swiftkv_states))
        return rotate(keys, *position_embeddings), self._heads(self.v_proj_swiftkv(swiftkv_states))

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


@dataclass
class TrunkOutput:
    """What the trunk leaves for the tail."""

    hidden_states: torch.Tensor  # [B, T, D], the residual stream that enters layer l
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None  # of the attention implementation's own form
    tail_attention_mask: torch.Tensor | None  # the same for the kept positions
    first_kept: int
    past_key_values: Cache | None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TailOutput:
    last_hidden_state: torch.Tensor  # [B, K, D], after the final norm
    last_layer_input: torch.Tensor  # [B, K, D]


class LlamaSwiftKVPreTrainedModel(LlamaPreTrainedModel):
    config: LlamaSwiftKVConfig
    config_class = LlamaSwiftKVConfig
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012
    # Checkpoints of other projects carry the tail's unused q/k/v_proj.
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.[qkv]_proj\."]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012


class LlamaSwiftKVModel(LlamaSwiftKVPreTrainedModel, LlamaModel):
    """The decoder: trunk, `norm_swiftkv`, tail (see the module's docstring)."""

    def __init__(self, config: LlamaSwiftKVConfig):
        super().__init__(config)
        for layer_idx in range(config.num_key_value_layers, config.num_hidden_layers):
            self.layers[layer_idx].self_attn = LlamaSwiftKVAttention(config, layer_idx)
        self.norm_swiftkv = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._tail_projection: TailProjection | None = None
        self.post_init()

    def _apply(self, fn: Any, recurse: bool = True) -> "LlamaSwiftKVModel":
        super()._apply(fn, recurse)
        keep_frequencies(self.rotary_emb)
        return self

    def run_trunk(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        first_kept: int = 0,
        **kwargs: Any,
    ) -> TrunkOutput:
        """Layers below l for all new tokens. Positions before `first_kept` will not be run through the tail."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden_states.shape[1]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=hidden_states.device) + seen).unsqueeze(0)
        mask_arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        mask: Any = create_causal_mask(**mask_arguments)
        tail_mask = mask
        if first_kept > 0:
            room = getattr(past_key_values, "is_compileable", False)  # a cache whose keys go on beyond what is written
            if mask is None and (room or length - first_kept > 1) and plain_implementation(self.config) in SDPA:
                # Its causal flag aligns queries with the first keys; the kept ones belong to the last.
                tail_mask = create_causal_mask(**mask_arguments, allow_is_causal_skip=False)
            if isinstance(tail_mask, torch.Tensor) and tail_mask.ndim == 4:
                tail_mask = tail_mask[:, :, first_kept:]
        streams = getattr(past_key_values, "streams", False)
        rotary_emb = partial(exact_position_embeddings, self.rotary_emb) if streams else self.rotary_emb
        position_embeddings = rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_key_value_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return TrunkOutput(
            hidden_states, position_embeddings, position_ids, mask, tail_mask, first_kept, past_key_values, kwargs
        )

    def run_tail(self, trunk: TrunkOutput, *, base: bool = False) -> TailOutput:
        """Layers from l on and the final norm; `base` runs the base model's own (needs `base_projections`)."""
        hidden_states = trunk.hidden_states
        arguments: dict[str, Any] = {**trunk.kwargs, "position_embeddings": trunk.position_embeddings}
        if base:
            if not self.config.base_projections or trunk.past_key_values is not None or trunk.first_kept:
                raise ValueError("the base's tail needs base_projections, all positions and no cache")
            arguments |= {"attention_mask": trunk.attention_mask, "position_ids": trunk.position_ids}
        else:
            states, shared = self.norm_swiftkv(hidden_states), SharedKeyValues()
            hidden_states = hidden_states[:, trunk.first_kept :]
            if isinstance(trunk.past_key_values, SinkWindowCache) and hidden_states.shape[1] == 1:
                self._fill_slots(trunk.past_key_values, states, trunk.position_embeddings, shared)
            arguments |= {
                "attention_mask": trunk.tail_attention_mask,
                "position_ids": trunk.position_ids[:, trunk.first_kept :],
                "past_key_values": trunk.past_key_values,
                "swiftkv_states": states,
                "shared_key_values": shared,
            }
        last_layer_input = hidden_states
        for layer in self.layers[self.config.num_key_value_layers :]:
            last_layer_input = hidden_states
            hidden_states = layer(hidden_states, **arguments)
        return TailOutput(self.norm(hidden_states), last_layer_input)

    def _fill_slots(
        self,
        cache: SinkWindowCache,
        states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        shared: SharedKeyValues,
    ) -> None:
        """K and V of the whole tail in one product into the cache's slots, where a single query then finds them."""
        if cache.storage is None or cache.storage[0].device != states.device or torch.is_grad_enabled():
            return
        if torch.is_autocast_enabled(states.device.type):  # the cache is then of another dtype than the weights
            return
        attentions: list[Any] = [layer.self_attn for layer in self.layers[self.config.num_key_value_layers :]]
        leaders = [attention for attention in attentions if attention.leader_idx == attention.layer_idx]
        if self._tail_projection is None or not self._tail_projection.serves(leaders):
            self._tail_projection = TailProjection.stack(leaders)
        if self._tail_projection is None or self._tail_projection.weight.device != states.device:
            return
        self._tail_projection.write(cache, leaders[0].cache_idx, states, position_embeddings)
        for leader in leaders:
            key_values = KeyValues(cache.segments[leader.cache_idx])
            shared.by_leader[leader.layer_idx] = key_values, key_values
        shared.complete = True

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As `LlamaModel.forward`; `last_hidden_state` holds the positions that `logits_to_keep` names (0: all)."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
        length = inputs.shape[1]
        first_kept = first_kept_position(logits_to_keep, length)
        if plain_implementation(self.config) == "flex_attention":
            first_kept = 0  # a BlockMask has no rows to select
        trunk = self.run_trunk(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, first_kept=first_kept, **kwargs
        )
        hidden_states = self.run_tail(trunk).last_hidden_state
        return BaseModelOutputWithPast(
            last_hidden_state=select_kept(hidden_states, logits_to_keep, first_kept, length),
            past_key_values=past_key_values if use_cache else None,
        )


class LlamaSwiftKVForCausalLM(LlamaSwiftKVPreTrainedModel, LlamaForCausalLM):
    """The decoder and the head of the language model; `rewrite` makes one of a base."""

    def __init__(self, config: LlamaSwiftKVConfig):
        LlamaSwiftKVPreTrainedModel.__init__(self, config)
        self.model = LlamaSwiftKVModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`, except that the tail runs only from the first position kept on.

        `output_hidden_states` then records the tail's layers for those positions only.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def optimize_for_cpu(self) -> "LlamaSwiftKVForCausalLM":
        """For inference alone: on a CPU tokens then come up to several times as fast."""
        return optimize_for_cpu(self)

    def sink_window_cache(self, *, window: int, attention_sinks: int = 4, **options: Any) -> SinkWindowCache:
        """A cache for `generate(past_key_values=...)` that keeps the first tokens and the last `window` ones."""
        return SinkWindowCache(self.config, window=window, attention_sinks=attention_sinks, **options)

    def shared_prefix(self, tokenizer: Any, text: str) -> SharedPrefix:
        """A prompt that others begin with, prefilled once, for `sink_window_cache(prefixes=..., input_ids=...)`."""
        return SharedPrefix.from_text(self, tokenizer, text)


def first_kept_position(logits_to_keep: int | torch.Tensor, length: int) -> int:
    """The first of `length` positions that `logits_to_keep` (transformers' meaning: a count from the end, or positions,
    or a mask) asks for."""
    if isinstance(logits_to_keep, int):
        return max(length - logits_to_keep, 0) if logits_to_keep > 0 else 0
    if logits_to_keep.dtype == torch.bool:
        columns = logits_to_keep.reshape(-1, length).any(0).nonzero()
        return int(columns[0]) if len(columns) else 0
    return int((logits_to_keep % length).min()) if logits_to_keep.numel() else 0


def select_kept(
    hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor, first_kept: int, length: int
) -> torch.Tensor:
    """The kept positions of `hidden_states` [B, length - first_kept, D]."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        mask = logits_to_keep.reshape(-1, length)[:, first_kept:]
        return hidden_states[mask] if logits_to_keep.ndim == 2 else hidden_states[:, mask[0]]
    positions = logits_to_keep % length - first_kept
    if positions.ndim == 1:
        return hidden_states[:, positions]
    return torch.take_along_dim(hidden_states, positions[..., None], dim=1)
