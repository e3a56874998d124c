"""The optimizer's state in checkpoints: each rank writes its own part of it, and reads its own part.

The distributed optimizer gives a data-parallel rank some values of a weight, one after another in the
order of memory. Such a run of a tensor with several dimensions is a few boxes of it: the end of a row,
whole rows, the beginning of a row. A rank stores those, each with its place in the whole tensor, so
that nothing is gathered, no rank needs room for more than its own, and any other layout finds its part.

Megatron-Core 0.16.1 has a form that any layout can read ('fully_reshardable',
optimizer/distrib_optimizer.py:1404; 0.19.2: 1694), and gathers all of it on the first data-parallel rank to write it; to
read it, each rank makes room for all that its data-parallel group has (:977, return_on_all_ranks). Names and
shapes of tensors are those of that form.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megamoe.checkpoints.tensors import weight_of_master
from megamoe.errors import CheckpointError
from megamoe.mcore.optim import parts_of
from megamoe.mcore.shards import Box
from megamoe.mcore.stored import ChunkReader

_KINDS = ("param", "exp_avg", "exp_avg_sq")  # of each weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A part of a weight that is contiguous in memory and a box of one tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]  # where the piece begins in it
    sizes: tuple[int, ...]
    start: int  # where it begins in the weight, in values
    is_replica: bool  # another rank, not of this data-parallel group, has it too and writes it


def state_boxes(optimizer: MegatronOptimizer, models: Iterable[Any]) -> Iterator[tuple[Box, bool]]:
    """Yield what of the optimizer's state this rank has, and whether it is this rank that writes it.

    Args:
        optimizer: a distributed optimizer, or several in a chain.
        models: sharded state dict of each model chunk, made with its parameters themselves as data.

    Yields:
        Boxes whose data are views of the state: what is copied there is loaded.
    """
    pieces = {id(base.data): _pieces(base) for model in models for base in nested_values(model)}
    parts = parts_of(optimizer)
    for index, part in enumerate(parts):
        prefix = f"chained_{index}." if len(parts) > 1 else ""
        for weight, first, end in _runs(part):
            states = part._get_main_param_and_optimizer_states(weight)
            for kind in _KINDS:
                values = states[kind].detach().view(-1)
                assert len(values) == end - first, (len(values), first, end)
                for piece in pieces[id(weight)]:
                    name = f"{prefix}optimizer.state.{kind}.{piece.name}"
                    for box in _boxes(piece, name, values, first):
                        yield box, not piece.is_replica


def read_states(reader: ChunkReader, optimizer: MegatronOptimizer, models: Iterable[Any]) -> None:
    """Load what this rank has of the optimizer's state, whatever layout wrote it.

    Raises:
        CheckpointError: a tensor is not there, or has another shape.
    """
    for box, _ in state_boxes(optimizer, models):
        stored = reader.tensors.get(box.name)
        if stored is None or stored.shape != box.shape:
            there = "absent" if stored is None else f"of shape {stored.shape}"
            raise CheckpointError(f"{reader.folder}: {box.name} is {there}, not {box.shape}")
        box.data.copy_(reader.read_box(box.name, box.offsets, tuple(box.data.shape)))


def read_masters(reader: ChunkReader, optimizer: MegatronOptimizer, models: Iterable[Any]) -> None:
    """Load this rank's float32 copies from weights, which hold more than those of the model may.

    Copies that were made of the model's own weights are exact but where those are rounded.
    """
    of_model = parts_of(optimizer)[0].config.params_dtype
    for box, _ in state_boxes(optimizer, models):
        name = weight_of_master(box.name)
        if name is not None and of_model not in (torch.float32, reader.tensors[name].dtype):
            box.data.copy_(reader.read_box(name, box.offsets, tuple(box.data.shape)))


def boxes_of_run(
    sizes: tuple[int, ...], first: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of the boxes that values `first` to `end` of a tensor are, in order.

    Args:
        sizes: of the tensor, whose last dimension is contiguous.
        first: the first value, counted through the tensor.
        end: the one after the last.
    """
    if first >= end:
        return
    if len(sizes) == 1:
        yield (first,), (end - first,)
        return
    row = prod(sizes[1:])
    whole, whole_end = -(-first // row), end // row
    if whole > whole_end:  # within one row
        yield from _in_row(whole_end, sizes, first, end)
        return
    yield from _in_row(whole - 1, sizes, first, whole * row)
    if whole < whole_end:
        rest = sizes[1:]
        yield (whole, *[0] * len(rest)), (whole_end - whole, *rest)
    yield from _in_row(whole_end, sizes, whole_end * row, end)


def _in_row(
    row: int, sizes: tuple[int, ...], first: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    start = row * prod(sizes[1:])
    for offsets, part in boxes_of_run(sizes[1:], first - start, end - start):
        yield (row, *offsets), (1, *part)


def _boxes(piece: _Piece, name: str, values: Tensor, first: int) -> Iterator[Box]:
    """Yield the boxes of a piece that `values` fill, which begin at `first` in the weight."""
    begin = max(first - piece.start, 0)
    end = min(first + len(values) - piece.start, prod(piece.sizes))
    place = begin + piece.start - first
    for offsets, sizes in boxes_of_run(piece.sizes, begin, end):
        data = values[place : place + prod(sizes)].view(sizes)
        place += prod(sizes)
        at = tuple(sum(pair) for pair in zip(piece.offsets, offsets, strict=True))
        yield Box(name=name, shape=piece.shape, offsets=at, data=data)


def _pieces(base: Any) -> list[_Piece]:
    """Return the pieces of a weight, as Megatron-core's description of it for checkpoints has them."""
    if isinstance(base, ShardedTensor):
        parts = [base]
    elif isinstance(base, ShardedTensorFactory):
        parts = list(nested_values(base.build()))
    else:
        return []  # no tensor: an extra state
    pieces = []
    for part in parts:
        assert isinstance(part.data, Tensor), part.key
        assert part.data.is_contiguous(), part.key
        pieces.append(
            _Piece(
                name=part.key,
                shape=tuple(part.global_shape),
                offsets=tuple(part.global_offset),
                sizes=(*[1] * part.prepend_axis_num, *part.local_shape),
                start=part.data.storage_offset() - base.data.storage_offset(),
                is_replica=any(_replica(part)[:-1]),  # the last one counts data-parallel ranks
            )
        )
    return pieces


def _replica(part: ShardedTensor) -> tuple[int, ...]:
    replica = part.replica_id
    assert isinstance(replica, tuple), (part.key, replica)
    return replica


def _runs(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield each weight of which this rank has values, the first of them and the one after the last."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for weight, where in bucket["param_map"].items():
                    yield weight, where["param"].start, where["param"].end
