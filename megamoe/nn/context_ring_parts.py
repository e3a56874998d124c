"""What a kernel does of a chunk of queries and a chunk of keys in a ring: all, or what documents leave.

Where queries and keys are the same chunk, each document in it sees itself. Of an earlier chunk of keys one
document at most is seen, the last: it may reach into the chunk of queries.

Shapes: S sequence, B batch, N heads, Q queries, K keys.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from megamoe.nn.attention_documents import of_each_tensor

Rows = tuple[range, range]  # positions of queries and keys in the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The queries of a chunk that see, and the keys of one that they see: all of them, or up to their own."""

    batch: slice
    queries: slice
    keys: slice
    is_causal: bool

    def of_queries(self, x: Tensor) -> Tensor:
        """Return a view of [B, N, Q, ...]."""
        return x[self.batch, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """Return a view of [B, N, K, ...]."""
        return x[self.batch, :, self.keys]


def parts(rows: Rows, starts_SB: Tensor | None) -> list[Part]:
    """Return the parts of a pair of chunks; the same chunk, or keys before all queries.

    Args:
        rows: of the pair.
        starts_SB: where the document of each token of whole sequences begins; None: each sequence is
            one.
    """
    queries, keys = rows
    is_causal = queries == keys
    if starts_SB is None:
        every = slice(None)
        return [Part(batch=every, queries=every, keys=every, is_causal=is_causal)]
    within = _squares if is_causal else _rectangle
    return [
        Part(
            batch=slice(index, index + 1),
            queries=_counted_from(queries.start, seeing),
            keys=_counted_from(keys.start, seen),
            is_causal=is_causal,
        )
        for index, begins in enumerate(_documents(starts_SB))
        for seeing, seen in within(begins, rows)
    ]


@of_each_tensor
def _documents(starts_SB: Tensor) -> tuple[list[int], ...]:
    """Return where the documents of each sequence begin, and its end; waits for the device."""
    return tuple(
        [*column.unique_consecutive().tolist(), len(column)] for column in starts_SB.cpu().T
    )


def _squares(begins: list[int], rows: Rows) -> Iterator[Rows]:
    """Yield the rows of each document in a chunk."""
    chunk, _ = rows
    first = bisect_right(begins, chunk.start) - 1
    for begin, end in pairwise(begins[first:]):
        if begin >= chunk.stop:
            return
        document = range(max(begin, chunk.start), min(end, chunk.stop))
        yield document, document


def _rectangle(begins: list[int], rows: Rows) -> Iterator[Rows]:
    """Yield the rows of the document of the last key, if queries are of it, too."""
    queries, keys = rows
    after = bisect_right(begins, keys.stop - 1)
    begin, end = begins[after - 1], begins[after]
    if end > queries.start:
        yield range(queries.start, min(end, queries.stop)), range(max(begin, keys.start), keys.stop)


def _counted_from(start: int, rows: range) -> slice:
    return slice(rows.start - start, rows.stop - start)
