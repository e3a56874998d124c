"""Reads the documents of a user's files: JSON lines, plain text or Parquet, plain or compressed.

A document is one JSON line, one Parquet row, or one whole text file.
"""

import difflib
import io
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megamoe.errors import DataError

JSON_LINES = (".jsonl", ".json")
TEXT = (".txt",)
PARQUET = (".parquet",)
COMPRESSIONS = (".gz", ".zst", ".xz")
ACCEPTED = f"{', '.join(JSON_LINES + TEXT)} (also with {', '.join(COMPRESSIONS)}) or .parquet"

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text to learn from, and where it stands (`file:line`) for error messages."""

    text: str
    where: str


def expand_inputs(inputs: Iterable[str]) -> tuple[Path, ...]:
    """The files that paths, folders (read recursively) and glob patterns stand for, each once.

    Raises:
        DataError: An input matches nothing or is of a kind that is not read.
    """
    files: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file)]
            if not found:
                raise DataError(f"{name}: the folder holds no {ACCEPTED} file")
        elif path.exists():
            found = [path]
        else:
            found = _matches(name)
            if not found:
                raise DataError(f"{name}: no such file, folder or pattern{_nearest_file(path)}")
        for file in found:
            if file.is_file() and not _kind(file):
                raise DataError(f"{file}: not a kind of file that is read; use {ACCEPTED}")
            if file.is_file():
                files[file] = None
    return tuple(files)


def read_documents(
    file: Path, text_key: str, on_bad: Callable[[DataError], None]
) -> Iterator[Document]:
    """The documents of one file in its order, empty ones included.

    Args:
        file: One of `expand_inputs`.
        text_key: Field of a JSON line, or Parquet column, that holds the text.
        on_bad: Called with the error for a line that is not a document; reading goes on if it
            returns.

    Raises:
        DataError: The file cannot be read or is cut short, or what `on_bad` raises.
    """
    kind = _kind(file)
    try:
        if kind in PARQUET:
            yield from _parquet_rows(file, text_key, on_bad)
        elif kind in JSON_LINES:
            yield from _json_lines(file, text_key, on_bad)
        else:
            yield from _whole_text(file, on_bad)
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: cannot be read: {reason}") from error


def raise_error(error: DataError) -> None:
    """An `on_bad` that stops at the first bad line."""
    raise error


def _matches(pattern: str) -> list[Path]:
    """Files of a glob pattern in the order of their names."""
    anchor = Path(pattern).anchor
    return sorted(Path(anchor).glob(pattern.removeprefix(anchor))) if pattern else []


def _kind(file: Path) -> str:
    """The ending that says how to read a file, without its compression; '' for others."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2] if compressed and len(suffixes) > 1 else "".join(suffixes[-1:])
    accepted = JSON_LINES + TEXT + (() if compressed else PARQUET)
    return kind if kind in accepted else ""


def _open(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed; unlike `zstandard`, Arrow notices a file cut short."""
    suffix = file.suffix.lower()
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if suffix in COMPRESSIONS:
        import pyarrow

        codec = {".gz": "gzip", ".zst": "zstd"}[suffix]
        stream = pyarrow.input_stream(str(file), compression=codec)
        return cast(BinaryIO, io.BufferedReader(stream, _READ_BYTES))
    return file.open("rb", buffering=_READ_BYTES)


def _json_lines(
    file: Path, text_key: str, on_bad: Callable[[DataError], None]
) -> Iterator[Document]:
    import orjson

    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                on_bad(DataError(f"{where}: not a JSON object: {error.msg}; fix it or --skip-bad"))
                continue
            text = record.get(text_key) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield Document(text, where)
            else:
                on_bad(_no_text(where, record, text_key))


def _no_text(where: str, record: Any, text_key: str) -> DataError:  # noqa: ANN401 (any JSON)
    if not isinstance(record, dict):
        return DataError(f"{where}: a {type(record).__name__}, not a JSON object with {text_key!r}")
    if text_key in record:
        kind = type(record[text_key]).__name__
        return DataError(f"{where}: {text_key!r} holds a {kind}, not text; fix it or --skip-bad")
    return DataError(f"{where}: no field {text_key!r}; {_nearest_key(text_key, list(record))}")


def _parquet_rows(
    file: Path, text_key: str, on_bad: Callable[[DataError], None]
) -> Iterator[Document]:
    import pyarrow.lib
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.lib.ArrowException as error:
        raise DataError(f"{file}: not a Parquet file: {error}") from error
    with table:
        names = table.schema_arrow.names
        if text_key not in names:
            raise DataError(f"{file}: no column {text_key!r}; {_nearest_key(text_key, names)}")
        row = 0
        for batch in table.iter_batches(batch_size=1_024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                if isinstance(text, str):
                    yield Document(text, f"{file}:{row}")
                else:
                    kind = type(text).__name__
                    on_bad(DataError(f"{file}:{row}: {text_key!r} holds a {kind}, not text"))


def _whole_text(file: Path, on_bad: Callable[[DataError], None]) -> Iterator[Document]:
    with _open(file) as stream:
        raw = stream.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        on_bad(DataError(f"{file}: not UTF-8 at byte {error.start}; convert it or --skip-bad"))
        return
    yield Document(text, str(file))


def _nearest_key(text_key: str, keys: list[str]) -> str:
    """What would do in place of an unknown field name."""
    near = difflib.get_close_matches(text_key, keys, n=3, cutoff=0.5) or sorted(keys)[:8]
    names = ", ".join(near) or "nothing"
    return f"--text-key takes one of the fields there: {names}"


def _nearest_file(path: Path) -> str:
    """A hint at a file of a similar name, or nothing."""
    if not path.parent.is_dir():
        return ""
    names = [sibling.name for sibling in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; is it {path.parent / near[0]}?" if near else ""
