"""Packed documents as kernels for sequences of several lengths take them: end to end, in one row.

Shapes: S queries, P keys (P at least S), B batch, N heads, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where documents begin in a row of all queries and in a row of all keys; int32, ends included.

    Document i has queries[i] to queries[i + 1], which may be none, and those are the last of its keys.
    """

    queries: Tensor
    keys: Tensor


def of_each_tensor(function: Callable[..., T]) -> Callable[..., T]:
    """Remember what a function makes of its last eight tensors, until they are written to.

    All layers of a batch have the same, and values would have to be read from the device.
    """

    @lru_cache(maxsize=8)
    def remembered(_: object, tensor: Tensor, *others: int) -> T:
        return function(tensor, *others)

    @wraps(function)
    def call(tensor: Tensor, *others: int) -> T:
        # An inference tensor does not count what is written to it.
        times_written = object() if tensor.is_inference() else tensor._version
        return remembered(times_written, tensor, *others)

    call.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return call


@of_each_tensor
def boundaries(first_SB: Tensor, num_keys: int) -> Boundaries:
    """Return them for sequences one after the other; waits once for the device, to count documents.

    Args:
        first_SB: where the document of each query begins, counted among the keys; below 0: before
            them.
        num_keys: P; the queries are of the last positions.
    """
    seq_len, batch = first_SB.shape
    first_BS = first_SB.clamp(min=0).T
    # What stands before the first document of a sequence has no queries, and gradients of zero. As
    # a document it is given them: a kernel writes those of documents only.
    begins = torch.ones(batch, seq_len + 1, dtype=torch.bool, device=first_SB.device)
    begins[:, 2:] = first_BS[:, 1:] != first_BS[:, :-1]
    row = torch.arange(batch, device=first_SB.device)[:, None]
    queries = pad(torch.arange(seq_len, device=first_SB.device), (1, 0)) + row * seq_len
    keys = pad(first_BS, (1, 0)) + row * num_keys
    return Boundaries(
        queries=pad(queries[begins], (0, 1), value=batch * seq_len).int(),
        keys=pad(keys[begins], (0, 1), value=batch * num_keys).int(),
    )


def in_one_row(x_BNSD: Tensor) -> Tensor:
    """Return [B * S, N, D], one sequence after the other."""
    return x_BNSD.transpose(1, 2).flatten(0, 1)


def in_rows(x: Tensor, batch: int) -> Tensor:
    """Return [B, N, S, D] of [B * S, N, D]."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)
