"""A step of a ring: queries to some of the keys they see, and how steps are merged.

A step gives the logarithm of the sum of exponentials with its output, so that it can be merged with others
(Milakov and Gimelshein 2018). Its gradients take the merged output and sum: with them the weights of a step
are those of the whole softmax (Liu et al. 2023).

Shapes: B batch, N heads, Q queries, K keys (Q of them where the step is causal), D query and key head
dimension, V value head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, Tensor, Tensor]
Result = tuple[Tensor, Tensor]  # output [B, N, Q, V] and logarithm of the sum [B, N, Q]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Queries [B, N, Q, D], keys [B, N, K, D] and values [B, N, K, V]."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool  # queries and keys are of the same positions; else every query sees every key
    is_cut: bool  # by documents: lengths differ from batch to batch
    scale: float

    @property
    def tensors(self) -> Tensors:
        """Return queries, keys and values."""
        return self.query, self.key, self.value


@dataclass(frozen=True, slots=True)
class StepKernel:
    """What does a step, and what gives its gradients from that of the output, and the merged result.

    The sum is float32, or wider as the operands are; that of the merged result is contiguous.
    """

    forward: Callable[[Step], Result]
    backward: Callable[[Step, Tensor, Result], Tensors]


def narrowed(grads: Tensors, step: Step) -> Tensors:
    """Return the gradients of a step without those of zeros that made its tensors as wide as each other."""
    q, k, v = (grad[..., : x.shape[-1]] for grad, x in zip(grads, step.tensors, strict=True))
    return q, k, v


def merge_into(total: Result, step: Result) -> None:
    """Add a step to the output and the sum of the steps so far, in place."""
    log_sum = torch.logaddexp(total[1], step[1])
    shift = finite(log_sum)
    so_far, new = ((each - shift).exp()[..., None] for each in (total[1], step[1]))
    total[0].mul_(so_far).add_(step[0] * new)
    total[1].copy_(log_sum)


def finite(log_sum: Tensor) -> Tensor:
    """Return 0 for queries that have seen no key yet, so that nothing is -inf less -inf."""
    return log_sum.masked_fill(log_sum == -torch.inf, 0.0)
