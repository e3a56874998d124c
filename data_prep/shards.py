"""Megatron's indexed dataset: `PREFIX.bin` holds tokens, `PREFIX.idx` says where documents begin.

One document is one sequence. Layout of the index, little-endian: 9 bytes of magic, version
(uint64), code of the token type (uint8), number of sequences (uint64), number of document bounds
(uint64); then lengths in tokens (int32), byte offsets into the .bin (int64), document bounds
(int64).

Shape legend: T tokens of one document, N documents.
"""

import hashlib
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megamoe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {"uint16": 8, "int32": 4}
# Megatron's own bound for two-byte tokens.
_UINT16_VOCAB = 65_500


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """A finished shard: counts and the digests of its two files."""

    documents: int
    tokens: int
    sha256_bin: str
    sha256_idx: str


def token_dtype(vocab_size: int) -> str:
    """The type Megatron stores tokens of such a vocabulary in: uint16 or int32."""
    return "uint16" if vocab_size < _UINT16_VOCAB else "int32"


class ShardWriter:
    """Writes documents to `PREFIX.bin`, and `PREFIX.idx` with `finish`; both are on disk after it.

    Args:
        prefix: Path without the ending.
        vocab_size: Settles the token type.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._dtype = token_dtype(vocab_size)
        self._bin_path = prefix.with_name(prefix.name + ".bin")
        self._idx_path = prefix.with_name(prefix.name + ".idx")
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._bin = self._bin_path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bin.close()

    def add(self, tokens_T: "NDArray[np.integer]") -> None:
        """Appends one document."""
        raw = tokens_T.astype(f"<{_short(self._dtype)}", copy=False).tobytes()
        self._bin.write(raw)
        self._digest.update(raw)
        self._lengths.append(len(tokens_T))

    def finish(self) -> ShardFiles:
        """Writes the index, forces both files to disk and returns what they hold."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        index = index_bytes(self._lengths, self._dtype)
        with self._idx_path.open("wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        return ShardFiles(
            documents=len(self._lengths),
            tokens=sum(self._lengths),
            sha256_bin=self._digest.hexdigest(),
            sha256_idx=hashlib.sha256(index).hexdigest(),
        )


def index_bytes(lengths: "array[int]", dtype: str) -> bytes:
    """The .idx file of documents of these lengths (tokens)."""
    import numpy as np

    lengths_N = np.asarray(lengths, dtype="<i4")
    ends_N = np.cumsum(lengths_N, dtype="<i8") * np.dtype(dtype).itemsize
    offsets_N = np.concatenate([np.zeros(1, "<i8"), ends_N])[: len(lengths_N)]
    bounds = np.arange(len(lengths_N) + 1, dtype="<i8")
    header = _HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], len(lengths_N), len(bounds))
    return header + lengths_N.tobytes() + offsets_N.tobytes() + bounds.tobytes()


def read_document(prefix: Path, number: int) -> list[int]:
    """The tokens of document `number` (from 0) of a shard.

    Raises:
        DataError: The shard is missing or broken, or has no such document.
    """
    import numpy as np

    idx_path = prefix.with_name(prefix.name + ".idx")
    bin_path = prefix.with_name(prefix.name + ".bin")
    try:
        with idx_path.open("rb") as index:
            header = index.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise DataError(f"{idx_path}: not the index of a shard; tokenize again")
            _, _, code, documents, _ = _HEADER.unpack(header)
            if not 0 <= number < documents:
                raise DataError(
                    f"{prefix}: no document {number}; there are {documents}, counted from 0"
                )
            index.seek(_HEADER.size + 4 * number)
            (length,) = struct.unpack("<i", index.read(4))
            index.seek(_HEADER.size + 4 * documents + 8 * number)
            (offset,) = struct.unpack("<q", index.read(8))
        dtype = {code: name for name, code in _CODES.items()}[code]
        with bin_path.open("rb") as tokens:
            tokens.seek(offset)
            raw = tokens.read(length * np.dtype(dtype).itemsize)
    except (OSError, KeyError, struct.error) as error:
        raise DataError(f"{prefix}: the shard cannot be read: {error}; tokenize again") from error
    ids: list[int] = np.frombuffer(raw, dtype=f"<{_short(dtype)}").tolist()
    return ids


def _short(dtype: str) -> str:
    return {"uint16": "u2", "int32": "i4"}[dtype]
