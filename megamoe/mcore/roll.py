"""The shift of tokens for multi-token prediction, where ranks of cp share a sequence.

Shapes: B batch, L tokens of this rank.
"""

from typing import Any

import torch
from torch import Tensor

from megamoe.mcore import groups
from megamoe.nn.context_tokens import next_tokens


def roll_tensor(
    tensor_BL: Tensor,
    shifts: int = -1,
    dims: int = -1,
    cp_group: Any = None,  # noqa: ARG001 - Megatron-core's call; ours is of the segment
    packed_seq_params: None = None,
) -> tuple[Tensor, Tensor]:
    """Return the next token of each, 0 after the end of the sequence, and the mean sum over cp.

    Megatron-Core 0.16.1 and 0.19.2 transformer/multi_token_prediction.py roll_tensor takes a rank's
    tokens for an early and a late chunk, and returns the sum of the rank alone. Where that is the
    number of tokens that a loss is divided by for a report, ranks would report means of unlike
    weight.
    """
    assert (shifts, dims % tensor_BL.ndim) == (-1, tensor_BL.ndim - 1), (shifts, dims)
    assert packed_seq_params is None, "documents are not masked"
    cp = groups.context("tokens")
    rolled_BL = next_tokens(tensor_BL.transpose(0, -1), cp, shift=1, fill=0).transpose(0, -1)
    total = rolled_BL.sum()
    if cp.size > 1 and rolled_BL.is_floating_point():
        torch.distributed.all_reduce(total, group=cp.group)
        total = total / cp.size
    return rolled_BL, total
