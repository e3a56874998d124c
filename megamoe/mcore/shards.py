"""Shards of a checkpoint in torch's distributed format: hashed as they are written, read with care.

A rank writes one file of its own tensors; the first rank also writes `.metadata`, which says where
each tensor is, and which is read by megamoe/mcore/stored.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megamoe.checkpoints.manifest import FileEntry, HashingFile
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import ShardReader

# torch.save adds about 1.2 KB to a tensor, the entry in .metadata is about 0.5 KB.
_BYTES_PER_TENSOR = 2_048
_BYTES_PER_CHECKPOINT = 1 << 20  # manifest, progress, what else there is


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
    state: dict[str, list[ShardedTensor]], folder: Path, group: ProcessGroup
) -> ShardWriter:
    """Write the tensors of all ranks and flush them to disk; every rank of the group calls it.

    Raises:
        CheckpointException: of torch; says for each rank that failed why.
    """
    writer = ShardWriter(folder)
    save(
        mcore_to_pyt_state_dict(state, False),  # noqa: FBT003 - not loading
        storage_writer=writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )
    return writer


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


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None, f"{item.index} is no tensor"
    sizes: Sequence[int] = data.chunk.sizes
    return torch.Size(sizes).numel() * data.properties.dtype.itemsize + _BYTES_PER_TENSOR
