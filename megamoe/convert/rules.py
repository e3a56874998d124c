"""Rules: how one of our tensors is split into theirs, and joined again from them.

Rows of a weight are its outputs. N query heads, M key-value heads, H head dim.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megamoe.recipe.model import GQA, MLA, Model

Shape = tuple[int, ...]


class Rule(Protocol):
    """Both directions of one relation between tensors; the parts lie along the rows."""

    def bind(self, model: Model) -> "Rule":
        """Return the rule with the sizes of a model."""

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Return their tensors."""

    def join(self, theirs: tuple[Tensor, ...]) -> Tensor:
        """Return our tensor."""


@dataclass(frozen=True, slots=True)
class Same:
    """The very same tensor."""

    def bind(self, model: Model) -> "Same":  # noqa: ARG002
        """Return itself."""
        return self

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor."""
        return (ours,)

    def join(self, theirs: tuple[Tensor, ...]) -> Tensor:
        """Return the tensor."""
        (tensor,) = theirs
        return tensor


@dataclass(frozen=True, slots=True)
class Halves:
    """The rows of the gate above those of the other factor of a SwiGLU."""

    def bind(self, model: Model) -> "Halves":  # noqa: ARG002
        """Return itself."""
        return self

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Return gate and up."""
        return ours.chunk(2)

    def join(self, theirs: tuple[Tensor, ...]) -> Tensor:
        """Return both, the gate first."""
        return torch.cat(theirs)


@dataclass(frozen=True, slots=True)
class Heads:
    """By group: the rows of its queries, of its key, of its value; theirs are q, k, v apart."""

    num_kv_heads: int = 1
    group: int = 1  # query heads of a key-value head
    head_dim: int = 1

    def bind(self, model: Model) -> "Heads":
        """Return the rule for the heads of a model with GQA."""
        a = model.attention
        assert isinstance(a, GQA), a
        return Heads(a.num_kv_heads, a.num_heads // a.num_kv_heads, a.head_dim)

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of queries, keys and values."""
        by_group = ours.reshape(self.num_kv_heads, self.group + 2, self.head_dim, *ours.shape[1:])
        parts = torch.split(by_group, [self.group, 1, 1], dim=1)
        return tuple(part.flatten(0, 2) for part in parts)

    def join(self, theirs: tuple[Tensor, ...]) -> Tensor:
        """Return the weights, group by group."""
        parts = [x.reshape(self.num_kv_heads, -1, self.head_dim, *x.shape[1:]) for x in theirs]
        return torch.cat(parts, dim=1).flatten(0, 2)


@dataclass(frozen=True, slots=True)
class RotaryLast:
    """Blocks of rows that end in rotary ones: ours pair 2i with 2i+1, theirs may pair i with i+d/2.

    Args:
        per_head: the blocks are the heads of the queries; otherwise all rows are one block.
        is_split: theirs pair i with i + d/2.
    """

    per_head: bool
    is_split: bool = False
    num_blocks: int = 1
    rotary_dim: int = 2

    def bind(self, model: Model) -> "RotaryLast":
        """Return the rule for the heads of a model with MLA."""
        a = model.attention
        assert isinstance(a, MLA), a
        blocks = a.num_heads if self.per_head else 1
        return replace(self, num_blocks=blocks, rotary_dim=a.qk_rope_head_dim)

    def split(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Return the weight in their order."""
        return (self._reordered(ours, (-1, 2)),)

    def join(self, theirs: tuple[Tensor, ...]) -> Tensor:
        """Return the weight in our order."""
        (tensor,) = theirs
        return self._reordered(tensor, (2, -1))

    def _reordered(self, weight: Tensor, pairs: tuple[int, int]) -> Tensor:
        if not self.is_split:
            return weight
        blocks = weight.reshape(self.num_blocks, -1, *weight.shape[1:])
        plain, rotary = torch.split(
            blocks, [blocks.shape[1] - self.rotary_dim, self.rotary_dim], dim=1
        )
        rotary = rotary.reshape(self.num_blocks, *pairs, *weight.shape[1:])
        rotary = rotary.transpose(1, 2).flatten(1, 2)
        return torch.cat((plain, rotary), dim=1).flatten(0, 1)
