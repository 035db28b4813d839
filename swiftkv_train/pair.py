"""A checkpoint and the base that it was made from: do they belong together?"""

from __future__ import annotations

import torch

from swiftkv_models import optimize_for_cpu
from swiftkv_train.errors import UserError
from swiftkv_train.loading import Model, load_for_inference

UNCHANGED = (  # settings that shapes do not tell of
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
)


def load_pair(checkpoint: str, base: str, *, optimized: bool = True) -> tuple[Model, Model]:
    """Both for inference, on the same device and in the same dtype; a base not `optimized` runs as transformers' own.

    Raises:
        UserError: no such model, or `base` is not the one that `checkpoint` was made from.
    """
    student = load_for_inference(checkpoint, families=("llama_swiftkv",))
    # First as the checkpoint is stored, for that may have rounded what the base is stored in.
    loaded = load_for_inference(base, families=("llama",), dtype=student.config.dtype, optimized=False)
    loaded.to(student.dtype)
    sizes = student.config.vocab_size, loaded.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"vocabulary mismatch: {checkpoint} has {sizes[0]} tokens, {base} has {sizes[1]}; "
            "give the base that the checkpoint was made from"
        )
    if odd := first_difference(student, loaded):
        raise UserError(f"{base} is not the model that {checkpoint} was made from: {odd} differs; give that model")
    return student, optimize_for_cpu(loaded) if optimized else loaded


def first_difference(student: Model, base: Model, tolerance: float = 0.0) -> str | None:
    """What first differs of that which a rewrite leaves as it is in the base: a setting, or a tensor by name.

    A tensor: by more than `tolerance` of its norm. `base` may be in SwiftKV form too.
    """
    for name in UNCHANGED:
        if getattr(student.config, name) != getattr(base.config, name):
            return name
    modules = dict(student.named_modules())
    for path, module in base.named_modules():
        mine = modules.get(path)
        # A projection that an export leaves out; what the rewrite has added; leaves hold the tensors.
        if mine is None or "_swiftkv" in path or any(module.children()):
            continue
        held = mine.state_dict()
        for name, tensor in module.state_dict().items():
            if not (torch.equal(held[name], tensor) if tolerance == 0 else _near(held[name], tensor, tolerance)):
                return f"{path}.{name}"
    return None


def _near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    one, other = one.float(), other.float()
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())
