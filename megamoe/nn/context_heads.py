"""The two kinds of attention, as what a token is to those after it: a row, and keys and values of it.

Shapes: P positions, B batch, N query heads, M key-value heads (N a multiple of M), D query and key
head dimension, V value head dimension, R latent, E rotary, F features of a token's row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentHeads:
    """MLA: a row is the normed latent and the rotated positional key that all heads share."""

    num_heads: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def key_dim(self) -> int:
        """Return the dimension of queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Return the number of values a token's row has."""
        return self.latent_dim + self.rope_dim

    def pack(self, latent_PBR: Tensor, rope_PBE: Tensor) -> Tensor:
        """Return the rows of tokens, [P, B, R + E]."""
        return torch.cat((latent_PBR, rope_PBE), dim=-1)

    def expand(self, rows_PBF: Tensor, up_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys [P, B, N, D] and values [P, B, N, V].

        Args:
            rows_PBF: rows of tokens.
            up_weight: [N * (D - E + V), R]: of each head, what gives the part of its key that is
                not rotated, then its value; N may be some of the heads.
        """
        assert up_weight is not None, "latents are projected up"
        latent, rope = rows_PBF.split_with_sizes([self.latent_dim, self.rope_dim], dim=-1)
        per_head = self.nope_dim + self.value_dim
        keys_and_values = torch.unflatten(linear(latent, up_weight), -1, (-1, per_head))
        k_nope, v = keys_and_values.split_with_sizes([self.nope_dim, self.value_dim], dim=-1)
        k_rope = rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)
        return torch.cat((k_nope, k_rope), dim=-1), v


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedHeads:
    """GQA: a row is the key and the value of each key-value head."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def row_dim(self) -> int:
        """Return the number of values a token's row has."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    def pack(self, k_PBMD: Tensor, v_PBMV: Tensor) -> Tensor:
        """Return the rows of tokens, [P, B, M * (D + V)]."""
        return torch.cat((k_PBMD, v_PBMV), dim=-1).flatten(2)

    def expand(self, rows_PBF: Tensor, up_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys [P, B, M, D] and values [P, B, M, V]; M may be some of the heads."""
        assert up_weight is None, "there is nothing to project"
        heads = torch.unflatten(rows_PBF, -1, (-1, self.key_dim + self.value_dim))
        k_PBMD, v_PBMV = heads.split_with_sizes([self.key_dim, self.value_dim], dim=-1)
        return k_PBMD, v_PBMV

    def repeated(self, rows_PBF: Tensor, cp: int) -> Tensor:
        """Return rows with each head as often as ranks share it, so that cp divides them."""
        if self.num_kv_heads % cp == 0:
            return rows_PBF
        heads = torch.unflatten(rows_PBF, -1, (self.num_kv_heads, -1))
        return heads.repeat_interleave(cp // self.num_kv_heads, dim=2).flatten(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """Causal attention of one layer."""

    heads: LatentHeads | GroupedHeads
    window: int | None  # keys a query sees at most, its own included; None: all before it
    scale: float  # of the scores before the softmax


def can_share_heads(heads: LatentHeads | GroupedHeads, cp: int) -> bool:
    """Tell whether each rank can have the same number of whole heads, with their keys and values."""
    if isinstance(heads, LatentHeads):
        return heads.num_heads % cp == 0
    kv_heads = heads.num_kv_heads
    return heads.num_heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0)
