"""A step of a ring by torch's FlashAttention: queries to a chunk of keys among those they see.

A step returns the logarithm of the sum of exponentials with its output, so that steps can be merged. Its
gradients take the merged output and sum: with them the weights of a step are those of the whole
softmax (Liu et al. 2023).

As in megamoe/nn/attention_gpu.py a kernel is trusted after it has given the right output and gradients of a small
example. flash-attn has the same two functions, but they are its own: their arguments differ from version to
version.

Shapes: B batch, N heads, Q queries, K keys (Q of them where the step is causal), D query and key head
dimension, V value head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megamoe.nn.attention_gpu import agree, dense
from megamoe.nn.attention_packages import widened

Tensors = tuple[Tensor, Tensor, Tensor]
Result = tuple[Tensor, Tensor]  # output [B, N, Q, V] and logarithm of the sum [B, N, Q]
_CHUNK = 80  # of the example


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Queries [B, N, Q, D], keys [B, N, K, D] and values [B, N, K, V]."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool  # queries and keys are of the same positions; else every query sees every key
    scale: float

    @property
    def tensors(self) -> Tensors:
        """Return queries, keys and values."""
        return self.query, self.key, self.value


@dataclass(frozen=True, slots=True)
class StepKernel:
    """What does a step, and what gives its gradients from that of the output, and the merged result."""

    forward: Callable[[Step], Result]
    backward: Callable[[Step, Tensor, Result], Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """What the choice of a kernel depends on."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    deterministic: bool


@cache
def choose(case: StepCase) -> StepKernel | None:
    """Return a kernel that does a step of the case right; None: scores are written out."""
    for kernel in KERNELS.values():
        if is_right(kernel, case):
            return kernel
    return None


def is_right(kernel: StepKernel, case: StepCase) -> bool:
    """Tell whether two steps, merged, are attention to both their chunks, gradients included."""
    generator = torch.Generator().manual_seed(1)
    widths = (case.key_dim, case.key_dim, case.value_dim, case.value_dim)
    lengths = (_CHUNK, 2 * _CHUNK, 2 * _CHUNK, _CHUNK)
    *inputs, upstream = (
        torch.randn(1, 2, length, width, generator=generator).to(case.device, case.dtype)
        for length, width in zip(lengths, widths, strict=True)
    )
    with torch.enable_grad():
        q, k, v = (x.float().clone().requires_grad_() for x in inputs)
        output = dense(q, k, v, None, case.key_dim**-0.5)
        expected = (output.detach(), *torch.autograd.grad(output, (q, k, v), upstream.float()))
    try:
        return agree(_two_steps(kernel, inputs, upstream), expected)
    except Exception:  # whatever a kernel refuses with, and tensors that have no values
        return False


def merged(one: Result, other: Result) -> Result:
    """Return the output for the keys of both, and its sum."""
    log_sum = torch.logaddexp(one[1], other[1])
    shift = finite(log_sum)
    terms = (out * (s - shift).exp()[..., None] for out, s in (one, other))
    return sum(terms, start=torch.zeros_like(one[0])), log_sum


def finite(log_sum: Tensor) -> Tensor:
    """Return 0 for queries that have seen no key yet, so that nothing is -inf less -inf."""
    return log_sum.masked_fill(log_sum == -torch.inf, 0.0)


def _two_steps(kernel: StepKernel, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Return output and gradients of queries that see an earlier chunk and their own."""
    q, k, v = inputs
    steps = [
        Step(
            query=q,
            key=k[:, :, begin : begin + _CHUNK],
            value=v[:, :, begin : begin + _CHUNK],
            is_causal=begin > 0,
            scale=q.shape[-1] ** -0.5,
        )
        for begin in (0, _CHUNK)
    ]
    output, log_sum = merged(*((out.float(), s) for out, s in map(kernel.forward, steps)))
    result = output.to(q.dtype), log_sum
    earlier, own = (kernel.backward(step, upstream, result) for step in steps)
    keys_and_values = (torch.cat(both, dim=2) for both in zip(earlier[1:], own[1:], strict=True))
    return output, earlier[0].float() + own[0].float(), *keys_and_values


def _flash(step: Step) -> Result:
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention.default(
        *widened(*step.tensors), is_causal=step.is_causal, scale=step.scale
    )[:2]
    return output[..., : step.value.shape[-1]], log_sum


def _flash_gradients(step: Step, grad: Tensor, result: Result) -> Tensors:
    q, k, v, output, upstream = widened(*step.tensors, result[0], grad)
    lengths = (None, None, q.shape[2], k.shape[2])
    no_dropout = (q.new_zeros(2, dtype=torch.uint64), q.new_empty(0))  # state of random numbers
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
        *(upstream, q, k, v, output, result[1], *lengths, 0.0, step.is_causal, *no_dropout),
        scale=step.scale,
    )
    return _narrowed(grads, step)


def _flash_on_cpu(step: Step) -> Result:
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        *widened(*step.tensors), is_causal=step.is_causal, scale=step.scale
    )
    return output[..., : step.value.shape[-1]], log_sum


def _flash_gradients_on_cpu(step: Step, grad: Tensor, result: Result) -> Tensors:
    q, k, v, output, upstream = widened(*step.tensors, result[0], grad)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *(upstream, q, k, v, output, result[1], 0.0, step.is_causal), scale=step.scale
    )
    return _narrowed(grads, step)


def _narrowed(grads: Tensors, step: Step) -> Tensors:
    """Return the gradients without those of the zeros that made one width."""
    q, k, v = (grad[..., : x.shape[-1]] for grad, x in zip(grads, step.tensors, strict=True))
    return q, k, v


KERNELS = {
    "flash": StepKernel(_flash, _flash_gradients),
    "flash_on_cpu": StepKernel(_flash_on_cpu, _flash_gradients_on_cpu),
}
