"""What `megamoe data inspect` prints."""

from pathlib import Path

from data_prep.manifest import Manifest, Shard, SourceShards, read_manifest
from data_prep.shards import read_document
from data_prep.tokenize import TOKENIZER_FOLDER
from data_prep.tokenizer import load_tokenizer
from megamoe.errors import DataError

_HEADINGS = ("source", "part", "documents", "tokens", "bytes/token", "bytes on disk")


def describe_folder(folder: Path, source: str | None) -> str:
    """A table of the sources of a data folder, or of one of them."""
    manifest = read_manifest(folder)
    names = sorted(manifest.sources) if source is None else [source]
    rows = [_HEADINGS]
    for name in names:
        for part, shard in _source(folder, manifest, name).named():
            rows.append((name, part, *_figures(folder, shard)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = [_line(row, widths) for row in rows]
    entry = manifest.tokenizer
    lines.append(f"tokenizer: {entry.algorithm}, {entry.vocab_size:,} ids, {entry.sha256[:16]}")
    return "\n".join(lines)


def show_document(folder: Path, source: str, part: str, number: int) -> str:
    """The text of one document of a source, special tokens spelt out."""
    manifest = read_manifest(folder)
    shards = dict(_source(folder, manifest, source).named())
    if part not in shards:
        raise DataError(f"{folder}: source {source} has no {part}; it has {', '.join(shards)}")
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    return tokenizer.decode(read_document(folder / shards[part].prefix, number))


def _source(folder: Path, manifest: Manifest, name: str) -> SourceShards:
    if name not in manifest.sources:
        raise DataError(f"{folder}: no source {name}; it has {', '.join(sorted(manifest.sources))}")
    return manifest.sources[name]


def _figures(folder: Path, shard: Shard) -> tuple[str, str, str, str]:
    size = 0
    for ending in (".bin", ".idx"):
        file = folder / (shard.prefix + ending)
        if not file.is_file():
            raise DataError(f"{file}: the manifest names it but it is missing; tokenize again")
        size += file.stat().st_size
    rate = f"{shard.bytes_text / shard.tokens:.2f}"
    return f"{shard.documents:,}", f"{shard.tokens:,}", rate, f"{size:,}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(cells)
