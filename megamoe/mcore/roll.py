"""The shift of tokens for multi-token prediction: across the ranks of cp, and not across documents.

Shapes: B batch, S sequence, L tokens of this rank.
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
    packed_seq_params: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the next token of each, 0 after the end of its document or of the sequence, and one.

    Megatron-Core 0.16.1 and 0.19.2 transformer/multi_token_prediction.py roll_tensor takes a rank's
    tokens for an early and a late chunk. Its second result is the sum, by which it divides each
    rank's losses of each micro-batch for a report: means of unlike weight, and of no token NaN.
    Divided by one they are sums, and `num_targets` is what megamoe/mcore/measure.py divides by.

    Args:
        tensor_BL: this rank's.
        shifts: -1.
        dims: the last.
        cp_group: of no use.
        packed_seq_params: where the document of each token begins, [S, B], where they are masked;
            under the one name by which Megatron-core hands on what it knows of documents.
    """
    assert (shifts, dims % tensor_BL.ndim) == (-1, tensor_BL.ndim - 1), (shifts, dims)
    rolled_LB = next_tokens(
        tensor_BL.transpose(0, -1),
        groups.context("tokens"),
        shift=1,
        fill=0,
        starts_SB=packed_seq_params,
    )
    return rolled_LB.transpose(0, -1), torch.ones((), device=tensor_BL.device)


def num_targets(mask_BL: Tensor, depths: int, starts_SB: Tensor | None) -> Tensor:
    """Return how many tokens of this rank are predicted further ahead, over all depths.

    Args:
        mask_BL: 1 where the next token is predicted.
        depths: of multi-token prediction.
        starts_SB: as above.
    """
    total = mask_BL.new_zeros(())
    for _ in range(depths):
        mask_BL, _ = roll_tensor(mask_BL, packed_seq_params=starts_SB)
        total = total + mask_BL.sum()
    return total
