"""Counts what collectives are handed, beside the counts of megamoe/nn/context_group.py, which must be the same."""

from torch import distributed as dist

from benchmarks import context_parallel
from megamoe.nn import context_group


def watch() -> None:
    """Compare both counts of every layer that the benchmark runs, from here on."""
    received = []
    gather, exchange, batch = (
        context_group._all_gather,
        dist.all_to_all_single,
        dist.batch_isend_irecv,
    )

    def gathered(output, own, group, async_op):
        assert output.numel() == dist.get_world_size(group) * own.numel()
        received.append(output.nbytes - own.nbytes)
        return gather(output, own, group=group, async_op=async_op)

    def exchanged(output, sent, group, async_op):
        assert output.nbytes == sent.nbytes
        received.append(output.nbytes - output.nbytes // dist.get_world_size(group))
        return exchange(output, sent, group=group, async_op=async_op)

    def passed(ops):
        received.extend(op.tensor.nbytes for op in ops if op.op is dist.irecv)
        return batch(ops)

    counted_by = context_parallel.received_by

    def compared(cp, planned, inputs):
        received.clear()
        wire = counted_by(cp, planned, inputs)
        assert received
        assert sum(received) == wire.forward + wire.backward, (planned, received, wire)
        return wire

    context_group._all_gather = gathered
    dist.all_to_all_single = exchanged
    dist.batch_isend_irecv = passed
    context_parallel.received_by = compared
