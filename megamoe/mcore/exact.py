"""Sums whose order does not matter, so that data parallelism changes no bit of a float32 run.

A gradient is summed over micro-batches on a rank and then over ranks; in float32 the two orders
round apart, and a router sends a token elsewhere some fifty steps later. In float32 runs (parity,
CPU) that sum is kept in float64; the norm of the gradient is a float64 sum in all runs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import distributed_data_parallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import optimizer
from torch import Tensor


class _Float64GradBuffer(_ParamAndGradBuffer):
    """Megatron-core's gradient buffer of float32 weights, in float64."""

    def __init__(
        self, ddp_config: Any, param_dtype: torch.dtype, _: torch.dtype, *args: Any, **options: Any
    ) -> None:
        """Take Megatron-core's arguments and another dtype of the gradient."""
        assert param_dtype is torch.float32, param_dtype
        super().__init__(ddp_config, param_dtype, torch.float64, *args, **options)


@contextmanager
def float64_gradients() -> Iterator[None]:
    """Give models wrapped inside it gradient buffers in float64.

    Megatron-Core 0.16.1 distributed_data_parallel.py:147 (0.19.2: param_and_grad_buffer.py:917)
    knows float32 and the weights' dtype only.
    """
    distributed_data_parallel._ParamAndGradBuffer = _Float64GradBuffer
    try:
        yield
    finally:
        distributed_data_parallel._ParamAndGradBuffer = _ParamAndGradBuffer


def use_float64_norm() -> None:
    """Have Megatron-core's optimizers take the norm of their gradients from `gradient_norm`."""
    optimizer.get_grad_norm_fp32 = gradient_norm


def gradient_norm(
    grads_for_norm: Iterable[Tensor] | Tensor,
    norm_type: float = 2.0,
    grad_stats_parallel_group: Any = None,
) -> float:
    """Return the L2 norm over all gradients of all ranks of the group, summed in float64."""
    assert norm_type == 2.0, norm_type
    grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else grads_for_norm
    total = torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device())
    for grad in grads:
        total += torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
    torch.distributed.all_reduce(total, group=grad_stats_parallel_group)
    return float(total.sqrt())
