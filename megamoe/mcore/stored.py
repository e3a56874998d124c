"""Checkpoints tensor by tensor, in torch's distributed format; no model and no Megatron-core.

`.metadata` says in which file, and where in it, each part (chunk) of a tensor is. That file is a
pickle, so only the classes it is made of are admitted.
"""

import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from megamoe.checkpoints.folder import verify
from megamoe.checkpoints.manifest import FileEntry, HashingFile, write_file
from megamoe.checkpoints.tensors import kind_of
from megamoe.errors import CheckpointError

METADATA = ".metadata"
_FILE_BYTES = 4 << 30  # of a shard: ranks share the work of hashing by file
_ADMITTED = {
    (admitted.__module__, admitted.__qualname__): admitted
    for admitted in (
        Metadata,
        MetadataIndex,
        StorageMeta,
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
        _MEM_FORMAT_ENCODING,
        _StorageInfo,
        _get_layout,
    )
} | {("torch", "Size"): torch.Size}


class ShardReader(FileSystemReader):
    """Reads shards; `.metadata` is read once, and only what it may hold is unpickled."""

    def __init__(self, folder: Path) -> None:
        """Read from a checkpoint whose hashes have been checked."""
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what `.metadata` says.

        Raises:
            CheckpointError: it names a class or a function that no such file needs.
        """
        if self._metadata is None:
            path = Path(self.path) / METADATA
            with path.open("rb") as file:
                self._metadata = _Unpickler(file, path).load()
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a checkpoint says of one of its tensors."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class ChunkReader:
    """Reads boxes of a checkpoint's tensors, and of each chunk that it needs no more than that."""

    def __init__(self, folder: Path) -> None:
        """Read what tensors there are in a checkpoint whose hashes have been checked.

        Raises:
            CheckpointError: it holds something other than tensors.
        """
        self.folder = folder
        self._reader = ShardReader(folder)
        metadata = self._reader.read_metadata()
        self._where: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                raise CheckpointError(f"{folder}: {name} is no tensor")
            self._chunks[name] = tensor.chunks
            self.tensors[name] = StoredTensor(tensor.properties.dtype, tuple(tensor.size))

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return what is within some bounds of each dimension of a tensor.

        Args:
            name: of the tensor.
            offsets: where the box begins in it.
            sizes: of the box, in as many dimensions.

        Raises:
            CheckpointError: the chunks do not make up the box.
        """
        box = list(zip(offsets, sizes, strict=True))
        result, filled = None, 0
        for chunk in self._chunks[name]:
            sides = list(zip(chunk.offsets, chunk.sizes, strict=True))
            if sides == box:
                return self._load(name, chunk)
            shared = [
                (max(o, begin), min(o + n, begin + size))
                for (o, n), (begin, size) in zip(sides, box, strict=True)
            ]
            if any(begin >= end for begin, end in shared):
                continue
            if result is None:
                result = torch.empty(sizes, dtype=self.tensors[name].dtype)
            data = self._load(name, chunk)[_slices(shared, chunk.offsets)]
            result[_slices(shared, offsets)] = data
            filled += data.numel()
        if result is None or filled != result.numel():
            raise CheckpointError(f"{self.folder}: {name} is not whole")
        return result

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        where = self._where[MetadataIndex(name, chunk.offsets)]
        with (self.folder / where.relative_path).open("rb") as file:
            part: Any = self._reader._slice_file(file, where)
            loaded = torch.load(part, map_location="cpu", weights_only=True)
        assert isinstance(loaded, Tensor), name
        return loaded.reshape(tuple(chunk.sizes))


class TensorReader(ChunkReader):
    """Reads tensors of a checkpoint, or one position of their first dimension, and nothing else."""

    def __init__(self, folder: Path) -> None:
        """Compare every file with the manifest, then read what tensors there are.

        Raises:
            CheckpointError: a file is missing or damaged, or holds something other than tensors.
        """
        verify(folder)
        super().__init__(folder)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or what is at one position of its first dimension.

        Raises:
            CheckpointError: the chunks do not make up the tensor.
        """
        shape = self.tensors[name].shape
        if index is None:
            return self.read_box(name, (0,) * len(shape), shape)
        rest = shape[1:]
        return self.read_box(name, (index, *[0] * len(rest)), (1, *rest))[0]


class TensorWriter:
    """Writes tensors, or positions of their first dimension, one after another."""

    def __init__(self, folder: Path) -> None:
        """Write into a folder that exists and is empty."""
        self._folder = folder
        self._file: HashingFile | None = None
        self._name = ""
        self._entries: list[FileEntry] = []
        self._where: dict[MetadataIndex, _StorageInfo] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}

    def write(self, name: str, data: Tensor, index: tuple[int, int] | None = None) -> None:
        """Write a tensor, or what is at a position of the first dimension of one.

        Args:
            name: of the tensor.
            data: the tensor, or what is at the position, of one dimension less.
            index: the position, and the number of positions.
        """
        position, count = index or (0, 0)
        chunk = data if index is None else data[None]
        offsets = torch.Size((position, *[0] * (chunk.ndim - 1)))
        size = chunk.shape if index is None else torch.Size((count, *data.shape))
        if name not in self._tensors:
            self._tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=data.dtype), size, []
            )
        stored = self._tensors[name]
        assert (stored.size, stored.properties.dtype) == (size, data.dtype), name
        where = MetadataIndex(name, offsets, len(stored.chunks))
        stored.chunks.append(ChunkStorageMetadata(offsets, chunk.shape))
        if self._file is None:
            self._name = f"__0_{len(self._entries)}.distcp"
            self._file = HashingFile(self._folder / self._name)
        start = self._file.tell()
        # A view would take its whole storage along.
        stream: Any = self._file
        try:
            torch.save(chunk.clone() if _is_part(chunk) else chunk, stream)
        except RuntimeError as error:
            if self._file.error is None:
                raise
            raise self._file.error from error  # torch tells of positions in the file
        self._where[where] = _StorageInfo(self._name, start, self._file.tell() - start)
        if self._file.tell() >= _FILE_BYTES:
            self._end_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def finish(self) -> tuple[list[FileEntry], dict[str, tuple[str, tuple[int, ...]]]]:
        """Write `.metadata`; return all files, and dtype and shape of all tensors."""
        if self._file is not None:
            self._end_file()
        metadata = Metadata(dict(self._tensors), storage_data=self._where)
        entry = write_file(self._folder / METADATA, pickle.dumps(metadata), rank=0)
        tensors = {
            name: (str(t.properties.dtype).removeprefix("torch."), tuple(t.size))
            for name, t in self._tensors.items()
        }
        return [*self._entries, entry], tensors

    def _end_file(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._entries.append(self._file.entry(rank=0))
        self._file = None


def has_optimizer(names: Iterable[str]) -> bool:
    """Tell whether a checkpoint of these tensors has the optimizer's state, not weights alone."""
    return any(kind_of(name).startswith("optimizer") for name in names)


def _slices(bounds: list[tuple[int, int]], offsets: Sequence[int]) -> tuple[slice, ...]:
    """Return bounds within a tensor as slices of what begins at `offsets` in it."""
    return tuple(slice(a - o, b - o) for (a, b), o in zip(bounds, offsets, strict=True))


def _is_part(data: Tensor) -> bool:
    return data.untyped_storage().nbytes() != data.numel() * data.element_size()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if (module, name) == ("builtins", "getattr"):  # how an enum's member is pickled
            return self._member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self._refuse(f"{module}.{name}")

    def _member(self, enum: Any, name: Any) -> Any:
        if enum is _MEM_FORMAT_ENCODING and name in _MEM_FORMAT_ENCODING.__members__:
            return _MEM_FORMAT_ENCODING[name]
        return self._refuse(f"the attribute {name} of {enum}")

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: holds {what}, which no checkpoint needs")
