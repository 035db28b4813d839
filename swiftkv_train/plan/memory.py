"""What training holds on one GPU: from the model's shapes, the recipe and the number of processes.

    weights        frozen ones in model.dtype or quantised; trained ones in fp32 and, under autocast, their copy in
                   model.dtype
    gradients      of the trained weights, fp32
    optimizer      AdamW's two moments; DeepSpeed's copy of the trained weights
    activations    what autograd keeps of the student's tail, and the final states of both; the trunk keeps nothing
    loss chunk     the buffers of `distillation_kl`, and the gradient it forms
    communication  what processes gather or exchange in one piece

The parts do not all meet: where a step is one micro-batch, gradients come as activations go. `step` is the largest of
the moments of a step: the loss, the beginning and the end of the backward pass, the update. Of every token a loss is
assumed, and of every sequence that several documents are packed in it, as nearly all are.

B sequences of T tokens   N = B T, or a process's part of them where a group shares them (sequence_parallel)
D hidden size   I width of the MLP   H query heads   G K/V heads   C head size   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from swiftkv_kernels.causal_attention import BLOCK
from swiftkv_kernels.distillation_kl import distillation_kl_bytes
from swiftkv_models import PACKED_CAUSAL, LlamaSwiftKVForCausalLM
from swiftkv_train.deepspeed_settings import deepspeed_config
from swiftkv_train.moments import score_bytes
from swiftkv_train.quality import ROWS
from swiftkv_train.quantized_base import BYTES, quantizable_layers
from swiftkv_train.recipe import Recipe
from swiftkv_train.student import trainable_parameters

FP32 = 4
# Bytes of AdamW's moments per trained parameter; 8-bit ones have two fp32 scales for every 256 parameters.
MOMENTS = {"adamw": 2 * FP32, "adamw_8bit": 2 + 2 * FP32 / 256, "paged_adamw_8bit": 2 + 2 * FP32 / 256}
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000
# What a process holds only its part of.
SHARDED: dict[str, set[str]] = {
    "ddp": set(),
    "zero1": {"optimizer"},
    "zero2": {"optimizer", "gradients"},
    "zero3": {"optimizer", "gradients", "weights"},
    "fsdp2": {"optimizer", "gradients", "weights"},
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: each part at its largest, then all that is held at the worst moments."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_chunk: int
    communication: int
    step: int
    evaluation: int  # 0 without held-out text
    calibration: int  # before the first step; 0 where the start is not calibrated

    @property
    def peak(self) -> int:
        return max(self.step, self.evaluation, self.calibration)


def training_memory(
    model: LlamaSwiftKVForCausalLM, recipe: Recipe, *, processes: int = 1, device: str = "cuda"
) -> Memory:
    """Memory of one of `processes` that train `model` (its tensors may be on `meta`) on 'cuda' or 'cpu'."""
    training = recipe.training
    trained = _elements(trainable_parameters(model).values())
    frozen = _elements(model.parameters()) - trained
    dtype = model.dtype
    half = dtype != torch.float32
    strategy = recipe.distributed.strategy if processes > 1 else "ddp"

    sequences = math.ceil(training.batch_size / (processes // recipe.distributed.sequence_parallel))
    accumulates = sequences > training.micro_batch_size

    def part(name: str, size: float) -> int:
        return math.ceil(size / processes if name in SHARDED[strategy] else size)

    weights = part("weights", _frozen_bytes(model, recipe, frozen, dtype.itemsize) + trained * FP32)
    copies = trained * dtype.itemsize if half else 0  # autograd keeps them whole
    gradients = part("gradients", trained * FP32)
    if strategy == "fsdp2" and accumulates:
        gradients = trained * FP32  # in parts only once they are exchanged
    # DeepSpeed keeps an fp32 copy of its part of the weights, whatever dtype they are in.
    masters = FP32 if strategy.startswith("zero") else 0
    optimizer = part("optimizer", trained * (MOMENTS[training.optimizer] + masters))
    communication, exchanged = 0, 0
    if processes > 1:
        communication, exchanged = _communication(model, recipe, dtype.itemsize)

    tail = TailMemory(model, recipe, rows=min(training.micro_batch_size, sequences), dtype=dtype, device=device)
    chunk = distillation_kl_bytes(tail.tokens, tail.hidden, tail.vocabulary, dtype, device)
    accumulated = gradients if accumulates else 0
    always = weights + optimizer + communication
    update = gradients  # AdamW on CUDA takes the roots of all second moments at a time
    if device == "cuda" and training.optimizer == "adamw":
        update += optimizer // 2
    step = always + max(
        copies + accumulated + tail.saved() + tail.final_states() + chunk,
        copies + accumulated + exchanged + tail.backward(),
        copies + gradients + exchanged + tail.last_backward(),
        update,
    )
    evaluation = always + copies + tail.evaluation() if recipe.data.held_out else 0
    activations = tail.saved() + tail.final_states()
    communication += exchanged
    calibration = _calibration(model, recipe, tail, strategy, device) if recipe.rewrite.init == "calibrated" else 0
    return Memory(
        weights + copies, gradients, optimizer, activations, chunk, communication, step, evaluation, calibration
    )


def _calibration(model: LlamaSwiftKVForCausalLM, recipe: Recipe, tail: TailMemory, strategy: str, device: str) -> int:
    """The closed form's sums, and what runs the base meanwhile: all of it, or its largest part (`layer_by_layer`)."""
    parts = [model.model.embed_tokens, *model.model.layers]
    sizes = [_elements(part.parameters()) * tail.itemsize for part in parts]
    in_parts = device == "cuda" and ("weights" in SHARDED[strategy] or recipe.model.quantization is not None)
    weights = max(sizes) if in_parts else _elements(model.parameters()) * tail.itemsize
    width = tail.hidden + int(model.config.attention_bias)
    groups = cast(int, model.config.num_key_value_heads) if recipe.calibration.weighting == "head" else 1
    sums = tail.layers * 8 * (groups * width**2 + width * 2 * tail.key_value)
    sharing = sum(len(group) for group in model.config.tail_groups if len(group) > 1)
    if recipe.calibration.weighting != "none":  # what a shared V is fitted to
        sums += sharing * 8 * (groups * width**2 + (width * tail.key_value if groups > 1 else 0))
    # Of a batch: the base's queries, keys and values of all tail layers, and a layer's states in fp32 and twice.
    recorded = tail.layers * tail.state(tail.query + 2 * tail.key_value)
    layer = tail.tokens * (2 * tail.hidden + 4 * tail.key_value) * FP32
    passes = recorded + layer + 2 * score_bytes(device)
    if sharing and not in_parts:  # its backward pass, which is the base's
        passes = max(passes, tail.saved() + tail.final_states(), tail.backward())
    return weights + sums + passes


def _frozen_bytes(model: LlamaSwiftKVForCausalLM, recipe: Recipe, frozen: int, itemsize: int) -> int:
    """Of the frozen weights; where they are quantised, with the copy that the largest is multiplied from."""
    kind = recipe.model.quantization
    if kind is None:
        return frozen * itemsize
    sizes = [linear.weight.numel() for linear in quantizable_layers(model).values()]
    return math.ceil((frozen - sum(sizes) + max(sizes)) * itemsize + sum(sizes) * BYTES[kind])


def _communication(model: LlamaSwiftKVForCausalLM, recipe: Recipe, itemsize: int) -> tuple[int, int]:
    """Bytes that several processes take for what they exchange or gather: always, and in backward passes only."""
    strategy = recipe.distributed.strategy
    trained = {id(parameter) for parameter in trainable_parameters(model).values()}

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (FP32 if id(p) in trained else itemsize) for p in parameters)

    if strategy == "ddp":  # the buckets that gradients are copied to
        return FP32 * _elements(trainable_parameters(model).values()), 0
    layers = [size(layer.parameters()) for layer in model.model.layers]
    tail = layers[model.config.num_key_value_layers :]
    rest = size(model.parameters()) - sum(layers)  # embeddings, head and norms
    if strategy == "fsdp2":
        return rest + max(tail), 0
    settings = deepspeed_config(recipe)["zero_optimization"]
    bucket = FP32 * _number(settings.get("reduce_bucket_size"), REDUCE_BUCKET)
    if strategy != "zero3":
        return 0, bucket
    # What a step uses again, as the tail, stays gathered.
    most = itemsize * _number(settings.get("stage3_max_live_parameters"), MAX_LIVE_PARAMETERS)
    return bucket + min(rest + sum(tail), most), 0


def _number(setting: Any, default: int) -> int:
    return int(setting) if isinstance(setting, int | float) else default


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


class TailMemory:
    """What a forward and backward of the student's tail over [B, T] tokens holds, in bytes."""

    def __init__(self, model: LlamaSwiftKVForCausalLM, recipe: Recipe, *, rows: int, dtype: torch.dtype, device: str):
        config = model.config
        self.rows, self.length = rows, recipe.data.sequence_length
        self.tokens = self.rows * self.length // recipe.distributed.sequence_parallel
        self.hidden, self.heads, self.vocabulary = config.hidden_size, config.num_attention_heads, config.vocab_size
        head_dim = cast(int, config.head_dim)
        self.query, self.key_value = self.heads * head_dim, cast(int, config.num_key_value_heads) * head_dim
        self.tables = 2 * self.tokens * head_dim * dtype.itemsize  # cos, sin
        self.width, self.itemsize, self.half = config.intermediate_size, dtype.itemsize, dtype != torch.float32
        self.layers = config.num_hidden_layers - config.num_key_value_layers
        self.leaders = config.num_cached_layers - config.num_key_value_layers
        self.lora, self.checkpointing = recipe.training.lora, recipe.training.gradient_checkpointing
        self.attention: str = recipe.model.attention
        if device == "cpu" and self.attention == "sdpa":
            self.attention = PACKED_CAUSAL

    def state(self, size: int) -> int:
        """Bytes of an activation [B, T, size] in model.dtype."""
        return self.tokens * size * self.itemsize

    @property
    def scores(self) -> int:
        """Number of attention scores [B, H, T, T], or of a process's share of the heads."""
        return self.tokens * self.length * self.heads

    def saved(self) -> int:
        """Kept from the forward pass for the backward pass."""
        # A mask that is added, eager's, is not kept.
        mask = 0 if self.attention in ("flash_attention_2", "eager") else self.rows * self.length**2
        shared = self.tables + mask
        if self.lora is None:  # norm_swiftkv is trained
            shared += self.state(self.hidden)
        if not self.half:  # one tensor that all K and V are projected from; autocast makes a copy for each
            shared += self.state(self.hidden)
        if not self.checkpointing:
            return (
                shared + self.leaders * self.layer(leads=True) + (self.layers - self.leaders) * self.layer(leads=False)
            )
        if self.half:
            shared += self.tokens * self.hidden * FP32
        return shared + self.layers * self.state(self.hidden) + self.leaders * 2 * self.state(self.key_value)

    def layer(self, *, leads: bool) -> int:
        """Kept by one tail layer."""
        norms = 2 * self.tokens * (self.hidden + 1) * FP32
        inputs = 3 if self.half and leads else 1
        adapted = 0 if self.lora is None else self.state(self.lora.rank) * (3 if leads else 1)
        return (
            norms + inputs * self.state(self.hidden) + adapted + self.attended(leads=leads) + 3 * self.state(self.width)
        )

    def attended(self, *, leads: bool) -> int:
        """Kept by the attention of one tail layer."""
        query, key_value = self.state(self.query), 2 * self.state(self.key_value) * leads
        if self.attention == PACKED_CAUSAL:
            return query + key_value
        if self.attention == "eager":  # K and V repeated for every query head; probabilities in fp32 and model.dtype
            return 3 * query + self.scores * (FP32 + self.itemsize * self.half)
        log_sum_exp = self.tokens * self.heads * FP32
        if self.attention == "flash_attention_2":
            return 2 * query + key_value + log_sum_exp
        # torch's memory-efficient operator: K and V repeated, output, and the mask made into numbers
        return 4 * query + log_sum_exp + self.rows * self.length**2 * self.itemsize

    def final_states(self) -> int:
        """Held beside that while the loss is formed: what enters the tail, both models' last states, rows with loss."""
        return (6 + self.half) * self.state(self.hidden)

    def evaluation(self) -> int:
        """Held while the two models' logits of some rows are compared (`quality.token_measures`)."""
        logits = ROWS * self.vocabulary * (2 * self.itemsize + 5 * FP32)
        return 4 * self.rows * self.length * self.hidden * self.itemsize + logits

    def backward(self) -> int:
        """Held at the beginning of the backward pass, in the last layer."""
        recomputed = self.layer(leads=True) if self.checkpointing else 0
        return self.saved() + recomputed + self.layer_backward()

    def last_backward(self) -> int:
        """Held at its end, in the first layer of the tail."""
        left = self.layer(leads=True) + self.layer_backward()
        if self.checkpointing:
            # K and V of the layers that ran again live on, and with them the copies they were projected from.
            left += self.saved() + self.leaders * 2 * self.state(self.hidden) * self.half
        return left

    def layer_backward(self) -> int:
        """Held for the gradients inside a layer beyond what it has kept, in its MLP or in its attention."""
        mlp = 3 * self.state(self.width) + 2 * self.state(self.hidden)
        return max(mlp, self.attention_backward() - 3 * self.state(self.width) - self.tokens * self.hidden * FP32)

    def attention_backward(self) -> int:
        query, key_value = self.state(self.query), self.state(self.key_value)
        if self.attention == PACKED_CAUSAL:
            block = self.scores * min(1, BLOCK / self.length) * (2 * FP32 + self.itemsize * (3 if self.half else 2))
            return math.ceil(block) + 4 * query + key_value + 3 * self.tokens * self.key_value * FP32
        if self.attention == "eager":
            return 4 * query + self.scores * (2 * FP32 + self.itemsize)
        return 5 * query
