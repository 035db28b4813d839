"""How a run is spread over processes: plain or DDP, DeepSpeed ZeRO-1, 2 and 3, FSDP2.

A strategy wraps the loss module, makes the optimizer, runs backward passes and steps, and turns the trained tensors and
the optimizer's moments into whole tensors and back. So a checkpoint is the same whatever wrote it, and a run may go on
under another strategy or number of processes. The settings come from the recipe alone.

Gradients are averaged over processes by all of them. Precision is the module's own affair (autocast in its forward):
DeepSpeed is told of no half precision, or it would cast the fp32 master weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swiftkv_train.deepspeed_settings import deepspeed_config
from swiftkv_train.errors import UserError
from swiftkv_train.loading import compute_device, tell_deepspeed_of_cpu
from swiftkv_train.quantized_base import import_bitsandbytes
from swiftkv_train.recipe import Recipe
from swiftkv_train.student import tail_parameters, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    Moments = dict[str, torch.Tensor]


# How long processes wait for each other: while the main one writes a checkpoint to a slow or full disk, or tokenises.
PATIENCE = timedelta(hours=3)


class DataParallel:
    """One process, or DDP. The other strategies state what differs."""

    shards_weights = False  # whether a process holds only its part of the frozen weights too
    equal_forwards = False  # whether every process must run forward and backward equally often

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.accelerator = self._make_accelerator()
        self.model: Any  # the model inside of `module`
        self.unwrapped: Any
        self.module: Any
        self.optimizer: Any

    def _make_accelerator(self) -> Accelerator:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        half = "fp16" if self.recipe.model.dtype == "float16" else "no"  # fp16 for its gradient scaler
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        return Accelerator(mixed_precision=half, cpu=compute_device().type == "cpu", kwargs_handlers=[patience])

    def wrap(self, module: nn.Module) -> None:
        """Take the module whose forward is the loss, and make the optimizer of its trainable parameters."""
        self.unwrapped, self.model = module, module.model
        self.module, self.optimizer = self.accelerator.prepare(module, self._make_optimizer(module))
        self.module.eval()  # no dropout: base and student must see the same network

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        training = self.recipe.training
        return _optimizer_class(training.optimizer, self.accelerator.device)(
            trainable_parameters(module).values(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the model; a part of each where the strategy shards."""
        return trainable_parameters(self.model)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch: only the `last` of a step exchanges gradients."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, learning_rate: float, check: Callable[[float], None]) -> float:
        """Clip, `check` the gradient norm (which may raise), update; returns the norm before clipping."""
        norm = float(self._clip())
        check(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> torch.Tensor:
        return self.accelerator.clip_grad_norm_(list(self.parameters().values()), self.recipe.training.max_grad_norm)

    def tail_tensors(self) -> dict[str, torch.Tensor]:
        """The whole tensors of the tail, trained or not, by name. Every process must call it; the main one has them."""
        return {name: self._whole(parameter.detach()) for name, parameter in tail_parameters(self.model).items()}

    def optimizer_tensors(self) -> Moments:
        """AdamW's state as whole tensors named `PARAMETER:KEY`. Every process must call it; the main one has them."""
        state = self.optimizer.state
        return {
            f"{name}:{key}": self._whole(value) if isinstance(value, torch.Tensor) else _step_tensor(value)
            for name, parameter in self.parameters().items()
            for key, value in state.get(parameter, {}).items()
        }

    def restore_optimizer(self, tensors: Moments) -> None:
        """Put back what `optimizer_tensors` gave."""
        parameters = self.parameters()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(":")
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
            value = _step_of(optimizer, tensor) if key == "step" else self._part(tensor, parameters[name])
            if key in ("state1", "state2"):  # bitsandbytes' moments, which a paged optimizer keeps in memory of its own
                value = optimizer.get_state_buffer(parameters[name], dtype=tensor.dtype).copy_(value)
            self.optimizer.state[parameters[name]][key] = value

    def close(self) -> None:
        """Leave the group of processes: together, or to those still talking it looks like a crash.

        DDP's inner parts go first: they hold on to the group, and gloo deadlocks if they are the last to let it go.
        """
        self.accelerator.wait_for_everyone()
        self.module = self.optimizer = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor put together for the main process to write, off its device: all of them would not fit there."""
        return tensor.cpu() if self.accelerator.is_main_process else tensor.new_empty(0)

    def _part(self, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        return tensor.to(parameter.device)


class FullyShard(DataParallel):
    """FSDP2: weights, gradients and moments in parts, a decoder layer gathered while it runs."""

    shards_weights = equal_forwards = True

    def wrap(self, module: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        self.unwrapped, self.model = module, module.model
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self.module, self.optimizer = module.eval(), self._make_optimizer(module)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)
        yield

    def _clip(self) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        norm = nn.utils.clip_grad_norm_(self.parameters().values(), self.recipe.training.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        return self._keep(tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor

    def _part(self, tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


class ZeRO(DataParallel):
    """DeepSpeed's ZeRO: moments in parts (1), gradients too (2), weights too (3)."""

    def __init__(self, recipe: Recipe):
        self.stage = int(recipe.distributed.strategy.removeprefix("zero"))
        self.shards_weights = self.stage == 3
        self.equal_forwards = self.stage >= 2  # every backward pass exchanges gradients
        super().__init__(recipe)

    def _make_accelerator(self) -> Accelerator:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        import_deepspeed(f"distributed.strategy {self.recipe.distributed.strategy}")
        on_cpu = compute_device().type == "cpu"
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(self.recipe))
        group = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=PATIENCE)
        accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=[group])
        # While this lives transformers loads models in parts; the rewrite needs them whole, and `wrap` parts them.
        plugin.dschf = None
        return accelerator

    def wrap(self, module: nn.Module) -> None:
        if self.stage == 3:
            import deepspeed

            # Part by part; otherwise the engine would put the whole model on the device first.
            deepspeed.zero.Init(module=module, config_dict_or_path=self.accelerator.deepspeed_plugin.deepspeed_config)
        super().wrap(module)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.module.step()  # counts the micro-batch, no more

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, check: Callable[[float], None]) -> float:
        """As elsewhere, but the norm is known, and checked, only after the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        check(norm)
        return norm

    def tail_tensors(self) -> dict[str, torch.Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in tail_parameters(self.model).items():
            if parameter.requires_grad:
                found[name] = self._keep(safe_get_full_fp32_param(parameter))
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = self._keep(parameter.detach().clone())
        return found

    def optimizer_tensors(self) -> Moments:
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for name, parameter in self.parameters().items():
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}:{key}"] = self._keep(safe_get_full_optimizer_state(parameter, key))
            found[f"{name}:step"] = _step_tensor(self._flat_states()[0]["step"])
        return found

    def restore_optimizer(self, tensors: Moments) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_moments()
        parameters = self.parameters()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(":")
            if key == "step":
                for state in self._flat_states():
                    state["step"] = _step_of(self.optimizer.optimizer.optimizer, tensor)
            else:
                safe_set_full_optimizer_state(parameters[name], tensor.to(self.accelerator.device), key)

    def _make_moments(self) -> None:
        """The empty state that AdamW otherwise makes at its first step, and DeepSpeed's views of it."""
        zero = self.optimizer.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:
            zero.state[part] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(part)}
            zero.state[part]["exp_avg_sq"] = torch.zeros_like(part)
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _flat_states(self) -> list[dict[str, Any]]:
        """The state of every flat tensor that DeepSpeed's inner optimizer steps."""
        return list(self.optimizer.optimizer.state.values())


def import_deepspeed(needed_by: str) -> Any:
    """The package. Raises UserError where it is not installed."""
    tell_deepspeed_of_cpu()
    try:
        import deepspeed
    except ImportError:
        raise UserError(f"{needed_by} needs DeepSpeed: DS_BUILD_OPS=0 pip install 'swiftkv-train[deepspeed]'") from None
    # On CPU it would compile an exchange of its own at first use, which not every machine can; gloo does it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _optimizer_class(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    if device.type != "cuda":
        raise UserError(f"training.optimizer {name} runs on CUDA only; use adamw")
    bitsandbytes = import_bitsandbytes(f"training.optimizer {name}")
    return bitsandbytes.optim.AdamW8bit if name == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit


def _step_tensor(step: torch.Tensor | float) -> torch.Tensor:
    """An optimizer's step as checkpoints hold it: a scalar, fp32."""
    return torch.as_tensor(step, dtype=torch.float32).clone()


def _step_of(optimizer: torch.optim.Optimizer, step: torch.Tensor) -> torch.Tensor | int:
    """As `optimizer` keeps it: torch's AdamW as that scalar, on the CPU; bitsandbytes' and DeepSpeed's as an int."""
    return step if isinstance(optimizer, torch.optim.AdamW) else int(step)


def check_precision(recipe: Recipe) -> None:
    """Raises UserError where a recipe's dtype, optimizer or quantisation does not go with its strategy."""
    name = recipe.distributed.strategy
    for key, value, instead in (
        ("model.dtype", recipe.model.dtype, "bfloat16"),
        ("training.optimizer", recipe.training.optimizer, "adamw"),
        ("model.quantization", recipe.model.quantization or "", "null"),
    ):
        if name != "ddp" and (value in ("float16", "int8", "nf4") or value.endswith("8bit")):
            raise UserError(f"{key} {value} trains under distributed.strategy ddp only, not {name}; use {instead}")


def make_strategy(recipe: Recipe) -> DataParallel:
    """The strategy of a recipe. Raises UserError when it cannot run here or the launcher was told something else."""
    name = recipe.distributed.strategy
    for variable, launcher, fitting in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", name.startswith("zero")),
        ("ACCELERATE_USE_FSDP", "FSDP", name == "fsdp2"),
    ):
        if os.environ.get(variable, "").lower() == "true" and not fitting:
            raise UserError(
                f"accelerate was launched with {launcher}, the recipe says distributed.strategy {name}; "
                "set distributed.strategy and launch without it"
            )
    check_precision(recipe)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and recipe.distributed.deepspeed_config is not None:
        raise UserError(
            f"distributed.deepspeed_config {recipe.distributed.deepspeed_config} is for several processes: start them "
            "with `accelerate launch -m swiftkv_train.distill` or `deepspeed --module swiftkv_train.distill`, or leave "
            "it out (distributed.deepspeed_config=null)"
        )
    if alone or name == "ddp":
        return DataParallel(recipe)
    return FullyShard(recipe) if name == "fsdp2" else ZeRO(recipe)
