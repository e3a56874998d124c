"""Causal attention over a sequence that several ranks share, within a window or over everything.

    begun = begin(cp, layer, "halo", (latent, rope))   # posts what other ranks need
    q = ...                                            # meanwhile
    mixed = finish(begun, q, up_weight)                # waits, attends

Rank r of cp has tokens r * L up to (r + 1) * L of each sequence, L = S / cp. Positions are the
caller's: queries and keys come rotated by their place in the whole sequence. What is computed is
what one rank alone would compute, gradients too. Weights are the same on all ranks, and each rank
has its own tokens' part of their gradients (with "heads", its own heads'): the caller adds them up
over the ranks, as Megatron-core does over data and context parallel ranks.

Schemes:
    halo    layers with a window. The last window - 1 rows of a rank go to those after it. Each
            projects what it received itself and runs one attention.
    heads   all rows, or those of a rank's key-value heads, come to every rank, which attends for
            its heads; queries and outputs change places. Nothing is computed twice.
    ring    layers without a window. Rows go around, in zig-zag order (megamoe/nn/context_ring.py). For
            any number of heads.
    gather  all rows come to every rank, which attends for its own queries. For any number of heads,
            simple, and the last rank does nearly twice the mean.

Shapes: S sequence, L tokens of a rank, B batch, N query heads, M key-value heads, D query and key
head dimension, V value head dimension, R latent, E rotary, F features of a token's row.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from megamoe.errors import MegamoeError
from megamoe.nn import context_ring_kernels
from megamoe.nn.attention import bounded_attention, continued_attention
from megamoe.nn.attention_documents import of_each_tensor
from megamoe.nn.context_group import ContextGroup, Posted, check_starts
from megamoe.nn.context_heads import AttentionLayer, LatentHeads, can_share_heads
from megamoe.nn.context_ring import Ring, ring_attention
from megamoe.nn.context_transfers import (
    Chunks,
    FromHeads,
    FromZigzag,
    Gather,
    Halo,
    ToHeads,
    ToZigzag,
)


class Scheme(StrEnum):
    """How the ranks of a sequence attend together."""

    HALO = "halo"
    HEADS = "heads"
    RING = "ring"
    GATHER = "gather"


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """One call of attention, its keys and values on their way."""

    cp: ContextGroup
    layer: AttentionLayer
    scheme: Scheme
    rows: Tensor  # this rank's own, [L, B, F]
    posted: Posted | None  # None: nothing is needed of other ranks


def schemes(layer: AttentionLayer, cp: int) -> tuple[Scheme, ...]:
    """Return the schemes that a layer can be computed by."""
    heads = (Scheme.HEADS,) if can_share_heads(layer.heads, cp) else ()
    if layer.window is not None:
        return (Scheme.HALO, *heads, Scheme.GATHER)
    return (*heads, Scheme.RING, Scheme.GATHER)


def begin(
    cp: ContextGroup, layer: AttentionLayer, scheme: Scheme, parts: tuple[Tensor, Tensor]
) -> Begun:
    """Send what other ranks need of this rank's keys and values.

    Args:
        cp: the ranks that share the sequence. All call the same functions in the same order.
        layer: of all ranks the same.
        scheme: one of `schemes`.
        parts: of MLA the normed latent [L, B, R] and the rotated positional key [L, B, E]; of GQA
            keys [L, B, M, D], rotated, and values [L, B, M, V].

    Raises:
        MegamoeError: the scheme cannot compute this layer.
    """
    if scheme not in schemes(layer, cp.size):
        raise MegamoeError(_refusal(layer, scheme, cp.size))
    rows = layer.heads.pack(*parts)
    return Begun(
        cp=cp,
        layer=layer,
        scheme=scheme,
        rows=rows,
        posted=None if cp.size == 1 else _post(cp, layer, scheme, rows),
    )


def finish(
    begun: Begun,
    q_LBND: Tensor,
    up_weight: Tensor | None = None,
    starts_SB: Tensor | None = None,
) -> Tensor:
    """Attend, once keys and values are there.

    Args:
        begun: of this call; used once.
        q_LBND: rotated queries of all heads.
        up_weight: of MLA the up-projection of keys and values, [N * (D - E + V), R], head by head.
        starts_SB: integers, where in the whole sequence the document of each token begins, for the
            whole sequence on every rank; a query sees nothing before. None: one document. Of one batch
            the same tensor for all layers: documents are counted once for each tensor, until it is
            written to, which must wait for the backward pass.

    Returns:
        [L, B, N * V], dtype of the queries.

    Raises:
        MegamoeError: the queries are not of the layer's heads, or starts_SB is not of the whole sequence, or
            not of each of the batch.
    """
    heads = begun.layer.heads
    if q_LBND.shape[2:] != (heads.num_heads, heads.key_dim):
        raise MegamoeError(
            f"queries are {list(q_LBND.shape)}, and the layer has {heads.num_heads} heads of "
            f"{heads.key_dim}; give [L, B, {heads.num_heads}, {heads.key_dim}]"
        )
    if starts_SB is not None:
        check_starts(starts_SB, q_LBND.shape, begun.cp.size)
    if begun.cp.size == 1:
        k, v = begun.layer.heads.expand(begun.rows, up_weight)
        return _attend(begun, q_LBND, k, v, starts_SB)
    if begun.scheme is Scheme.HEADS:
        return _finish_heads(begun, q_LBND, up_weight, starts_SB)
    if begun.scheme is Scheme.RING:
        return _finish_ring(begun, q_LBND, up_weight, starts_SB)
    k, v = begun.layer.heads.expand(_rows_seen(begun), up_weight)
    return _attend(begun, q_LBND, k, v, starts_SB)


def _post(cp: ContextGroup, layer: AttentionLayer, scheme: Scheme, rows: Tensor) -> Posted | None:
    if scheme is Scheme.RING:
        return Posted(cp, ToZigzag(), rows)
    if scheme is Scheme.GATHER:
        return Posted(cp, Gather(), rows)
    if scheme is Scheme.HEADS:
        if isinstance(layer.heads, LatentHeads):
            return Posted(cp, Gather(), rows)
        return Posted(cp, ToHeads(), layer.heads.repeated(rows, cp.size))
    assert layer.window is not None
    if layer.window == 1:
        return None
    num_rows = layer.window - 1
    halo = Halo(num_rows=num_rows, shard_len=len(rows), side=-1)
    return Posted(cp, halo, rows[-num_rows:])


def _rows_seen(begun: Begun) -> Tensor:
    """Return the rows that this rank's queries see, up to its own last."""
    if begun.posted is None:
        return begun.rows
    received = begun.posted.wait()
    if begun.scheme is Scheme.HALO:
        return torch.cat((received, begun.rows))
    own, window = len(begun.rows), begun.layer.window
    end = (begun.cp.rank + 1) * own
    return received[0 if window is None else max(0, end - own - window + 1) : end]


def _finish_heads(
    begun: Begun, q_LBND: Tensor, up_weight: Tensor | None, starts_SB: Tensor | None
) -> Tensor:
    cp, heads = begun.cp, begun.layer.heads
    assert begun.posted is not None
    queries = Posted(cp, ToHeads(), q_LBND.flatten(2))
    if up_weight is not None:  # of this rank's heads only
        up_weight = torch.unflatten(up_weight, 0, (cp.size, -1))[cp.rank]
    k, v = heads.expand(begun.posted.wait(), up_weight)  # while the queries are on their way
    q_SBND = torch.unflatten(queries.wait(), -1, (-1, heads.key_dim))
    mixed = _attend(begun, q_SBND, k, v, starts_SB)
    return Posted(cp, FromHeads(), mixed).wait()


def _finish_ring(
    begun: Begun, q_LBND: Tensor, up_weight: Tensor | None, starts_SB: Tensor | None
) -> Tensor:
    cp = begun.cp
    assert begun.posted is not None
    queries = Posted(cp, ToZigzag(), q_LBND)
    rows = begun.posted.wait()
    chunks = Chunks(cp=cp.size, shard_len=len(q_LBND))
    case = context_ring_kernels.case_of(
        begun.layer.heads, q_LBND.device, q_LBND.dtype, has_documents=starts_SB is not None
    )
    kernel = context_ring_kernels.choose(case)
    ring = Ring(cp, begun.layer, chunks, starts_SB, kernel)
    mixed = ring_attention(ring, queries.wait(), rows, up_weight)
    return Posted(cp, FromZigzag(), mixed).wait()


def _attend(
    begun: Begun, q_SBND: Tensor, k_PBMD: Tensor, v_PBMV: Tensor, starts_SB: Tensor | None
) -> Tensor:
    """Attend where the queries are those of the last positions."""
    window, scale = begun.layer.window, begun.layer.scale
    if starts_SB is None:
        return continued_attention(q_SBND, k_PBMD, v_PBMV, window=window, scale=scale)
    # Where a document begins is a property of the query alone, so that a halo needs no documents of
    # its own: what a query must not see lies before its own beginning.
    whole = begun.scheme is Scheme.HEADS or begun.cp.size == 1
    first_query = 0 if whole else begun.cp.rank * len(q_SBND)
    first_SB = _first_keys(starts_SB, first_query, len(q_SBND), len(k_PBMD))
    return bounded_attention(q_SBND, k_PBMD, v_PBMV, first_SB=first_SB, window=window, scale=scale)


@of_each_tensor  # so that all layers of a batch have one tensor
def _first_keys(starts_SB: Tensor, first_query: int, num_queries: int, num_keys: int) -> Tensor:
    """Return where the documents of a rank's queries begin, counted among the keys it has."""
    last_query = first_query + num_queries
    return starts_SB[first_query:last_query] - (last_query - num_keys)


def _refusal(layer: AttentionLayer, scheme: Scheme, cp: int) -> str:
    others = ", ".join(other.value for other in schemes(layer, cp))
    if scheme is Scheme.HALO:
        return f"a halo is for layers with a window, and this one has none; use {others}"
    if scheme is Scheme.RING:
        return (
            f"a ring is for layers without a window, and this one's is {layer.window}; use {others}"
        )
    heads = layer.heads
    kv = "" if isinstance(heads, LatentHeads) else f" and {heads.num_kv_heads} key-value heads"
    return f"{heads.num_heads} heads{kv} cannot be shared out over cp {cp}; use {others}"
