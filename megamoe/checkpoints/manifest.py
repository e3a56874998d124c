"""manifest.json: size and SHA-256 of every file of a checkpoint, and the rank that wrote it.

Neither torch nor Megatron-core notices a flipped bit in a shard: it loads, and training goes on with
another number. So each rank hashes what it writes while it writes, and nothing of a checkpoint is
unpickled, or trusted, before its hash is that of the manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from megamoe.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint as its writer meant it to be."""

    name: str
    num_bytes: int
    sha256: str  # 64 hexadecimal digits, of the whole file
    rank: int  # that wrote it


class HashingFile:
    """A file being written from beginning to end, hashed on the way.

    Args:
        path: the file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        """Create the file."""
        self._path = path
        self._file: BinaryIO = path.open("xb")
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self.error: OSError | None = None  # why a write failed, for callers that hide it

    def write(self, data: Any) -> int:  # noqa: ANN401  (any buffer)
        """Write and hash all of a buffer."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(view)
        self._num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._num_bytes

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def fileno(self) -> int:
        """Return the descriptor, for fsync; what is buffered is handed to the system first."""
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Close the file; more than once does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def entry(self, rank: int) -> FileEntry:
        """Return what was written."""
        return FileEntry(
            name=self._path.name,
            num_bytes=self._num_bytes,
            sha256=self._hash.hexdigest(),
            rank=rank,
        )


def write_file(path: Path, content: bytes, rank: int) -> FileEntry:
    """Write a small file of a checkpoint, make it durable and return its entry."""
    with HashingFile(path) as file:
        file.write(content)
        os.fsync(file.fileno())
    return file.entry(rank)


def write_manifest(checkpoint: Path, entries: Iterable[FileEntry]) -> None:
    """Write the manifest of a checkpoint whose other files are all written."""
    files = sorted((asdict(entry) for entry in entries), key=lambda file: str(file["name"]))
    write_file(checkpoint / MANIFEST, _rendered({"format": _FORMAT, "files": files}), rank=0)


def read_manifest(checkpoint: Path) -> tuple[FileEntry, ...]:
    """Return the files that a checkpoint is made of.

    Raises:
        CheckpointError: the manifest cannot be read, or is not the text that was written.
    """
    path = checkpoint / MANIFEST
    with reading(path, rank=0):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        content.pop("sha256")
        if _rendered(content) != text:
            raise ValueError("its hash is of another text")  # noqa: TRY301
        return tuple(FileEntry(**file) for file in content["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged (written by rank 0)") from error


def check_file(checkpoint: Path, entry: FileEntry) -> None:
    """Raise CheckpointError unless a file of a checkpoint is what its rank wrote."""
    path = checkpoint / entry.name
    writer = f"(written by rank {entry.rank})"
    with reading(path, entry.rank), path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != entry.num_bytes:
            raise CheckpointError(
                f"{path}: has {num_bytes:,} bytes of {entry.num_bytes:,} {writer}"
            )
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise CheckpointError(f"{path}: is damaged, its SHA-256 is another {writer}")


@contextmanager
def reading(path: Path, rank: int) -> Iterator[None]:
    """Read a file of a checkpoint within: whatever the system refuses is damage to it.

    Args:
        path: the file.
        rank: that wrote it.

    Raises:
        CheckpointError: the file is missing, or cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing (written by rank {rank})") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror} (written by rank {rank})"
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rendered(content: dict[str, Any]) -> bytes:
    """Return the one text of a manifest, with the hash of what it says."""
    said = json.dumps(content, sort_keys=True).encode()
    signed = content | {"sha256": hashlib.sha256(said).hexdigest()}
    return (json.dumps(signed, indent=1, sort_keys=True) + "\n").encode()
