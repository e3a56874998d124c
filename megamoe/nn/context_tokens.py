"""Tokens of a sequence that several ranks share: where documents begin, and what comes next.

Shapes: S sequence, L tokens of a rank, B batch.
"""

import torch
from torch import Tensor

from megamoe.nn.context_group import ContextGroup, Posted, check_starts
from megamoe.nn.context_transfers import Halo


def document_starts(ids_LB: Tensor, cp: ContextGroup) -> Tensor:
    """Return where the document of each token begins, [S, B] int32, on every rank.

    Where they begin is gathered once a batch, for all layers: a byte a token, and an id of each
    sequence from the rank before.

    Args:
        ids_LB: integers of any width, one for each token of this rank; neighbours in a document have the same,
            and two documents side by side have different ones.
        cp: the ranks that share the sequence.
    """
    before = ids_LB[:0]
    if cp.size > 1:
        halo = Halo(num_rows=1, shard_len=len(ids_LB), side=-1)
        before = Posted(cp, halo, ids_LB[-1:]).wait()
    seen = torch.cat((before, ids_LB))
    # Compared as they are: in 32 bits 5 and 5 + 2^32 would be one document.
    begins = torch.ones_like(ids_LB, dtype=torch.uint8)
    begins[1 - len(before) :] = seen[1:] != seen[:-1]
    if cp.size > 1:
        begins = cp.all_gather(begins, "forward").wait()
    positions = torch.arange(len(begins), dtype=torch.int32, device=begins.device)[:, None]
    return (positions * begins).cummax(dim=0).values.to(torch.int32)


def starts_of_lengths(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    """Return where the document of each token begins, [S, 1] int32, without asking other ranks.

    Args:
        cu_seqlens: of one packed sequence, 0 and the end of each document, as FlashAttention takes
            them; the last is seq_len.
        seq_len: tokens of the whole sequence.
    """
    positions = torch.arange(seq_len, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
    return cu_seqlens[document][:, None].to(torch.int32)


def next_tokens(
    tokens_LB: Tensor,
    cp: ContextGroup,
    *,
    shift: int,
    fill: int | float,
    starts_SB: Tensor | None = None,
) -> Tensor:
    """Return what comes `shift` tokens later: labels, and those of multi-token prediction.

    Args:
        tokens_LB: this rank's, [L, B, ...], without a gradient.
        cp: the ranks that share the sequence.
        shift: at least 1; it may reach beyond the next rank.
        fill: what stands after the end of the sequence: padding, or the label that is ignored.
        starts_SB: from `document_starts`, to fill after the end of each document, too.

    Raises:
        MegamoeError: starts_SB is not of the whole sequence, or not of each of the batch.
    """
    if starts_SB is not None:
        check_starts(starts_SB, tokens_LB.shape, cp.size)
    assert shift >= 1, shift
    assert not tokens_LB.requires_grad, "tokens, labels and masks have no gradient"
    length = len(tokens_LB)
    following = [tokens_LB]
    if cp.size > 1:
        halo = Halo(num_rows=shift, shard_len=length, side=1)
        following.append(Posted(cp, halo, tokens_LB[:shift]).wait())
    following.append(tokens_LB.new_full((shift, *tokens_LB.shape[1:]), fill))
    shifted = torch.cat(following)[shift : shift + length]
    if starts_SB is None:
        return shifted
    beyond = starts_SB.new_full((shift, *starts_SB.shape[1:]), -1)
    same_document = torch.cat((starts_SB, beyond))[shift:] == starts_SB
    kept = cp.shard(same_document).reshape(*shifted.shape[:2], *(1,) * (shifted.ndim - 2))
    return shifted.where(kept, fill)
