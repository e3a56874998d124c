"""Attention of a sequence that ranks share (cp), or of documents: megamoe/nn/context_parallel.py in layers.

Positions count on through a sequence, over its documents: what a query and a key make depends on
the difference of their positions alone, with position interpolation and YaRN too (Su et al. 2021,
eq. 16), and a query sees no key of another document.

Rank r has tokens r * L up to (r + 1) * L, in a row. Megatron-core deals an early and a late chunk to
each rank instead, in its rotary positions and its shift of tokens for multi-token prediction
(megamoe/mcore/roll.py); both are replaced.

Shapes: S sequence, L tokens of this rank, B batch, D hidden.
"""

from typing import Any

from torch import Tensor

from megamoe.mcore import groups
from megamoe.mcore.projections import grouped_rows, latent_queries, latent_rows, rotation
from megamoe.mcore.sharing import scheme_of
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import begin, finish


def share_latent(
    attention: Any, hidden_LBD: Tensor, starts_SB: Tensor | None
) -> tuple[Tensor, None]:
    """Return the output of a LatentAttention; latents and positional keys are sent, not keys and values.

    Args:
        attention: the layer.
        hidden_LBD: what it attends with; under sequence parallelism a part of the tokens.
        starts_SB: where the document of each token begins; None: they see each other.
    """
    config, core = attention.config, attention.core_attention
    heads = LatentHeads(
        num_heads=attention.num_attention_heads_per_partition,
        latent_dim=config.kv_lora_rank,
        nope_dim=config.qk_head_dim,
        rope_dim=config.qk_pos_emb_head_dim,
        value_dim=config.v_head_dim,
    )
    layer = AttentionLayer(heads=heads, window=core.window, scale=core.scale)
    cp = groups.context("global" if core.window is None else "local")
    latent, k_rope = latent_rows(attention, hidden_LBD)
    rotate = rotation(attention, _positions(attention.rotary_pos_emb, len(latent), cp.rank))
    k_rope = rotate(k_rope[:, :, None])[:, :, 0]
    begun = begin(cp, layer, scheme_of(layer, groups.context_sharing()), (latent, k_rope))
    queries = latent_queries(attention, hidden_LBD, rotate)  # while latents are on their way
    mixed = finish(begun, queries, attention.linear_kv_up_proj.weight, starts_SB)
    return attention.linear_proj(mixed)


def share_grouped(
    attention: Any, hidden_LBD: Tensor, starts_SB: Tensor | None
) -> tuple[Tensor, None]:
    """Return the output of a GroupedAttention; keys and values are sent. Arguments as above."""
    core = attention.core_attention
    k, v, make_queries = grouped_rows(attention, hidden_LBD)
    heads = GroupedHeads(
        # Megatron-core's own number is another where ranks of tp share a key-value head (0.16.1
        # transformer/attention.py:289): of one of them, all queries.
        num_heads=attention.config.num_attention_heads // attention.pg_collection.tp.size(),
        num_kv_heads=k.shape[2],
        key_dim=k.shape[3],
        value_dim=v.shape[3],
    )
    layer = AttentionLayer(heads=heads, window=core.window, scale=core.scale)
    cp = groups.context("global" if core.window is None else "local")
    rotate = None
    if attention.rotary is not None:
        rotate = rotation(attention, _positions(attention.rotary, len(k), cp.rank))
    k = _normed_and_rotated(k, attention.k_layernorm, rotate)
    begun = begin(cp, layer, scheme_of(layer, groups.context_sharing()), (k, v))
    q = _normed_and_rotated(
        make_queries(), attention.q_layernorm, rotate
    )  # while these are on their way
    return attention.linear_proj(finish(begun, q, starts_SB=starts_SB))


def _normed_and_rotated(x: Tensor, norm: Any, rotate: Any) -> Tensor:
    """Return queries or keys with what a layer does to them, either of which may be None."""
    x = x if norm is None else norm(x)
    return x if rotate is None else rotate(x)


def _positions(embedding: Any, length: int, rank: int) -> Any:
    # Asked for a packed sequence it gives the positions as they are, not two chunks of them.
    return embedding(length, offset=rank * length, packed_seq=True)
