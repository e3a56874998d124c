"""The classes of deep_ep that Megatron-core calls, in plain torch over gloo. For tests alone: no GPU here.

What they take and return is what DeepEP 1.2.1 (deep_ep/buffer.py) and its branch hybrid-ep
(deep_ep/hybrid_ep_buffer.py) document; nothing of how they do it.

Shapes: T tokens of a rank, R rows it receives, P pairs of a token and an expert, K experts of a token, E experts of the group, D hidden.
"""

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single


def install() -> None:
    """Let `import deep_ep` find the classes below; before Megatron-core is imported."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer = Buffer, HybridEPBuffer
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}


class EventHandle:
    """An event of a stream, of which a CPU has none."""


class EventOverlap:
    """What a stream waits for."""

    def __init__(self, event: Any = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None


class Route(NamedTuple):
    """Which rows go to which rank, and how many come from each."""

    rows: Tensor  # of this rank, those for rank 0 first
    sent: list[int]
    received: list[int]
    group: ProcessGroup

    def there(self, x: Tensor) -> Tensor:
        return self._move(x.index_select(0, self.rows), self.received, self.sent)

    def back(self, x: Tensor) -> Tensor:
        return self._move(x, self.sent, self.received)

    def _move(self, x: Tensor, into: list[int], out_of: list[int]) -> Tensor:
        moved = x.new_empty(sum(into), *x.shape[1:])
        all_to_all_single(moved, x.contiguous(), into, out_of, group=self.group)
        return moved


def route(rows: Tensor, sent: Tensor, group: ProcessGroup) -> Route:
    received = torch.empty_like(sent)
    all_to_all_single(received, sent, group=group)
    return Route(rows, sent.tolist(), received.tolist(), group)


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    """A token goes once to each rank that has any of its experts."""

    num_sms = 0

    def __init__(self, group: ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(num_sms: int) -> None:
        Buffer.num_sms = num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4)
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        is_for_TE = torch.zeros(len(topk_idx), num_experts, dtype=torch.bool)
        is_for_TE.scatter_(1, topk_idx, value=True)
        in_rank = is_for_TE.view(len(topk_idx), self.group.size(), -1).any(dim=2)
        counts = (in_rank.sum(dim=0).int(), is_for_TE.sum(dim=0).int())
        return counts[0], None, counts[1], in_rank, EventOverlap(EventHandle())

    def dispatch(self, x: Tensor, handle: Route | None = None, **given: Any) -> tuple[Any, ...]:
        event = EventOverlap(EventHandle())
        if handle is not None:
            return handle.there(x), None, None, None, None, event
        assert given["topk_weights"].dtype == torch.float32
        rows = given["is_token_in_rank"].T.nonzero()[:, 1]
        handle = route(rows, given["num_tokens_per_rank"].long(), self.group)
        num_local = len(given["num_tokens_per_expert"]) // self.group.size()
        index_RK = handle.there(given["topk_idx"]) - self.group.rank() * num_local
        is_here_RK = (index_RK >= 0) & (index_RK < num_local)
        index_RK = index_RK.masked_fill(~is_here_RK, -1)
        weights_RK = handle.there(given["topk_weights"]) * is_here_RK
        counts = index_RK[is_here_RK].bincount(minlength=num_local).tolist()
        return handle.there(x), index_RK, weights_RK, counts, handle, event

    def combine(
        self, x: Tensor, handle: Route, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Any, ...]:
        """Return the sums of each token's rows, and of its weights."""
        sums = [None if each is None else self._sum(each, handle) for each in (x, topk_weights)]
        return *sums, EventOverlap(EventHandle())

    def _sum(self, x: Tensor, handle: Route) -> Tensor:
        num_tokens = torch.tensor(0)
        if len(handle.rows):
            num_tokens = handle.rows.max() + 1  # each token has an expert
        zeros = x.new_zeros(int(num_tokens), x.shape[1])
        return zeros.index_add_(0, handle.rows, handle.back(x))


class Pairs(NamedTuple):
    """A row for each expert of each token."""

    route: Route
    order: Tensor  # by local expert
    experts: Tensor  # of the rows that this rank sends
    shape: tuple[int, int]  # T, E


class HybridEPBuffer:
    """A token goes to each of its experts; rows arrive sorted by expert."""

    def __init__(self, group: ProcessGroup, use_fp8: bool, **_: Any) -> None:  # noqa: FBT001
        assert not use_fp8
        self.group = group

    def dispatch_with_permute(
        self,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        handle: Pairs | None = None,
        **given: Any,
    ) -> tuple[Any, ...]:
        assert given["pad_multiple"] is None
        if handle is not None:
            return handle.route.there(hidden)[handle.order], None, None, None, handle
        experts, tokens = routing_map.T.nonzero().unbind(dim=1)
        num_local = given["num_of_experts_per_rank"]
        sent = (experts // num_local).bincount(minlength=self.group.size())
        there = route(tokens, sent, self.group)
        local = there._move(experts, there.received, there.sent) % num_local
        pairs = Pairs(there, local.argsort(stable=True), experts, tuple(routing_map.shape))
        weights = there._move(probs[tokens, experts], there.received, there.sent)
        counts = local.bincount(minlength=num_local).int()
        rows = there.there(hidden)[pairs.order]
        return rows, weights[pairs.order], None, counts, pairs

    def combine_with_unpermute(
        self, hidden: Tensor, handle: Pairs, probs: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        num_tokens, num_experts = handle.shape
        rows, tokens = torch.empty_like(hidden), handle.route.rows
        rows[handle.order] = hidden
        zeros = hidden.new_zeros(num_tokens, hidden.shape[1])
        sums_TD = zeros.index_add_(0, tokens, handle.route.back(rows))
        if probs is None:
            return sums_TD, None
        weights = torch.empty_like(probs)
        weights[handle.order] = probs
        probs_TE = probs.new_zeros(num_tokens, num_experts)
        probs_TE[tokens, handle.experts] = handle.route.back(weights)
        return sums_TD, probs_TE
