"""`manifest.json`: what a folder of tokenised data holds, the only thing the planner reads of it."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer all sources of the folder were encoded with; its files are in `tokenizer/`."""

    algorithm: str
    vocab_size: int
    eod_id: int
    pad_id: int
    sha256: str
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One `PREFIX.bin` and `PREFIX.idx`.

    Args:
        prefix: Path relative to the folder, without the ending.
        documents: Number of documents.
        tokens: Number of tokens, special ones included.
        bytes_text: UTF-8 bytes of the documents the tokens stand for.
        sha256_bin: Digest of the .bin file.
        sha256_idx: Digest of the .idx file.
    """

    prefix: str
    documents: int
    tokens: int
    bytes_text: int
    sha256_bin: str
    sha256_idx: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShards:
    """The shards of one source; a shard that was not asked for is None."""

    train: Shard
    heldout: Shard | None
    fim: Shard | None

    def named(self) -> tuple[tuple[str, Shard], ...]:
        """The shards there are, with their names."""
        pairs = (("train", self.train), ("heldout", self.heldout), ("fim", self.fim))
        return tuple((name, shard) for name, shard in pairs if shard is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A data folder: one tokenizer, and sources by name."""

    tokenizer: TokenizerEntry
    sources: dict[str, SourceShards]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a data folder.

    Args:
        path: The folder, or its `manifest.json`.

    Raises:
        DataError: There is none, or it is not of this format.
    """
    file = path / MANIFEST_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{path}: not a data folder (no {MANIFEST_NAME}); make one with 'megamoe data tokenize'"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise DataError(f"{file}: format {fields['format']} is not known; tokenize anew")
        return Manifest(
            tokenizer=TokenizerEntry(**fields["tokenizer"]),
            sources={name: _source(entry) for name, entry in fields["sources"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a manifest of tokenised data: {error!r}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest in place of the former one, whole or not at all."""
    sources = {name: asdict(manifest.sources[name]) for name in sorted(manifest.sources)}
    fields = {"format": FORMAT, "tokenizer": asdict(manifest.tokenizer), "sources": sources}
    write_atomically(folder / MANIFEST_NAME, (json.dumps(fields, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the former content or all of the new."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Forces a folder's names to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from changing the folder's manifest meanwhile; waits for its turn."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _source(entry: dict[str, Any]) -> SourceShards:
    shards = {name: Shard(**fields) if fields else None for name, fields in entry.items()}
    train = shards.pop("train")
    if train is None:
        raise KeyError("train")
    return SourceShards(train=train, **shards)
