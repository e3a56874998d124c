"""The ranks that share a sequence, what they send each other, and how gradients go back.

A transfer is posted and waited for in two steps, so that work between the two hides it. Both are
steps of autograd: the backward pass posts where the forward pass waited and waits where it posted,
so that the gradients of the same work hide the way back. What one rank does, all do, in one order:
which inputs need a gradient must therefore be the same on all ranks.

Bytes are those a rank receives, counted from the tensors handed to the collectives: of an
all-gather, and of an all-to-all, (size - 1) / size of the result; of a message, all of it; of what
a rank keeps for itself, nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from megamoe.errors import MegamoeError

Direction = Literal["forward", "backward"]
Message = tuple[int, Tensor]  # the other rank, counted within the group; what is sent or filled
_Context = Any  # torch's own type does not know what is kept in it
# torch 2.13 renamed it and warns at each call of the old name; setup.py allows older ones.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


@dataclass(slots=True, kw_only=True)
class WireBytes:
    """Bytes received by one rank."""

    forward: int = 0
    backward: int = 0


class Pending:
    """Messages under way, and what is made of them once they are there."""

    def __init__(
        self, works: Sequence[Any], finish: Callable[[], Tensor], sent: Sequence[Tensor] = ()
    ) -> None:
        """Keep what is sent alive until the end."""
        self.works, self.finish, self.sent = works, finish, sent

    def wait(self) -> Tensor:
        """Return the result; on a GPU the stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.finish()


class ContextGroup:
    """The ranks that share a sequence: rank r has tokens r * S / size up to (r + 1) * S / size."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Take a process group; None is a rank by itself."""
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.received = WireBytes()

    def shard(self, whole: Tensor) -> Tensor:
        """Return this rank's part of the first dimension.

        Raises:
            MegamoeError: the ranks cannot share it evenly.
        """
        length = shard_len(len(whole), self.size)
        return whole[self.rank * length : (self.rank + 1) * length]

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], direction: Direction
    ) -> list[Any]:
        """Post messages between pairs of ranks as one batch; returns what to wait for.

        NCCL runs a batch as one kernel, so that its order cannot deadlock. Between two ranks the
        first message sent is the first received.
        """
        pairs = ((dist.isend, sends), (dist.irecv, receives))
        ops = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, messages in pairs
            for peer, tensor in messages
        ]
        for _, tensor in receives:
            self._count(tensor.nbytes, direction)
        return list(dist.batch_isend_irecv(ops)) if ops else []

    def rotate(self, x: Tensor, direction: Direction) -> Pending:
        """Send x to the next rank of a ring and take that of the one before."""
        x = x.contiguous()
        received = torch.empty_like(x)
        sends = [((self.rank + 1) % self.size, x)]
        receives = [((self.rank - 1) % self.size, received)]
        return Pending(self.exchange(sends, receives, direction), lambda: received, (x,))

    def all_gather(self, x: Tensor, direction: Direction) -> Pending:
        """Return the parts of all ranks, one after the other along the first dimension."""
        x = x.contiguous()
        result = x.new_empty(self.size * len(x), *x.shape[1:])
        work = _all_gather(result, x, group=self.group, async_op=True)
        self._count(result.nbytes - x.nbytes, direction)
        return Pending([work], lambda: result, (x,))

    def all_to_all(self, x: Tensor, direction: Direction) -> Pending:
        """Return [size, ...], what each rank had at this rank's place of its x, [size, ...]."""
        x = x.contiguous()
        result = torch.empty_like(x)
        work = dist.all_to_all_single(result, x, group=self.group, async_op=True)
        self._count(result.nbytes - result[0].nbytes, direction)
        return Pending([work], lambda: result, (x,))

    def _count(self, num_bytes: int, direction: Direction) -> None:
        if direction == "forward":
            self.received.forward += num_bytes
        else:
            self.received.backward += num_bytes


def shard_len(seq_len: int, cp: int) -> int:
    """Return the number of tokens of each rank.

    Raises:
        MegamoeError: the ranks cannot share them evenly.
    """
    if seq_len % cp:
        below = seq_len - seq_len % cp
        fits = f"{below} or {below + cp}" if below else f"{cp}"
        raise MegamoeError(
            f"a sequence of {seq_len} tokens is not a multiple of cp {cp}; use {fits}"
        )
    return seq_len // cp


def check_starts(starts_SB: Tensor, tokens_LB: tuple[int, ...], cp: int) -> None:
    """Check that the beginnings of documents are those of whole sequences, and of each of a batch.

    Args:
        starts_SB: where the document of each token begins.
        tokens_LB: tokens of a rank, and sequences.
        cp: number of ranks that share them.

    Raises:
        MegamoeError: they are of one rank's tokens, or of one sequence for all.
    """
    given, wanted = tuple(starts_SB.shape), (cp * tokens_LB[0], tokens_LB[1])
    if given != wanted:
        raise MegamoeError(
            f"starts_SB is {list(given)}, and cp {cp} with {tokens_LB[0]} tokens a rank of "
            f"{tokens_LB[1]} sequences needs {list(wanted)}; give those of whole sequences, one by one"
        )


class Transfer(Protocol):
    """A linear map whose input and output are spread over the ranks."""

    def post(self, cp: ContextGroup, x: Tensor) -> Pending:
        """Begin the map."""

    def post_transposed(self, cp: ContextGroup, grad: Tensor) -> Pending:
        """Begin the transposed map, which takes a gradient of the output to one of the input."""


class Posted:
    """A transfer under way, differentiable."""

    def __init__(self, cp: ContextGroup, transfer: Transfer, x: Tensor) -> None:
        """Begin it."""
        self.cp, self.transfer = cp, transfer
        self.pending: Pending | None = None
        # Of no elements: what ties the two steps in the graph, where nothing has arrived yet.
        self.token: Tensor | None = _Post.apply(x, self)  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """Return its output; to be called once."""
        # The graph keeps this object, so that keeping the graph, too, would keep both for ever.
        token, self.token = self.token, None
        output: Tensor = _Wait.apply(token, self)  # type: ignore[no-untyped-call]
        return output

    def arrive(self) -> Tensor:
        """Wait for what was posted last, forward or backward."""
        assert self.pending is not None, "nothing was posted, or it was waited for before"
        pending, self.pending = self.pending, None
        return pending.wait()


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, posted: Posted) -> Tensor:
        ctx.posted = posted
        posted.pending = posted.transfer.post(posted.cp, x)
        return x.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, _: Tensor) -> tuple[Tensor, None]:
        return ctx.posted.arrive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, _: Tensor, posted: Posted) -> Tensor:
        ctx.posted = posted
        return posted.arrive()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        posted = ctx.posted
        posted.pending = posted.transfer.post_transposed(posted.cp, grad)
        return grad.new_empty(0), None
