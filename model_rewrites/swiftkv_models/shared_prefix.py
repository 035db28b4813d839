"""A prompt that many requests begin with, prefilled once: relay attention's shared segment (arXiv 2402.14808).

Whether a request begins with it is decided by token ids. Its keys lie rotated at positions 0 .. P - 1, so it may stand
before any row of any batch, and no row's cache holds a copy, unless that is faster (`SinkWindowCache(prefixes=...)`).

    P tokens   G K/V heads   C head size   M prefixes of one cache
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

# On CPU, of one prefix that all rows have: numbers of K/V in a layer that are not read (in bf16 sharing is as fast at
# 0.4 million; in fp32 without AVX-512 4 rows of 256 tokens, 0.3 million, took 1.2 times as long as with copies, 8 rows
# 0.9 times), and tokens (the rows' own are read as before, by a part of attention of their own).
WORTH_ON_CPU, LEAST_TOKENS_ON_CPU = 1 << 19, 128
# Of several, or of rows beside them that have none: as many for each prefix and once more. With two prefixes of 1,024
# tokens 8 rows took 1.05 times as long as with copies, 16 rows 0.76 times; with four of 512 tokens 16 rows 1.3 times,
# 32 rows 0.88 times; with four of 4,096 tokens 8 rows 1 to 1.07 times, 16 rows 0.62 times.
WORTH_OF_A_GROUP_ON_CPU = 5 << 18
PIECE = 1024  # tokens of a prefix that run at once
LONG_ON_GPU = 1024  # tokens that the kernel of a shared prefix divides over a GPU; pinned slots it does not


class SharedPrefix:
    """Token ids, and one K and V [G, P, C] for every layer that a cache holds.

    `form` is that of the model which made them (`form_of`): a cache for a model of another form refuses the prefix.
    That its weights are the same nobody can tell.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        form: Mapping[str, Any] | None = None,
    ):
        self.token_ids, self.keys, self.values = tuple(token_ids), list(keys), list(values)
        self.form = form

    @classmethod
    @torch.no_grad()
    def from_ids(cls, model: Any, token_ids: Sequence[int] | torch.Tensor) -> SharedPrefix:
        """Run `model`, base or SwiftKV, over the tokens once. Raises ValueError where there are none."""
        ids = torch.as_tensor(token_ids, device=model.device)
        if ids.ndim > 1 and len(ids) != 1:
            raise ValueError(f"a shared prefix is of one row of tokens, not {tuple(ids.shape)}")
        ids = ids.reshape(1, -1)
        if ids.shape[1] == 0:
            raise ValueError("a shared prefix needs at least one token")
        cache = DynamicCache(config=model.config)
        for piece in ids.split(PIECE, dim=1):
            model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        keys, values = [layer.keys[0] for layer in layers], [layer.values[0] for layer in layers]
        return cls(ids[0].tolist(), keys, values, form_of(model.config))

    @classmethod
    def from_text(cls, model: Any, tokenizer: Any, text: str) -> SharedPrefix:
        """Of a text as it stands, special tokens written out: what is sent to the model must begin with just these."""
        return cls.from_ids(model, tokenizer(text, add_special_tokens=False)["input_ids"])

    @classmethod
    def from_messages(cls, model: Any, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> SharedPrefix:
        """Of the first messages of a chat, a system prompt for instance (see `beginning_of_chat`)."""
        return cls.from_ids(model, beginning_of_chat(tokenizer, messages))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


def beginning_of_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens that a chat template makes of messages before whatever a user says next.

    Raises ValueError where there are none.
    """
    ways = [
        tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}], tokenize=True)
        for text in ("0", "What?")
    ]
    first, second = (way["input_ids"] if isinstance(way, Mapping) else way for way in ways)
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    if common == 0:
        raise ValueError("the chat template begins differently with every message; no prefix is shared")
    return list(first[:common])


def form_of(config: Any) -> dict[str, Any]:
    """What models must have in common to read each other's K/V, but for their weights; by the name of its key."""
    names = ["model_type", "num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size", "rope_parameters"]
    names += ["num_key_value_layers", "key_value_group_size", "key_value_groups"]  # of SwiftKV
    form = {name: getattr(config, name, None) for name in names}
    return form | {"head_dim": form["head_dim"] or config.hidden_size // config.num_attention_heads}


def num_cached_layers(config: Any) -> int:
    """How many layers a model, base or SwiftKV, caches K/V of."""
    return int(getattr(config, "num_cached_layers", config.num_hidden_layers))


def check_form(prefix: SharedPrefix, form: dict[str, Any], layers: int) -> None:
    """Raises ValueError unless a model of this `form`, which caches that many layers, may read the prefix."""
    if len(prefix.keys) != layers:
        raise ValueError(
            f"a prefix holds K/V of {len(prefix.keys)} layers, this model caches {layers}; make it with this model"
        )
    heads, size = prefix.keys[0].shape[0], prefix.keys[0].shape[2]
    if (heads, size) != (form["num_key_value_heads"], form["head_dim"]):
        raise ValueError(
            f"a prefix has K/V of {heads} heads of {size}, this model of {form['num_key_value_heads']} of "
            f"{form['head_dim']}; make it with this model"
        )
    for name, value in (getattr(prefix, "form", None) or {}).items():  # another copy of this code may leave it out
        if form.get(name) != value:
            raise ValueError(
                f"a prefix was made by a model with {name} {value}, this one has {form.get(name)}; make it with this "
                "model"
            )


def assign_prefixes(
    prefixes: Sequence[SharedPrefix], input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's prefix, and how many of its columns lie in padding or in that.

    Of several prefixes that a row begins with it takes the longest that leaves it a token of its own.

    Returns:
        groups [B] int32, index into `prefixes` or -1; columns [B] int64, behind which a row's own tokens begin.

    Raises:
        ValueError: input_ids are missing or no [B, T], the mask is of another shape, or padding is not on the left.
    """
    if input_ids is None:
        raise ValueError("prefixes go with input_ids: which rows begin with one is decided by their token ids")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        raise ValueError("input_ids must be a tensor [B, T]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, as input_ids")
    if attention_mask is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError("prefixes go with padding on the left alone: attention_mask must be zeros, then ones")
    rows = input_ids.tolist()
    masks = [[True] * len(row) for row in rows] if attention_mask is None else attention_mask.bool().tolist()
    groups, columns = [], []
    for row, mask in zip(rows, masks, strict=True):
        tokens = tuple(token for token, real in zip(row, mask, strict=True) if real)
        fitting = [
            index
            for index, prefix in enumerate(prefixes)
            if len(prefix) < len(tokens) and tokens[: len(prefix)] == prefix.token_ids
        ]
        group = max(fitting, key=lambda index: len(prefixes[index]), default=-1)
        groups.append(group)
        padding = len(row) - len(tokens)
        columns.append(padding + len(prefixes[group]) if group >= 0 else padding)
    return torch.tensor(groups, dtype=torch.int32), torch.tensor(columns)


def sharing_pays(groups: Sequence[int], lengths: Sequence[int], token_numbers: int, device: torch.device) -> bool:
    """Whether rows read their prefixes faster as segments than as copies in slots of their own.

    Args:
        groups: each row's prefix, or -1.
        lengths: tokens of each prefix. As copies every row has as many slots as the longest needs.
        token_numbers: numbers in K of a token in a layer.

    What sharing saves must be worth its parts of attention, and the merge. A long prefix of one row is faster on a GPU
    as a segment of its own.
    """
    longest = max(lengths)
    saved = (len(groups) * longest - sum(lengths)) * 2 * token_numbers
    if device.type != "cpu":
        return saved > 0 or longest >= LONG_ON_GPU
    if len(lengths) == 1 and min(groups) >= 0:
        return saved >= WORTH_ON_CPU and longest >= LEAST_TOKENS_ON_CPU
    return saved >= (len(lengths) + 1) * WORTH_OF_A_GROUP_ON_CPU


def stack_prefixes(prefixes: Sequence[SharedPrefix], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [M, G, P, C] of a layer, short prefixes filled up; of one prefix, a view."""
    if len(prefixes) == 1:
        return prefixes[0].keys[layer][None], prefixes[0].values[layer][None]
    longest = max(len(prefix) for prefix in prefixes)
    keys, values = (
        torch.stack([torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors])
        for tensors in ([prefix.keys[layer] for prefix in prefixes], [prefix.values[layer] for prefix in prefixes])
    )
    return keys, values
