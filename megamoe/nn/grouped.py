"""A linear map for each group of rows: the matrix products of experts.

Shapes: T rows sorted by group, E groups, I inner and O outer dimension of the map.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

_Context = Any  # torch's own type does not know saved_tensors


def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Return x @ weight[e].T for the rows of each group e.

    By torch's grouped_mm where it takes the operands, else one product a group. The first reads the
    counts on the device; for the second they come to the host, which waits for them.

    Args:
        x_TI: rows, those of group 0 first.
        weight_EOI: one matrix a group.
        counts_E: rows of each group, integers on any device; they add up to T.
    """
    if len(x_TI) > 0 and is_served(x_TI.device, x_TI.dtype, weight_EOI.shape[1:]):
        # On its way to a GPU, a copy from pageable memory does not wait for the work queued there.
        ends_E = counts_E.to(x_TI.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        return _apply(OneKernel, x_TI, weight_EOI, ends_E)
    return _apply(OneByOne, x_TI, weight_EOI, counts_E.tolist())


def is_served(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Tell whether torch's grouped_mm multiplies such groups, and as one.

    It wants rows of whole 16 bytes. On a GPU it is one kernel in bfloat16 from Hopper on (torch
    2.11), and otherwise a loop that waits for the counts; on a CPU it is a loop in any case, without
    Python's part in it.
    """
    if any(size * dtype.itemsize % 16 for size in shape):
        return False
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return dtype is torch.bfloat16 and major >= 9
    return _is_served_on_cpu(dtype)


def _apply(
    function: type[torch.autograd.Function], x_TI: Tensor, weight_EOI: Tensor, groups: object
) -> Tensor:
    output: Tensor = function.apply(x_TI, weight_EOI, groups)  # type: ignore[no-untyped-call]
    return output


@cache
def _is_served_on_cpu(dtype: torch.dtype) -> bool:
    """Try it: which types a CPU's grouped_mm takes differs between versions of torch."""
    one, ends = torch.ones(8, 8, dtype=dtype), torch.tensor([8], dtype=torch.int32)
    try:
        grouped_mm(grouped_mm(one, one[None], offs=ends).T, one, offs=ends)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


class OneKernel(torch.autograd.Function):
    """The map by torch's grouped_mm, which takes the rows' ends on the device."""

    @staticmethod
    def forward(ctx: _Context, x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Return [T, O]."""
        x_TI = x_TI.contiguous()
        ctx.save_for_backward(x_TI, weight_EOI, ends_E)
        return grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and weights; a group without rows has zeros."""
        x_TI, weight_EOI, ends_E = ctx.saved_tensors
        grad_TO = gradients[0].contiguous()
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grouped_mm(grad_TO, weight_EOI, offs=ends_E)
        if ctx.needs_input_grad[1]:
            weight_grad = grouped_mm(grad_TO.T, x_TI, offs=ends_E)
            # Hopper's kernel writes zeros; Blackwell's leaves what was in memory (pytorch/pytorch
            # issue 172439).
            if grad_TO.is_cuda and torch.cuda.get_device_capability(grad_TO.device) >= (10, 0):
                is_empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
                weight_grad = weight_grad.masked_fill(is_empty_E[:, None, None], 0.0)
        return x_grad, weight_grad, None


class OneByOne(torch.autograd.Function):
    """The map by one product a group: any dtype, any size, any device."""

    @staticmethod
    def forward(ctx: _Context, x_TI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
        """Return [T, O]."""
        ctx.save_for_backward(x_TI, weight_EOI)
        ctx.counts = counts
        output_TO = x_TI.new_empty(len(x_TI), weight_EOI.shape[1])
        for rows, weight_OI in zip(_slices(counts), weight_EOI.unbind(), strict=True):
            torch.mm(x_TI[rows], weight_OI.T, out=output_TO[rows])
        return output_TO

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and weights; a group without rows has zeros."""
        x_TI, weight_EOI = ctx.saved_tensors
        grad_TO = gradients[0].contiguous()
        x_grad = torch.empty_like(x_TI)
        weight_grad = torch.empty_like(weight_EOI)
        for group, rows in enumerate(_slices(ctx.counts)):
            torch.mm(grad_TO[rows], weight_EOI[group], out=x_grad[rows])
            torch.mm(grad_TO[rows].T, x_TI[rows], out=weight_grad[group])
        return x_grad, weight_grad, None


def _slices(counts: list[int]) -> list[slice]:
    """Return the rows of each group."""
    return [slice(start, end) for start, end in pairwise(accumulate(counts, initial=0))]
