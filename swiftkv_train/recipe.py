"""Recipes: one YAML file that states a whole run, checked before anything is loaded. These are its keys.

Paths inside a recipe are relative to the directory the command is run in, or begin with `~`.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from swiftkv_train.recipe_yaml import to_yaml


def _place(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot hold the character NUL")
    return os.path.expanduser(path)


# A path, or a hub id; `~` is the user's home, which no shell puts in place inside a file.
Place = Annotated[str, AfterValidator(_place)]
Beta = Annotated[float, Field(ge=0, lt=1)]
MOST_SEQUENCES = 2**20  # of a step: no run has so many, and lists of them still fit
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 1e30  # what tensors count with, and well within fp32


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_what_tensors_hold(cls, value: Any) -> Any:
        largest = {int: LARGEST_INT, float: LARGEST_FLOAT}.get(type(value))
        if largest is not None and abs(value) > largest:
            raise ValueError(f"must be at most {largest:g}")
        return value


class ModelSection(Section):
    base: Place = Field(min_length=1, description="Local directory or hub id of the base model.")
    revision: str | None = Field(None, description="Revision of a hub id.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Compute dtype of the frozen base, and what is exported in; `auto`: bfloat16 where the device "
        "multiplies it natively, else float32, and exported as the base is stored.",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation.")
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="Hold the frozen layers in 8 or 4 bits while training (extra `bitsandbytes`)."
    )


class RewriteSection(Section):
    num_key_value_layers: int = Field(description="l: layers below it keep their own K/V; the tail starts at it.")
    key_value_group_size: int = Field(1, description="g: this many neighbouring tail layers share one K/V (AcrossKV).")
    key_value_groups: list[list[int]] | None = Field(
        None, description="The tail's layers in groups of any size, in place of g: [[15], [16, 17], [18, 19, 20], ...]."
    )
    init: Literal["calibrated", "copy", "checkpoint"] = Field("calibrated", description="Where the tail starts from.")
    init_from: Place | None = Field(None, description="Exported checkpoint to continue, with `init: checkpoint`.")

    @model_validator(mode="after")
    def _init_from_goes_with_checkpoint(self) -> RewriteSection:
        if (self.init == "checkpoint") != (self.init_from is not None):
            raise ValueError("`init: checkpoint` and `init_from: DIR` go together")
        return self

    @model_validator(mode="after")
    def _one_way_of_grouping(self) -> RewriteSection:
        if self.key_value_groups is not None and self.key_value_group_size != 1:
            raise ValueError("`key_value_groups` takes the place of `key_value_group_size`; give one of them")
        return self

    def form(self) -> dict[str, Any]:
        """What `swiftkv_models.rewrite` takes."""
        return self.model_dump(include={"num_key_value_layers", "key_value_group_size", "key_value_groups"})


class CalibrationSection(Section):
    tokens: int = Field(65_536, ge=1, description="Tokens of training data the closed-form start is fitted on.")
    ridge: float = Field(1e-4, ge=0, description="Ridge strength, relative to the mean diagonal of X'X.")
    weighting: Literal["head", "layer", "none"] = Field(
        "head",
        description="Tokens count by the attention they get: per K/V `head` (best; its sums take 8 D^2 bytes per head "
        "and tail layer, D the hidden size), per `layer` (less memory), or all alike.",
    )


class GenerateSection(Section):
    """Conversations that the base holds with itself; see swiftkv_train/data/generate.py."""

    conversations: int = Field(1000, ge=1, description="Conversations, or texts of a base without a chat template.")
    max_prompt_tokens: int = Field(128, ge=1, description="A prompt that is longer is dropped.")
    max_new_tokens: int = Field(384, ge=1, description="An answer, or a text, that is longer is cut.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of prompts and answers.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the most likely tokens that hold this probability.")
    seed: int = Field(0, ge=0, description="Held-out sources need another one than train sources.")
    batch_size: int = Field(32, ge=1, description="Conversations generated side by side.")


class Source(Section):
    """One stream of documents: prose or chats."""

    name: str = Field(description="Name in logs, metrics and reports.")
    path: Place | None = Field(
        None, description="File, directory or glob: .txt, .md, .json, .jsonl (also .gz) or .parquet."
    )
    dataset: str | None = Field(None, description="Hugging Face dataset name instead of `path`.")
    subset: str | None = Field(None, description="Configuration name of a Hugging Face dataset.")
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    revision: str | None = Field(None, description="Revision of a Hugging Face dataset: a branch, tag or commit.")
    streaming: bool = Field(
        False, description="Read a Hugging Face dataset over the network as far as `max_documents`; keep no copy."
    )
    generate: GenerateSection | None = Field(
        None, description="Text that the base itself says, instead of `path`: distillation without data."
    )
    field: str | None = Field(
        None, description="Column that holds plain text, or the messages. Found by itself when left out."
    )
    kind: Literal["auto", "text", "chat"] = Field(
        "auto", description="`text`: loss on all tokens; `chat`: on assistant tokens."
    )
    weight: float = Field(1.0, gt=0, description="Share of the training tokens, relative to the other sources.")
    max_documents: int | None = Field(None, ge=1, description="Read only the first documents.")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if [self.path, self.dataset, self.generate].count(None) != 2:
            raise ValueError("a source needs exactly one of `path`, `dataset` and `generate`")
        of_dataset = self.streaming or self.revision is not None or self.subset is not None or self.split != "train"
        if self.dataset is None and of_dataset:
            raise ValueError("`subset`, `split`, `revision` and `streaming` go with `dataset`")
        if self.generate is not None and (self.field is not None or self.kind != "auto"):
            raise ValueError("`field` and `kind` do not go with `generate`")
        return self


def own_text() -> dict[str, Any]:
    """What `data: self` is short for: train on what the base says, and hold out a little of it."""
    held_out = {"conversations": 64, "seed": 1}
    return {"train": [{"name": "self", "generate": {}}], "held_out": [{"name": "self", "generate": held_out}]}


class DataSection(Section):
    sequence_length: int = Field(512, ge=8, description="Tokens per packed sequence.")
    train: list[Source] = Field(min_length=1, description="Sources mixed by weight for training and calibration.")
    held_out: list[Source] = Field(
        default_factory=list, description="Sources watched during training, to choose settings by; never trained on."
    )
    test: list[Source] = Field(
        default_factory=list,
        description="Sources that `swiftkv evaluate` measures on and nothing was chosen by; left out: `held_out`.",
    )
    cache_dir: Place = Field(
        "outputs/token-cache", min_length=1, description="Where tokenised sources are kept, by content hash."
    )
    seed: int = Field(0, ge=0, description="Seed of the order of documents and sequences.")

    @model_validator(mode="before")
    @classmethod
    def _self_is_short(cls, value: Any) -> Any:
        return own_text() if value == "self" else value

    @field_validator("train", "held_out", "test")
    @classmethod
    def _names_differ(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}; give each its own name")
        return sources


class LossSection(Section):
    temperature: float = Field(
        1.0, gt=0, description="Temperature of the KL divergence (the loss is scaled by its square)."
    )
    hidden_mse: float = Field(0.0, ge=0, description="Weight of the MSE between the states that enter the last layer.")


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685) on the tail's projections."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="The adapters' product is scaled by alpha / rank.")


class TrainingSection(Section):
    output_dir: Place = Field(min_length=1, description="The run directory.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    batch_size: int = Field(
        ge=1, le=MOST_SEQUENCES, description="Sequences per optimizer step, over all processes and accumulation."
    )
    micro_batch_size: int = Field(4, ge=1, description="Sequences per forward on one process.")
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    schedule: Literal["wsd", "cosine"] = Field(
        "wsd",
        description="After the warm-up: `wsd` (warm-up, stable, decay) stays at the peak and falls linearly at its "
        "end, `cosine` falls all the way.",
    )
    decay: float | None = Field(
        None, gt=0, le=1, description="Share of the steps over which `wsd` falls; left out: a fifth."
    )
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="Where it ends, as a share of the peak.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999))
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="The 8-bit ones keep their moments in 8 bits, on CUDA (extra `bitsandbytes`)."
    )
    trainable: Literal["full", "lora"] = Field(
        "full", description="`full`: the tail's projections and norm; `lora`: adapters on the former (extra `lora`)."
    )
    lora: LoraSection | None = Field(None, description="With `trainable: lora`; left out: its defaults.")
    gradient_checkpointing: bool = Field(
        False, description="Keep only each tail layer's input for the backward pass: less memory, a third more time."
    )
    max_loss_ratio: float = Field(
        10.0,
        ge=0,
        description="Stop at a loss above this multiple of the median of the last 100 steps (20 at least); 0: never.",
    )
    seed: int = Field(0, ge=0, lt=2**32)
    checkpoint_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: only at the end or when stopped.")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept.")
    evaluate_every: int = Field(
        0, ge=0, description="Steps between held-out evaluations; 0: only at the start and end."
    )
    evaluate_tokens: int = Field(8192, ge=1, description="Held-out tokens per source and evaluation during training.")
    log_every: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _lora_goes_with_trainable_lora(self) -> TrainingSection:
        if self.trainable == "full" and self.lora is not None:
            raise ValueError("`lora` goes with `trainable: lora`")
        if self.trainable == "lora" and self.lora is None:
            self.lora = LoraSection()  # type: ignore[call-arg]
        return self

    @model_validator(mode="after")
    def _decay_goes_with_wsd(self) -> TrainingSection:
        if self.schedule != "wsd" and self.decay is not None:
            raise ValueError("`decay` goes with `schedule: wsd`")
        if self.schedule == "wsd" and self.decay is None:
            self.decay = 0.2
        return self

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_from_yaml(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class DistributedSection(Section):
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "ddp",
        description="What processes hold in parts: nothing (DDP); DeepSpeed ZeRO-1: moments, 2: gradients too, "
        "3: weights too; FSDP2: all of these.",
    )
    sequence_parallel: int = Field(
        1, ge=1, description="Processes that share every sequence (DeepSpeed-Ulysses), for those too long for one."
    )
    deepspeed_config: Place | None = Field(
        None, description="A DeepSpeed JSON file with more settings (offloading, buckets), with `zero1` to `zero3`."
    )

    @model_validator(mode="after")
    def _deepspeed_config_goes_with_zero(self) -> DistributedSection:
        if self.deepspeed_config is not None and not self.strategy.startswith("zero"):
            raise ValueError("`deepspeed_config` goes with `strategy: zero1`, `zero2` or `zero3`")
        return self


class WandbSection(Section):
    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class LoggingSection(Section):
    wandb: WandbSection | None = Field(None, description="Also log to Weights & Biases (extra `wandb`).")
    tensorboard: bool = Field(
        False, description="Also write TensorBoard's files to RUN/tensorboard (extra `tensorboard`)."
    )


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    rewrite: RewriteSection
    calibration: CalibrationSection = Field(default_factory=CalibrationSection)  # type: ignore[arg-type]
    data: DataSection
    loss: LossSection = Field(default_factory=LossSection)  # type: ignore[arg-type]
    training: TrainingSection
    distributed: DistributedSection = Field(default_factory=DistributedSection)  # type: ignore[arg-type]
    logging: LoggingSection = Field(default_factory=LoggingSection)  # type: ignore[arg-type]

    def to_yaml(self) -> str:
        return to_yaml(self.model_dump(mode="json"))
