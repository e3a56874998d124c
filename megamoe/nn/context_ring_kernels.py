"""Kernels for the steps of a ring, and which of them a case is given: those of packages first, then torch's.

As in megamoe/nn/attention_gpu.py a kernel is trusted after it has given the right output and gradients of a small
example.

Shapes: B batch, N heads, Q queries, K keys.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megamoe.nn import context_ring_packages as packages
from megamoe.nn.attention_gpu import agree, dense
from megamoe.nn.attention_packages import widened
from megamoe.nn.context_heads import GroupedHeads, LatentHeads
from megamoe.nn.context_ring_step import Result, Step, StepKernel, Tensors, merge_into, narrowed

_CHUNK, _EARLIER = 80, 56  # queries of the example, and keys before theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """What the choice of a kernel depends on."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    has_documents: bool  # which cut steps
    deterministic: bool


def case_of(
    heads: LatentHeads | GroupedHeads,
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_documents: bool,
) -> StepCase:
    """Return the case of a layer's steps, as torch is set now."""
    return StepCase(
        device=device,
        dtype=dtype,
        key_dim=heads.key_dim,
        value_dim=heads.value_dim,
        has_documents=has_documents,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@cache
def choose(case: StepCase) -> StepKernel | None:
    """Return a kernel that does a step of the case right; None: scores are written out."""
    return next((kernel for kernel in KERNELS.values() if is_right(kernel, case)), None)


def is_right(kernel: StepKernel, case: StepCase) -> bool:
    """Tell whether two steps, merged, are attention to the keys of both, gradients included."""
    generator = torch.Generator().manual_seed(1)
    widths = (case.key_dim, case.key_dim, case.value_dim, case.value_dim)
    lengths = (_CHUNK, _EARLIER + _CHUNK, _EARLIER + _CHUNK, _CHUNK)
    *inputs, upstream = (
        torch.randn(1, 2, length, width, generator=generator).to(case.device, case.dtype)
        for length, width in zip(lengths, widths, strict=True)
    )
    with torch.enable_grad():
        q, k, v = (x.float().clone().requires_grad_() for x in inputs)
        output = dense(q, k, v, None, case.key_dim**-0.5)
        expected = (output.detach(), *torch.autograd.grad(output, (q, k, v), upstream.float()))
    try:
        ours = _two_steps(kernel, inputs, upstream, is_cut=case.has_documents)
        return agree(ours, expected)
    except Exception:  # whatever a kernel refuses with, and tensors that have no values
        return False


def _two_steps(
    kernel: StepKernel, inputs: list[Tensor], upstream: Tensor, *, is_cut: bool
) -> tuple[Tensor, ...]:
    """Return output and gradients of queries that see earlier keys and their own."""
    q, k, v = inputs
    steps = [
        Step(
            query=q,
            key=k[:, :, keys],
            value=v[:, :, keys],
            is_causal=keys.start is not None,
            is_cut=is_cut,
            scale=q.shape[-1] ** -0.5,
        )
        for keys in (slice(_EARLIER), slice(_EARLIER, None))
    ]
    (output, log_sum), own = (
        (output.to(log_sum.dtype), log_sum) for output, log_sum in map(kernel.forward, steps)
    )
    merge_into((output, log_sum), own)
    result = output.to(q.dtype), log_sum
    first, second = (kernel.backward(step, upstream, result) for step in steps)
    keys_and_values = (torch.cat(both, dim=2) for both in zip(first[1:], second[1:], strict=True))
    return output, first[0].float() + second[0].float(), *keys_and_values


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
    return narrowed(grads, step)


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
    return narrowed(grads, step)


KERNELS = {
    "flash_attn_3": packages.FLASH_ATTN_3,
    "transformer_engine": packages.TRANSFORMER_ENGINE,
    "flash_attn_2": packages.FLASH_ATTN_2,
    "flash": StepKernel(_flash, _flash_gradients),
    "flash_on_cpu": StepKernel(_flash_on_cpu, _flash_gradients_on_cpu),
}
