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
    _mend_gathered_state(built)
    _mend_missing_steps(built)
    return built


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give each weight of a loaded torch Adam its own step counter, where Adam wants it.

    Megatron-Core 0.16.1 distrib_optimizer.py:825 (0.19.2: 1032) puts one tensor into the state of
    all weights; Adam then counts one step for each weight, and its bias correction is lost.
    """
    for inner in (part.optimizer for part in _parts(optimizer)):
        if not _is_torch_adam(inner):
            continue
        _choose_kernel(inner)  # a checkpoint brings the choice of the machine that made it
        for weight, state in inner.state.items():
            state["step"] = state["step"].to(_step_device(weight), copy=True)


def _mend_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Let the state of a torch Adam be saved before its first step, and loaded.

    Megatron-Core 0.16.1 distrib_optimizer.py:642 (0.19.2: 839) reads the state's `step` where a
    torch Adam that has made no step has none; :940 (0.19.2: 1223) then looks for it among loaded
    tensors, where it never is.
    """
    for part in _parts(optimizer):
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
        part._set_main_param_and_optimizer_states = partial(_set_states, part)


def _mend_gathered_state(optimizer: MegatronOptimizer) -> None:
    """Let each weight's state be cut from where it is when a checkpoint gathers it.

    Megatron-Core 0.16.1 distrib_optimizer.py:1118 leaves out the padding between buckets, :1494 looks
    for weights where they are with it (0.19.2: 1403 and 1790): the state of all but the first bucket is shifted. A table
    that pipeline ranks share, for MTP or tied, has a bucket of its own, the second one.
    """
    for part in _parts(optimizer):
        if hasattr(part, "get_parameter_state_dp_zero"):
            gather = part.get_parameter_state_dp_zero
            part.get_parameter_state_dp_zero = partial(_gather_with_padding, part, gather)


def _mend_missing_steps(optimizer: MegatronOptimizer) -> None:
    """Let a part without a weight on this rank know its step, when a checkpoint asks for it.

    Experts and all other weights are a part each; a pipeline rank may hold an embedding alone. There
    Megatron-Core 0.16.1 distrib_optimizer.py:642 (0.19.2: 839) finds no state of a torch Adam to read
    the step of. All parts have made the same steps.
    """
    parts = [part for part in _parts(optimizer) if _is_torch_adam(part.optimizer)]
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


def _gather_with_padding(part: Any, gather: Any, **options: Any) -> Any:
    state = gather(**options)
    for index, by_dtype in (state or {}).items():
        for tensors in by_dtype.values() if isinstance(by_dtype, dict) else ():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                tensors[name] = _with_padding(part.buffers[index], tensors[name])
    return state


def _with_padding(buffer: Any, packed: Tensor) -> Tensor:
    assert len(packed) == buffer.numel_unpadded, (len(packed), buffer.numel_unpadded)
    whole = packed.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start:end]
        start = end
    return whole


def _choose_kernel(inner: Any) -> None:
    """Update weights on a GPU in one pass; what torch does there unasked makes copies of them all."""
    for group in inner.param_groups:
        group["fused"] = True if any(weight.is_cuda for weight in group["params"]) else None


def _step_device(weight: Tensor) -> torch.device:
    """Return where a torch Adam keeps its step: with the weight when it works in one pass."""
    return weight.device if weight.is_cuda else torch.device("cpu")


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _is_torch_adam(inner: Any) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _set_states(part: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    group_index, group_order = part.model_param_group_index_map[model_param]
    weight = part.optimizer.param_groups[group_index]["params"][group_order]
    step = part.optimizer.state[weight]["step"]
    type(part)._set_main_param_and_optimizer_states(part, model_param, {"step": step, **tensors})
