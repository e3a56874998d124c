"""What the ranks of a sequence send each other: halos, whole sequences, heads, zig-zag chunks.

Shapes: S tokens of the whole sequence, L of one rank, B batch, F features of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.nn.context_group import ContextGroup, Direction, Pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Halo:
    """[L, ...] to the rows next to a shard, as many as there are, at most `num_rows`.

    Those of the ranks before (`side` -1) or after (+1), in the order of the sequence. Where they
    reach beyond the neighbour, each rank sends its own to all that need them: more messages, no
    relay. Of the input only the min(L, num_rows) rows next to that edge are read, so the rest may
    be left out of it.
    """

    num_rows: int
    shard_len: int
    side: int

    def hops(self, cp: ContextGroup) -> list[tuple[int, int]]:
        """Return distance of a rank and rows wanted of it, the nearest first."""
        rows = min(self.num_rows, (cp.size - 1) * self.shard_len)
        return [
            (distance, min(self.shard_len, rows - before))
            for distance, before in enumerate(range(0, rows, self.shard_len), 1)
        ]

    def _sources(self, cp: ContextGroup) -> list[tuple[int, int]]:
        """Return the ranks that send to this one, and how many rows, in the sequence's order."""
        ranks = [(cp.rank + self.side * distance, rows) for distance, rows in self.hops(cp)]
        return sorted(pair for pair in ranks if 0 <= pair[0] < cp.size)

    def _targets(self, cp: ContextGroup) -> list[tuple[int, int]]:
        ranks = [(cp.rank - self.side * distance, rows) for distance, rows in self.hops(cp)]
        return [pair for pair in ranks if 0 <= pair[0] < cp.size]

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Send this rank's rows to those that want them."""
        sends = [(rank, self._edge(x, rows).contiguous()) for rank, rows in self._targets(cp)]
        receives = [(rank, x.new_empty(rows, *x.shape[1:])) for rank, rows in self._sources(cp)]
        works = cp.exchange(sends, receives, "forward")
        # An empty halo, that of the first rank, is part of the graph all the same: its backward
        # pass is where this rank takes the gradients of the rows it sent.
        parts = [x.new_empty(0, *x.shape[1:]), *(tensor for _, tensor in receives)]
        return Pending(works, lambda: torch.cat(parts), [tensor for _, tensor in sends])

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Send the gradients of the halo back to where its rows came from."""
        sources, targets = self._sources(cp), self._targets(cp)
        pieces = grad.split_with_sizes([rows for _, rows in sources])
        sends = [
            (rank, piece.contiguous()) for (rank, _), piece in zip(sources, pieces, strict=True)
        ]
        receives = [(rank, grad.new_empty(rows, *grad.shape[1:])) for rank, rows in targets]
        works = cp.exchange(sends, receives, "backward")

        def add_up() -> Tensor:
            # Of up to cp - 1 ranks: rounded once, at the end.
            wide = torch.promote_types(grad.dtype, torch.float32)
            shape = (min(self.num_rows, self.shard_len), *grad.shape[1:])
            total = grad.new_zeros(shape, dtype=wide)
            for rank_and_rows, (_, tensor) in zip(targets, receives, strict=True):
                self._edge(total, rank_and_rows[1]).add_(tensor)
            return total.to(grad.dtype)

        return Pending(works, add_up, [tensor for _, tensor in sends])

    def _edge(self, x: Tensor, rows: int) -> Tensor:
        """Return the rows next to the ranks that want them."""
        return x[len(x) - rows :] if self.side < 0 else x[:rows]


@dataclass(frozen=True, slots=True)
class Gather:
    """[L, ...] to [S, ...], all of it on every rank."""

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Gather what all ranks have."""
        return cp.all_gather(x, "forward")

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Return the sum of the gradients that all ranks have for this rank's rows.

        An all-to-all and a sum: a reduce-scatter in float32 and one order, at the same bytes.
        """
        pending = cp.all_to_all(grad.reshape(cp.size, -1, *grad.shape[1:]), "backward")
        wide = torch.promote_types(grad.dtype, torch.float32)
        return _then(pending, lambda parts: parts.sum(dim=0, dtype=wide).to(grad.dtype))


@dataclass(frozen=True, slots=True)
class ToHeads:
    """[L, B, cp * F] of all heads to [S, B, F] of this rank's, the heads of rank 0 first."""

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Give every rank its heads."""
        return _to_heads(cp, x, "forward")

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Bring every token's heads together."""
        return _from_heads(cp, grad, "backward")


@dataclass(frozen=True, slots=True)
class FromHeads:
    """[S, B, F] of this rank's heads to [L, B, cp * F] of all."""

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Bring every token's heads together."""
        return _from_heads(cp, x, "forward")

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Give every rank its heads."""
        return _to_heads(cp, grad, "backward")


@dataclass(frozen=True, slots=True)
class ToZigzag:
    """[L, ...] in the order of the sequence to the two chunks of the zig-zag order."""

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Send both chunks to their ranks."""
        return _move_chunks(cp, x, "forward", to_zigzag=True)

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Send both chunks back."""
        return _move_chunks(cp, grad, "backward", to_zigzag=False)


@dataclass(frozen=True, slots=True)
class FromZigzag:
    """The two chunks of the zig-zag order back to [L, ...] in the order of the sequence."""

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Send both chunks back."""
        return _move_chunks(cp, x, "forward", to_zigzag=False)

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Send both chunks to their ranks."""
        return _move_chunks(cp, grad, "backward", to_zigzag=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """A sequence in 2 * cp chunks, two of each shard; one is longer by a token if L is odd.

    In zig-zag order rank r works on chunks r and 2 * cp - 1 - r, so that all ranks have the same
    number of causal pairs. One of the two is even and one odd, so that they are L tokens, too.
    """

    cp: int
    shard_len: int

    def held_by(self, rank: int, *, zigzag: bool) -> tuple[int, int]:
        """Return the chunks that a rank works on, or those of its shard."""
        return (rank, 2 * self.cp - 1 - rank) if zigzag else (2 * rank, 2 * rank + 1)

    def rank_of(self, chunk: int, *, zigzag: bool) -> int:
        """Return the rank that works on a chunk, or in whose shard it is."""
        return min(chunk, 2 * self.cp - 1 - chunk) if zigzag else chunk // 2

    def rows(self, chunk: int) -> range:
        """Return the positions of a chunk in the sequence."""
        begin, middle = chunk // 2 * self.shard_len, self.shard_len // 2
        if chunk % 2:
            return range(begin + middle, begin + self.shard_len)
        return range(begin, begin + middle)

    def split(self, x: Tensor, chunks: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return x, [L, ...], chunk by chunk."""
        return x.split_with_sizes([len(self.rows(chunk)) for chunk in chunks])


def _move_chunks(cp: ContextGroup, x: Tensor, direction: Direction, *, to_zigzag: bool) -> Pending:
    """Return this rank's two chunks of one order, given those of the other."""
    chunks = Chunks(cp=cp.size, shard_len=len(x))
    mine = chunks.held_by(cp.rank, zigzag=not to_zigzag)
    held = dict(zip(mine, chunks.split(x, mine), strict=True))
    wanted = {
        chunk: held[chunk] if chunk in held else x.new_empty(len(chunks.rows(chunk)), *x.shape[1:])
        for chunk in chunks.held_by(cp.rank, zigzag=to_zigzag)
    }
    # Both sides go by the number of the chunk; one without tokens is not sent.
    sends = [
        (chunks.rank_of(chunk, zigzag=to_zigzag), rows.contiguous())
        for chunk, rows in held.items()
        if chunk not in wanted and len(rows)
    ]
    receives = [
        (chunks.rank_of(chunk, zigzag=not to_zigzag), rows)
        for chunk, rows in wanted.items()
        if chunk not in held and len(rows)
    ]
    works = cp.exchange(sends, receives, direction)
    return Pending(works, lambda: torch.cat(tuple(wanted.values())), [rows for _, rows in sends])


def _to_heads(cp: ContextGroup, x: Tensor, direction: Direction) -> Pending:
    parts = torch.unflatten(x, -1, (cp.size, -1)).movedim(-2, 0)
    return _then(cp.all_to_all(parts, direction), lambda parts: parts.flatten(0, 1))


def _from_heads(cp: ContextGroup, x: Tensor, direction: Direction) -> Pending:
    pending = cp.all_to_all(torch.unflatten(x, 0, (cp.size, -1)), direction)
    return _then(pending, lambda parts: parts.movedim(0, -2).flatten(-2))


def _then(pending: Pending, function: Callable[[Tensor], Tensor]) -> Pending:
    """Return the same messages with one more step at their end."""
    return Pending(pending.works, lambda: function(pending.finish()), pending.sent)
