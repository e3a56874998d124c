"""Queries, keys and latents of an attention, apart from what attends: for a cache, and for a shared sequence.

Shapes: S tokens of this rank, B batch, D hidden, N heads of this rank, M key-value heads,
H head dim, R latent, E rotary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional

from megamoe.mcore.compat import rotation_options


def rotation(attention: Any, positions: Any) -> partial[Tensor]:
    """Return what rotates queries and keys; with YaRN, positions come with a scale for MLA."""
    angles, scale = positions if isinstance(positions, tuple) else (positions, 1.0)
    return partial(
        apply_rotary_pos_emb,
        freqs=angles,
        config=attention.config,
        mscale=scale,
        cp_group=attention.pg_collection.cp,
        **rotation_options(attention.config),
    )


def latent_rows(attention: Any, hidden_SBD: Tensor) -> tuple[Tensor, Tensor]:
    """Return normed latents [S, B, R] and positional keys [S, B, E], not rotated yet.

    Under sequence parallelism hidden states are of a part of the tokens, and these of all.
    """
    config = attention.config
    sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
    latent, k_rope = torch.split(attention.linear_kv_down_proj(hidden_SBD)[0], sizes, dim=-1)
    latent = attention.kv_layernorm(latent)
    if config.sequence_parallel:
        rows = torch.cat((latent, k_rope), dim=-1)
        rows = gather_from_sequence_parallel_region(rows, group=attention.pg_collection.tp)
        latent, k_rope = torch.split(rows, sizes, dim=-1)
    return latent, k_rope


def latent_queries(attention: Any, hidden_SBD: Tensor, rotate: partial[Tensor]) -> Tensor:
    """Return rotated queries of MLA, [S, B, N, D]."""
    config = attention.config
    if config.q_lora_rank is None:
        projected = attention.linear_q_proj(hidden_SBD)[0]
    else:
        compressed = attention.q_layernorm(attention.linear_q_down_proj(hidden_SBD)[0])
        projected = attention.linear_q_up_proj(compressed)[0]
    queries = projected.unflatten(-1, (attention.num_attention_heads_per_partition, -1))
    q_nope, q_rope = torch.split(queries, [config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
    return torch.cat((q_nope, rotate(q_rope)), dim=-1)


def grouped_parts(attention: Any, hidden_SBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [S, B, N, H], keys and values [S, B, M, H] of GQA, not normed yet.

    Megatron-Core 0.16.1 transformer/attention.py:1371 (0.19.2: 1817) projects all three in one product
    and norms both queries and keys, unless it is told not to take them apart.
    """
    mixed, sizes = attention.get_query_key_value_tensors(hidden_SBD, split_qkv=False)
    q, k, v = torch.split(mixed, sizes, dim=3)
    q = q.reshape(*q.shape[:2], -1, k.shape[3])
    # Ranks of tp that share a key-value head have the queries of all of them here.
    tp = attention.pg_collection.tp
    num_sharing = max(1, tp.size() // attention.config.num_query_groups)
    return q.chunk(num_sharing, dim=2)[tp.rank() % num_sharing], k, v


def grouped_rows(attention: Any, hidden_SBD: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """Return keys and values [S, B, M, H] of GQA, not normed yet, and what makes the queries [S, B, N, H].

    Megatron-core has one product for all three; two let keys and values be sent before there are
    queries. Ranks of tp that share a key-value head exchange what the one product gave.
    """
    config, linear, tp = attention.config, attention.linear_qkv, attention.pg_collection.tp
    if config.num_query_groups < tp.size():
        q, k, v = grouped_parts(attention, hidden_SBD)
        return k, v, lambda: q
    assert linear.bias is None, "projections have no bias"
    assert config.sequence_parallel or tp.size() == 1, (
        "gradients of hidden states are summed over tp"
    )
    if config.sequence_parallel:
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, group=tp)
    heads, head_dim = attention.num_query_groups_per_partition, config.kv_channels
    # The rows of each key-value head: its queries, its key, its value.
    weight = linear.weight.unflatten(0, (heads, -1, head_dim))
    rows_SBMH = _product(hidden_SBD, weight[:, -2:])
    k, v = rows_SBMH.view(*rows_SBMH.shape[:2], heads, 2, head_dim).unbind(dim=3)
    return k, v, lambda: _product(hidden_SBD, weight[:, :-2])


def _product(hidden_SBD: Tensor, weight_MNHD: Tensor) -> Tensor:
    """Return hidden states projected with the rows of some heads, [S, B, M * N, H]."""
    projected = functional.linear(hidden_SBD, weight_MNHD.flatten(0, 2))
    return projected.view(*projected.shape[:2], -1, weight_MNHD.shape[2])
