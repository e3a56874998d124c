"""Attention around a ring: rows of tokens pass by every rank's queries, in zig-zag order.

Each rank has 2 chunks of queries; what it has of the output so far is merged with what the next
rows add, by the logarithm of the sum of exponentials of both (Milakov and Gimelshein 2018; Liu et
al. 2023). Of MLA, rows are latents, which every rank projects up anew: the smallest message, and
the projection of the whole sequence on every rank. The backward pass sends the rows around again,
and with them the sum of their gradients so far, in float32.

A step sees all of a chunk, or all up to the query, which kernels do (megamoe/nn/context_ring_kernels.py).
Documents cut it into such steps (megamoe/nn/context_ring_parts.py). Where no kernel is, scores of two chunks
are written out here. Layers have no window: a halo sends less.

Shapes: L tokens of a rank, Q and K those of a chunk of queries and of keys, B batch, N heads,
D query and key head dimension, V value head dimension, F features of a token's row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamoe.nn.context_group import ContextGroup
from megamoe.nn.context_heads import AttentionLayer
from megamoe.nn.context_ring_parts import Part, parts
from megamoe.nn.context_ring_step import Result, Step, StepKernel, Tensors, finite, merge_into
from megamoe.nn.context_transfers import Chunks

Pair = tuple[int, int, int]  # whose rows, the chunk of queries, the chunk of keys
_Context = Any  # torch's own type does not know saved_tensors


@dataclass(frozen=True, slots=True)
class Ring:
    """What all steps of one call have in common."""

    cp: ContextGroup
    layer: AttentionLayer
    chunks: Chunks
    starts: Tensor | None  # [S, B] of the whole sequence: where the document of each token begins
    kernel: StepKernel | None  # None: scores are written out

    def steps(self) -> Iterator[tuple[int, bool]]:
        """Yield whose rows are here, and whether others follow."""
        for step in range(self.cp.size):
            yield (self.cp.rank - step) % self.cp.size, step < self.cp.size - 1

    def pairs(self, owner: int) -> Iterator[tuple[int, list[int]]]:
        """Yield which of the two chunks of rows here are seen, and by which chunks of queries."""
        queries = self._chunks(self.cp.rank)
        for j, (key_chunk, keys) in enumerate(self._chunks(owner)):
            seen_by = [
                i
                for i, (query_chunk, rows) in enumerate(queries)
                if query_chunk >= key_chunk and rows and keys and self.parts((owner, i, j))
            ]
            if seen_by:
                yield j, seen_by

    def parts(self, pair: Pair) -> list[Part]:
        """Return what is done of a pair of chunks at a time; without a kernel a mask hides the rest."""
        (_, queries), (_, keys) = self._pair(pair)
        return parts((queries, keys), None if self.kernel is None else self.starts)

    def step(self, tensors: Tensors, part: Part) -> Step:
        """Return the step that is a part of a pair, as a kernel takes it."""
        q, k, v = tensors
        return Step(
            query=part.of_queries(q),
            key=part.of_keys(k),
            value=part.of_keys(v),
            is_causal=part.is_causal,
            is_cut=self.starts is not None,
            scale=self.layer.scale,
        )

    def mask(self, pair: Pair, device: torch.device) -> Tensor | None:
        """Return [B or 1, 1, Q, K], which keys of a chunk each query sees; None: all."""
        (query_chunk, queries), (key_chunk, keys) = self._pair(pair)
        if query_chunk != key_chunk and self.starts is None:
            return None
        key_positions = torch.arange(keys.start, keys.stop, device=device)
        positions = torch.arange(queries.start, queries.stop, device=device)[None, :, None]
        sees = key_positions <= positions
        if self.starts is not None:
            starts_BQ = self.starts[queries.start : queries.stop].T
            sees = sees & (key_positions >= starts_BQ[:, :, None])
        return sees[:, None]

    def split_heads(self, x_LBND: Tensor) -> list[Tensor]:
        """Return this rank's two chunks, [B, N, Q, D]."""
        mine = self.chunks.held_by(self.cp.rank, zigzag=True)
        return [x.permute(1, 2, 0, 3) for x in self.chunks.split(x_LBND, mine)]

    def rows_of(self, rows_LBF: Tensor, owner: int, j: int) -> Tensor:
        """Return one of the two chunks of a rank's rows, a view."""
        return self.chunks.split(rows_LBF, self.chunks.held_by(owner, zigzag=True))[j]

    def _pair(self, pair: Pair) -> tuple[tuple[int, range], tuple[int, range]]:
        owner, i, j = pair
        return self._chunks(self.cp.rank)[i], self._chunks(owner)[j]

    def _chunks(self, rank: int) -> list[tuple[int, range]]:
        held = self.chunks.held_by(rank, zigzag=True)
        return [(chunk, self.chunks.rows(chunk)) for chunk in held]


def ring_attention(
    ring: Ring, q_LBND: Tensor, rows_LBF: Tensor, up_weight: Tensor | None
) -> Tensor:
    """Return [L, B, N * V]; queries, rows and output are in zig-zag order."""
    output: Tensor = _RingAttention.apply(ring, q_LBND, rows_LBF, up_weight)  # type: ignore[no-untyped-call]
    return output


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, ring: Ring, q_LBND: Tensor, rows_LBF: Tensor, up_weight: Tensor | None
    ) -> Tensor:
        queries = ring.split_heads(q_LBND)
        results = [_nothing_seen(q, ring.layer.heads.value_dim) for q in queries]
        rows = rows_LBF
        for owner, more in ring.steps():
            following = ring.cp.rotate(rows, "forward") if more else None
            for j, seen_by in ring.pairs(owner):
                k, v = _expand(ring, ring.rows_of(rows, owner, j), up_weight)
                for i in seen_by:
                    _attend_into(results[i], ring, (queries[i], k, v), (owner, i, j))
            rows = following.wait() if following is not None else rows
        outputs, sums = zip(*results, strict=True)
        ctx.ring = ring
        weights = () if up_weight is None else (up_weight,)
        ctx.save_for_backward(q_LBND, rows_LBF, *outputs, *sums, *weights)
        return _heads_last(outputs).to(q_LBND.dtype).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor | None]:
        ring: Ring = ctx.ring
        q_LBND, rows, out0, out1, sum0, sum1, *weights = ctx.saved_tensors
        up_weight = weights[0] if weights else None
        wide = out0.dtype
        dtype = wide if ring.kernel is None else q_LBND.dtype
        grads = ring.split_heads(torch.unflatten(grad, -1, (q_LBND.shape[2], -1)).to(dtype))
        sides = [
            _Side(
                query=q, grad=g, output=o.to(dtype), sum=s, grad_q=torch.zeros_like(q, dtype=wide)
            )
            for q, g, o, s in zip(
                ring.split_heads(q_LBND.to(dtype)), grads, (out0, out1), (sum0, sum1), strict=True
            )
        ]
        grad_weight = None if up_weight is None else torch.zeros_like(up_weight, dtype=wide)
        arriving = None
        for owner, more in ring.steps():
            following = ring.cp.rotate(rows, "backward") if more else None
            grad_rows = torch.zeros_like(rows, dtype=wide)
            for j, seen_by in ring.pairs(owner):
                part, into = ring.rows_of(rows, owner, j), ring.rows_of(grad_rows, owner, j)
                into += _pull_back(ring, sides, (owner, j, seen_by), part, up_weight, grad_weight)
            if arriving is not None:
                grad_rows += arriving.wait()
            arriving = ring.cp.rotate(grad_rows, "backward")  # the last time it is home
            rows = following.wait() if following is not None else rows
        assert arriving is not None
        grad_q = _heads_last([side.grad_q for side in sides]).to(q_LBND.dtype)
        if grad_weight is not None and up_weight is not None:
            grad_weight = grad_weight.to(up_weight.dtype)
        return None, grad_q, arriving.wait().to(rows.dtype), grad_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """A chunk of queries in the backward pass: for a kernel in its dtype, else in float32 at least."""

    query: Tensor  # [B, N, Q, D]
    grad: Tensor  # of the output, [B, N, Q, V]
    output: Tensor  # for all keys, [B, N, Q, V]
    sum: Tensor  # logarithm of the sum of exponentials for all keys, [B, N, Q], float32 at least
    grad_q: Tensor  # added up here, float32 at least


def _pull_back(
    ring: Ring,
    sides: list[_Side],
    pair: tuple[int, int, list[int]],
    part_KBF: Tensor,
    up_weight: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Return the gradient of a chunk of rows, [K, B, F]; adds those of queries and weight."""
    owner, j, seen_by = pair
    part = part_KBF.detach().requires_grad_()
    weight = None if up_weight is None else up_weight.detach().requires_grad_()
    with torch.enable_grad():
        k, v = _expand(ring, part, weight)
    sides_k, sides_v = (x.detach().to(sides[0].query.dtype) for x in (k, v))
    grad_k, grad_v = (torch.zeros_like(x, dtype=sides[0].grad_q.dtype) for x in (k, v))
    for i in seen_by:
        tensors = (sides[i].query, sides_k, sides_v)
        totals = (sides[i].grad_q, grad_k, grad_v)
        _add_gradients(totals, ring, sides[i], tensors, (owner, i, j))
    inputs = [part] if weight is None else [part, weight]
    grads = torch.autograd.grad((k, v), inputs, (grad_k.to(k.dtype), grad_v.to(v.dtype)))
    if grad_weight is not None:
        grad_weight += grads[1]
    return grads[0]


def _expand(ring: Ring, rows_KBF: Tensor, up_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys and values for every query head, [B, N, K, D] and [B, N, K, V]."""
    heads = ring.layer.heads
    k, v = (x.permute(1, 2, 0, 3) for x in heads.expand(rows_KBF, up_weight))
    times = heads.num_heads // k.shape[1]
    if times > 1:
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
    return k, v


def _scores(step: Step, mask: Tensor | None) -> Tensor:
    """Return [B, N, Q, K] in float32 at least, -inf where a query does not see a key."""
    wide = torch.promote_types(step.query.dtype, torch.float32)
    scores = (step.query.to(wide) @ step.key.mT.to(wide)) * step.scale
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _attend_into(result: Result, ring: Ring, tensors: Tensors, pair: Pair) -> None:
    """Add what queries of a chunk see of the keys of one."""
    for part in ring.parts(pair):
        step = ring.step(tensors, part)
        found = _written_out(ring, step, pair) if ring.kernel is None else ring.kernel.forward(step)
        merge_into((part.of_queries(result[0]), part.of_queries(result[1])), found)


def _add_gradients(totals: Tensors, ring: Ring, side: _Side, tensors: Tensors, pair: Pair) -> None:
    """Add what keys of a chunk give to the gradients of the queries of one, of themselves and their values."""
    for part in ring.parts(pair):
        step = ring.step(tensors, part)
        grad, output, log_sum = (part.of_queries(x) for x in (side.grad, side.output, side.sum))
        if ring.kernel is None:
            found = _written_out_gradients(ring, step, (grad, output, log_sum), pair)
        else:
            found = ring.kernel.backward(step, grad, (output, log_sum.contiguous()))
        into = (part.of_queries(totals[0]), part.of_keys(totals[1]), part.of_keys(totals[2]))
        for total, each in zip(into, found, strict=True):
            total.add_(each)


def _written_out(ring: Ring, step: Step, pair: Pair) -> Result:
    scores = _scores(step, ring.mask(pair, step.query.device))
    log_sum = scores.logsumexp(dim=-1)
    weights = (scores - finite(log_sum)[..., None]).exp()
    return weights @ step.value.to(weights.dtype), log_sum


def _written_out_gradients(
    ring: Ring, step: Step, of_output: tuple[Tensor, Tensor, Tensor], pair: Pair
) -> Tensors:
    grad, output, log_sum = of_output
    scores = _scores(step, ring.mask(pair, step.query.device))
    weights = (scores - log_sum[..., None]).exp()
    # Sum of output times gradient: Dao et al. 2022, appendix B.2.
    delta = (grad * output).sum(dim=-1, keepdim=True)
    grad_scores = weights * (grad @ step.value.mT - delta) * step.scale
    return grad_scores @ step.key, grad_scores.mT @ step.query, weights.mT @ grad


def _nothing_seen(q: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_zeros(*q.shape[:3], value_dim, dtype=wide),
        q.new_full(q.shape[:3], -torch.inf, dtype=wide),
    )


def _heads_last(chunks: Sequence[Tensor]) -> Tensor:
    """Return [L, B, N, ...] from chunks [B, N, Q, ...]."""
    return torch.cat(tuple(chunks), dim=2).permute(2, 0, 1, 3)
