"""Initial weights that do not depend on the layout.

Each weight matrix is drawn in blocks of rows, each block from a generator seeded by the run's
seed, the matrix's global name and the block's position. A rank draws only the rows it holds, so
a matrix split by tensor, expert or pipeline parallelism has the same values as a whole one.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megamoe.mcore.groups import sharding

_BLOCK_ROWS = 256


def initialize(chunks: Iterable[Any], *, std: float, seed: int) -> None:
    """Fill every matrix of the model chunks with N(0, std); norms keep their constants."""
    for chunk in chunks:
        matrices = sum(p.numel() for p in chunk.parameters() if p.ndim > 1)
        parts = [
            part
            for part in sharded_tensors(chunk.sharded_state_dict(metadata=sharding()))
            if part.data is not None and part.data.ndim > 1
        ]
        # One core draws some 60 million numbers a second: minutes for a large model.
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda part: _fill(part, std, seed), parts))
        filled = sum(part.data.numel() for part in parts)
        assert filled == matrices, f"{filled} of {matrices} weights were initialised"


def sharded_tensors(state: dict[str, object]) -> Iterable[ShardedTensor]:
    """Yield the parts of a sharded state, those that Megatron-core makes of one tensor each by itself."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_tensors({"": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


@torch.no_grad()
def _fill(part: ShardedTensor, std: float, seed: int) -> None:
    axes = part.prepend_axis_num
    where = part.global_offset[:axes]
    first_row, first_column = part.global_offset[axes], part.global_offset[axes + 1]
    num_columns = part.global_shape[axes + 1]
    data = part.data
    assert data.ndim == 2, f"{part.key} is not a matrix: {tuple(data.shape)}"
    row = first_row
    while row < first_row + data.shape[0]:
        block = row // _BLOCK_ROWS
        values = _block(f"{seed}/{part.key}/{where}/{block}", num_columns)
        start = row - block * _BLOCK_ROWS
        count = min(_BLOCK_ROWS - start, first_row + data.shape[0] - row)
        columns = slice(first_column, first_column + data.shape[1])
        target = data[row - first_row : row - first_row + count]
        target.copy_(values[start : start + count, columns] * std)
        row += count


def _block(name: str, num_columns: int) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(_BLOCK_ROWS, num_columns, generator=generator, dtype=torch.float32)
