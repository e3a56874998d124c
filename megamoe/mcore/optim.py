"""The optimizer of one segment: Megatron-core's distributed optimizer, set by the plan each step."""

from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megamoe.mcore.config import parameter_dtype
from megamoe.mcore.exact import use_float64_norm
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe import AdamW


def build_optimizer(
    plan: Plan, segment: Segment, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Return the optimizer over all model chunks of this rank."""
    optimizer = plan.optimizer
    assert isinstance(optimizer, AdamW), optimizer  # megamoe/plan/trainable.py
    use_float64_norm()
    dtype = parameter_dtype(segment)
    built = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            # Set before each step. The segment's peak must not stand here: Megatron-Core 0.19.2
            # optimizer/optimizer.py:139 looks for the parameter groups of a checkpoint by it.
            lr=0.0,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.grad_clip,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        chunks,
    )
    _mend_torch_adam(built)
    _mend_missing_steps(built)
    return built


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers of a chain, or the one there is: experts have one of their own."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give each weight of a loaded torch Adam its own step counter, where Adam wants it.

    Megatron-Core 0.16.1 distrib_optimizer.py:825 (0.19.2: 1032) puts one tensor into the state of
    all weights; Adam then counts one step for each weight, and its bias correction is lost.
    """
    for inner in (part.optimizer for part in parts_of(optimizer)):
        if not _is_torch_adam(inner):
            continue
        _choose_kernel(inner)  # a checkpoint brings the choice of the machine that made it
        for weight, state in inner.state.items():
            state["step"] = state["step"].to(_step_device(weight), copy=True)


def _mend_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Let the state of a torch Adam be saved before its first step, and loaded.

    Megatron-Core 0.16.1 distrib_optimizer.py:642 (0.19.2: 839) reads the state's `step` where a
    torch Adam that has made no step has none.
    """
    for part in parts_of(optimizer):
        inner = part.optimizer
        if not _is_torch_adam(inner):
            continue
        _choose_kernel(inner)
        for group in inner.param_groups:
            for weight in group["params"]:
                inner.state[weight] = {
                    "step": torch.zeros((), device=_step_device(weight)),
                    "exp_avg": torch.zeros_like(weight.data),
                    "exp_avg_sq": torch.zeros_like(weight.data),
                }


def _mend_missing_steps(optimizer: MegatronOptimizer) -> None:
    """Let a part without a weight on this rank know its step, when a checkpoint asks for it.

    Experts and all other weights are a part each; a pipeline rank may hold an embedding alone. There
    Megatron-Core 0.16.1 distrib_optimizer.py:642 (0.19.2: 839) finds no state of a torch Adam to read
    the step of. All parts have made the same steps.
    """
    parts = [part for part in parts_of(optimizer) if _is_torch_adam(part.optimizer)]
    for part in parts:
        part.state_dict = partial(_state_with_step, part, parts)


def _state_with_step(part: Any, parts: list[Any]) -> dict[str, Any]:
    states = part.optimizer.state
    known = [state for other in parts for state in other.optimizer.state.values()]
    is_empty = not states and bool(known)
    if is_empty:
        states["no weight"] = {"step": known[0]["step"]}
    try:
        return type(part).state_dict(part)
    finally:
        if is_empty:
            states.clear()


def _choose_kernel(inner: Any) -> None:
    """Update weights on a GPU in one pass; what torch does there unasked makes copies of them all."""
    for group in inner.param_groups:
        group["fused"] = True if any(weight.is_cuda for weight in group["params"]) else None


def _step_device(weight: Tensor) -> torch.device:
    """Return where a torch Adam keeps its step: with the weight when it works in one pass."""
    return weight.device if weight.is_cuda else torch.device("cpu")


def _is_torch_adam(inner: Any) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
