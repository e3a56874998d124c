"""What each scheme of context parallelism sends and computes, and which is the fastest by that.

Bytes are those of megamoe/nn/context_group.py, to the byte. Times are estimates for choosing, from
two rates of the machine, without what kernels lose.
"""

from dataclasses import dataclass, replace

import torch

from megamoe.nn.context_group import WireBytes, shard_len
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import Scheme, schemes
from megamoe.nn.context_transfers import Chunks
from megamoe.plan.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of which sequences a rank has."""

    seq_len: int
    batch: int
    cp: int
    rank: int
    dtype: torch.dtype

    @property
    def shard_len(self) -> int:
        """Return the tokens of each sequence on one rank."""
        return shard_len(self.seq_len, self.cp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of one rank."""

    link_bytes_per_s: float  # received, while it computes
    flops_per_s: float  # of attention and projections
    message_s: float  # from one rank to another, however small
    has_ring_kernel: bool = True  # for the layers in question; else a ring writes out scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one layer costs the rank that it costs most, forward and backward."""

    scheme: Scheme
    wire: WireBytes
    flops: float
    seconds: float
    writes_scores: bool = False  # no kernel does it: scores are written out in float32


# How much slower attention is with scores written out: a GPU's FLOP/s in bfloat16 over those in float32,
# 989 / 67 of an H200 (its data sheet). What reading and writing them takes comes on top, and on a CPU it
# is less; neither makes such a ring the fastest.
_SCORES_WRITTEN_OUT = 15.0

# By how much a ring must be faster than heads to be taken where heads divide. Its estimate hides all
# messages behind its attention and takes many small steps to be as fast as one large one; that of heads
# hides nothing. And it sends several times as much, which others on the same links pay for.
_CLEAR_GAIN = 0.1

# Rates where a cluster states none: gloo on one machine; NVLink 4, of 450 GB/s each way. Of the peak
# FlashAttention 3 comes near a half; a message is a kernel of NCCL and a network.
_CPU = Machine(link_bytes_per_s=1e9, flops_per_s=2e10, message_s=1e-4)
_NVLINK_BYTES_PER_S = 300e9
_SHARE_OF_PEAK = 0.5
_MESSAGE_S = 2e-5


def machine_of(cluster: Cluster, num_neighbours: int) -> Machine:
    """Return the rates of a rank of a cluster.

    Args:
        cluster: of which each device is a rank.
        num_neighbours: ranks side by side among which those of a sequence are, tp * cp.
    """
    if cluster.peak_flops_per_s is None:
        return _CPU
    link = _NVLINK_BYTES_PER_S
    if num_neighbours > cluster.devices_per_node and cluster.network_bytes_per_s is not None:
        link = cluster.network_bytes_per_s / cluster.devices_per_node
    return Machine(
        link_bytes_per_s=link,
        flops_per_s=_SHARE_OF_PEAK * cluster.peak_flops_per_s,
        message_s=_MESSAGE_S,
    )


def wire_bytes(layer: AttentionLayer, scheme: Scheme, extent: Extent) -> WireBytes:
    """Return what one rank receives for one call, if latents, keys, values and queries have gradients.

    Documents are not in it: `document_starts` receives (S - L) * B bytes once a batch, and an id a sequence.
    """
    if extent.cp == 1:
        return WireBytes()
    size = extent.batch * extent.dtype.itemsize
    length, others = extent.shard_len, extent.cp - 1
    row = layer.heads.row_dim * size
    if scheme is Scheme.HALO:
        before, after = _halo_rows(layer, extent)
        return WireBytes(forward=before * row, backward=after * row)
    if scheme is Scheme.GATHER:
        return WireBytes(forward=others * length * row, backward=others * length * row)
    query = layer.heads.num_heads * layer.heads.key_dim * size
    output = layer.heads.num_heads * layer.heads.value_dim * size
    if scheme is Scheme.HEADS:
        if isinstance(layer.heads, GroupedHeads):  # a head that ranks share goes to each of them
            row = row * max(1, extent.cp // layer.heads.num_kv_heads) // extent.cp
        both = others * length * row + others * length * (query + output) // extent.cp
        return WireBytes(forward=both, backward=both)
    into, back = _chunk_rows(extent)
    wide = torch.promote_types(extent.dtype, torch.float32).itemsize
    sums = layer.heads.row_dim * extent.batch * wide
    return WireBytes(
        forward=into * (row + query) + back * output + others * length * row,
        backward=into * output
        + back * (row + query)
        + others * length * row
        + extent.cp * length * sums,
    )


def estimate(layer: AttentionLayer, scheme: Scheme, extent: Extent, machine: Machine) -> Cost:
    """Return what a scheme costs one rank, forward and backward.

    Attention is computed 3.5 times, the scores of its backward pass anew, and projections three
    times, in a ring four. A document is taken to be the whole sequence, as far as attention goes.
    Messages of a ring are hidden by its attention as far as that takes; those of the others by
    nothing, though a caller may hide some behind its query projections.
    """
    wire = wire_bytes(layer, scheme, extent)
    attention, projection = _attention_flops(layer, scheme, extent), 0.0
    if isinstance(layer.heads, LatentHeads):
        projection = _projection_flops(layer, layer.heads, scheme, extent)
    flops = 3.5 * attention + (4 if scheme is Scheme.RING else 3) * projection
    writes_scores = scheme is Scheme.RING and not machine.has_ring_kernel
    slowed = 3.5 * attention * (_SCORES_WRITTEN_OUT - 1) if writes_scores else 0.0
    computing = (flops + slowed) / machine.flops_per_s
    sending = (wire.forward + wire.backward) / machine.link_bytes_per_s
    if scheme is not Scheme.RING:
        num_messages = 6 if scheme is Scheme.HEADS else 2
        seconds = computing + sending + num_messages * machine.message_s
        return Cost(scheme=scheme, wire=wire, flops=flops, seconds=seconds)
    moved = _chunks_moved(layer, extent) / machine.link_bytes_per_s
    latency = (3 * extent.cp + 4) * machine.message_s
    seconds = moved + max(computing, sending - moved) + latency
    return Cost(scheme=scheme, wire=wire, flops=flops, seconds=seconds, writes_scores=writes_scores)


def choose(layer: AttentionLayer, extent: Extent, machine: Machine) -> tuple[Cost, ...]:
    """Return what every scheme that can do the layer costs its slowest rank, the one to take first.

    That is the fastest, but heads before a ring that gains less than a tenth.

    Args:
        layer: to be computed.
        extent: of any rank: all ranks get the same answer.
        machine: rates of a rank.
    """
    worst = [
        max(
            (
                estimate(layer, scheme, replace(extent, rank=rank), machine)
                for rank in range(extent.cp)
            ),
            key=lambda cost: cost.seconds,
        )
        for scheme in schemes(layer, extent.cp)
    ]
    seconds = {cost.scheme: cost.seconds for cost in worst}
    both = seconds.keys() >= {Scheme.HEADS, Scheme.RING}
    if both and seconds[Scheme.RING] > (1 - _CLEAR_GAIN) * seconds[Scheme.HEADS]:
        seconds[Scheme.RING] = max(seconds[Scheme.RING], seconds[Scheme.HEADS])
    return tuple(sorted(worst, key=lambda cost: seconds[cost.scheme]))  # as listed where they tie


def explain(costs: tuple[Cost, ...], chosen: Scheme) -> str:
    """Return one line for a log: what was chosen, whether by estimate, and what else there was."""
    by_scheme = {cost.scheme: cost for cost in costs}
    why = "as asked for"
    if chosen is Scheme.HALO:
        why = "always with a window"
    elif chosen is costs[0].scheme:
        is_fastest = costs[0].seconds <= min(cost.seconds for cost in costs)
        why = "fastest by estimate" if is_fastest else "a ring gains too little by estimate"
    listed = ", ".join(_described(cost) for cost in costs if cost.scheme is not chosen)
    others = f"; else {listed}" if listed else ""
    return f"{_described(by_scheme[chosen])}, {why}{others}"


def _described(cost: Cost) -> str:
    received = (cost.wire.forward + cost.wire.backward) / 1e6
    scores = ", scores written out" if cost.writes_scores else ""
    return (
        f"{cost.scheme.value} {cost.seconds * 1e3:.3g} ms ({received:.3g} MB, "
        f"{cost.flops / 1e12:.3g} TFLOP{scores})"
    )


def _halo_rows(layer: AttentionLayer, extent: Extent) -> tuple[int, int]:
    """Return the rows that come from the ranks before, and those that the ranks after have."""
    assert layer.window is not None, "a halo is for layers with a window"
    before = min(layer.window - 1, extent.rank * extent.shard_len)
    after = min(layer.window - 1, (extent.cp - 1 - extent.rank) * extent.shard_len)
    return before, after


def _chunk_rows(extent: Extent) -> tuple[int, int]:
    """Return the rows that come from other ranks into zig-zag order, and back out of it."""
    chunks = Chunks(cp=extent.cp, shard_len=extent.shard_len)
    into, back = (
        sum(
            len(chunks.rows(chunk))
            for chunk in chunks.held_by(extent.rank, zigzag=zigzag)
            if chunks.rank_of(chunk, zigzag=not zigzag) != extent.rank
        )
        for zigzag in (True, False)
    )
    return into, back


def _chunks_moved(layer: AttentionLayer, extent: Extent) -> int:
    """Return the bytes of zig-zag order alone, which nothing hides."""
    into, back = _chunk_rows(extent)
    heads = layer.heads
    values = heads.row_dim + heads.num_heads * (heads.key_dim + heads.value_dim)
    return (into + back) * values * extent.batch * extent.dtype.itemsize


def _attention_flops(layer: AttentionLayer, scheme: Scheme, extent: Extent) -> float:
    """Return the FLOPs of scores and their sums over values, once."""
    length, rank = extent.shard_len, extent.rank
    if scheme is Scheme.HEADS:
        pairs: float = _pairs(layer.window, extent.seq_len) / extent.cp
    elif scheme is Scheme.RING:
        chunks = Chunks(cp=extent.cp, shard_len=length)
        rows = [chunks.rows(chunk) for chunk in chunks.held_by(rank, zigzag=True)]
        pairs = sum(_pairs(layer.window, r.stop) - _pairs(layer.window, r.start) for r in rows)
    else:
        pairs = _pairs(layer.window, (rank + 1) * length) - _pairs(layer.window, rank * length)
    heads = layer.heads
    return 2.0 * extent.batch * pairs * heads.num_heads * (heads.key_dim + heads.value_dim)


def _projection_flops(
    layer: AttentionLayer, heads: LatentHeads, scheme: Scheme, extent: Extent
) -> float:
    """Return the FLOPs of projecting latents up, once; in a ring at most."""
    length = extent.shard_len
    rows: float = extent.seq_len
    if scheme is Scheme.HALO:
        rows = length + _halo_rows(layer, extent)[0]
    elif scheme is Scheme.GATHER:
        reach = (extent.rank + 1) * length
        rows = reach if layer.window is None else min(reach, length + layer.window - 1)
    elif scheme is Scheme.HEADS:
        rows = extent.seq_len / extent.cp
    out_dim = heads.num_heads * (heads.nope_dim + heads.value_dim)
    return 2.0 * extent.batch * rows * heads.latent_dim * out_dim


def _pairs(window: int | None, length: int) -> int:
    """Return how many pairs of query and key the first `length` positions see."""
    full = length if window is None else min(window, length)
    return full * (full + 1) // 2 + (length - full) * full
