"""Shards of a checkpoint in torch's distributed format: hashed as they are written, read with care.

A rank writes one file of its own tensors; the first rank also writes `.metadata`, which says where
each tensor is, and which is read by megamoe/mcore/stored.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import (
    _validate_global_plan,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megamoe.checkpoints.manifest import FileEntry, HashingFile
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import ShardReader

# torch.save adds about 1.2 KB to a tensor, the entry in .metadata is about 0.5 KB.
_BYTES_PER_TENSOR = 2_048
_BYTES_PER_CHECKPOINT = 1 << 20  # manifest, progress, what else there is


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What a rank has of a tensor: all that is within some bounds of each dimension."""

    name: str
    shape: tuple[int, ...]  # of the tensor
    offsets: tuple[int, ...]  # where the box begins in it
    data: Tensor  # the box, of as many dimensions


class ShardWriter(FileSystemWriter):
    """Writes a rank's file and keeps its hash; the first rank writes `.metadata` too.

    Megatron-Core 0.16.1 strategies/filesystem_async.py starts a process for each file, which
    imports torch again (seconds a save) and hangs its parent when it dies.
    """

    def __init__(self, folder: Path) -> None:
        """Write into a folder that exists; tensors must be on the CPU."""
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.fs = self._files = _HashedFiles()
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}  # first rank: (dtype, shape)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Compare what all ranks will write with the space there is (first rank).

        Raises:
            CheckpointError: the file system has too little space.
        """
        items = [item for plan in plans for item in plan.items]
        needed = sum(map(_num_bytes, items)) + _BYTES_PER_CHECKPOINT
        available = disk_usage(self.path).free
        if needed > available:
            raise CheckpointError(
                f"{Path(self.path).parent}: a checkpoint needs {needed:,} bytes, {available:,} are "
                "available; make room, or remove checkpoints that `latest` does not name"
            )
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file.

        Raises:
            OSError: the system refuses. torch 2.13 would say "unexpected pos 704 vs 598" instead.
        """
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            for file in self._files.written:
                if file.error is not None:
                    raise file.error from error
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata` (first rank)."""
        super().finish(metadata, results)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f"{name} is no tensor"
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            self.tensors[name] = (dtype, tuple(tensor.size))

    def storage_meta(self) -> StorageMeta:
        """Return nothing about this machine: paths stay out of the file."""
        return StorageMeta()

    def entries(self, rank: int) -> list[FileEntry]:
        """Return the files this rank has written."""
        entries = [file.entry(rank) for file in self._files.written]
        return [replace(entry, name=entry.name.removesuffix(".tmp")) for entry in entries]


def write_shards(
    boxes: Sequence[Box], folder: Path, group: ProcessGroup, *, validate: bool
) -> ShardWriter:
    """Write the boxes of all ranks and flush them to disk; every rank of the group calls it.

    Args:
        boxes: of this rank, on the CPU.
        folder: exists, and holds no shards.
        group: of all ranks that write.
        validate: check that the boxes of all ranks together are each tensor whole and once.

    Raises:
        CheckpointException: of torch; says for each rank that failed why.
    """
    writer = ShardWriter(folder)
    planner = _BoxPlanner(boxes, validate=validate)
    save({}, storage_writer=writer, planner=planner, process_group=group)
    return writer


class _BoxPlanner(SavePlanner):
    """What torch's distributed checkpointing asks about boxes."""

    def __init__(self, boxes: Sequence[Box], *, validate: bool) -> None:
        self._boxes = {(box.name, box.offsets): box for box in boxes}
        assert len(self._boxes) == len(boxes), "a box is there twice"
        self._validate = validate

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # empty: a box is no tensor
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,  # noqa: FBT001, FBT002 - torch's call
    ) -> None:
        """Take nothing: the boxes are there."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(box) for box in self._boxes.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        if self._validate:
            problems = _validate_global_plan(plans, metadata) + _not_whole(metadata)
            assert not problems, problems[:3]
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None, write_item.index
        return self._boxes[write_item.index.fqn, tuple(write_item.index.offset)].data


@contextmanager
def careful_reading() -> Iterator[None]:
    """Have Megatron-core read checkpoints with `ShardReader`.

    Megatron-Core 0.16.1 dist_checkpointing/strategies/torch.py:750 makes a reader of torch's, which
    unpickles anything; 0.19.2 (:902) one that also keeps the metadata of the first checkpoint a
    process loads for those that follow.
    """
    original = torch_strategy._get_filesystem_reader
    torch_strategy._get_filesystem_reader = lambda folder, *_, **__: ShardReader(folder)
    try:
        yield
    finally:
        torch_strategy._get_filesystem_reader = original


class _HashedFiles(FileSystem):
    """torch's way to the file system; files opened for writing are hashed."""

    def __init__(self) -> None:
        self.written: list[HashingFile] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with HashingFile(Path(path)) as file:
            self.written.append(file)
            yield file


def _write_item(box: Box) -> WriteItem:
    offsets, sizes = torch.Size(box.offsets), box.data.shape
    assert len(box.shape) == len(offsets) == len(sizes), box.name
    properties = TensorProperties(dtype=box.data.dtype)
    chunk = ChunkStorageMetadata(offsets, sizes)
    return WriteItem(
        index=MetadataIndex(box.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(box.shape)),
    )


def _not_whole(metadata: Metadata) -> list[str]:
    """Return the tensors of which values are missing; torch does not look where there is one rank."""
    return [
        f"{name} is not whole"
        for name, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
        and sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size)
    ]


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None, f"{item.index} is no tensor"
    sizes: Sequence[int] = data.chunk.sizes
    return torch.Size(sizes).numel() * data.properties.dtype.itemsize + _BYTES_PER_TENSOR
