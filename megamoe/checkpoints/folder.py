"""The folder of a run's checkpoints: one folder a checkpoint, and `latest`, which names one of them.

A checkpoint is a folder `<tokens seen>` with a manifest (megamoe/checkpoints/manifest.py). It is
written under a hidden name and renamed when every byte is on disk; only then does `latest` name it,
and only then are older ones removed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megamoe.checkpoints.manifest import (
    MANIFEST,
    FileEntry,
    check_file,
    file_sha256,
    read_manifest,
    reading,
    write_file,
)
from megamoe.errors import CheckpointError
from megamoe.plan.json import write_text_atomically

LATEST = "latest"
PROGRESS = "progress.json"
NONE_YET = "none"  # in `latest`, from the first save's beginning to its end
# As a save writes it, or a name as `echo` does. Neither cut short, nor with one bit flipped, is the other.
_POINTER = re.compile(rb"([0-9]+)(?: ([0-9a-f]{64}))?\n")
_MAX_THREADS = 8
_ABANDONED = ".abandoned"
_LEFTOVERS = (".[0-9]*.partial", ".[0-9]*.removed*", f".{LATEST}*")  # of ours; others' are not


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stood when a checkpoint was made."""

    plan_digest: str
    segment: int
    step: int  # optimizer steps of the run
    tokens_seen: int  # input tokens of the run
    segment_done: bool
    ledger: tuple[tuple[str, str, int], ...]  # (stage, source, tokens drawn from it), in order


def name_of(tokens_seen: int) -> str:
    """Return the name of the checkpoint made after so many tokens."""
    return f"{tokens_seen:015d}"


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, sound or not."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that `latest` names, or None where none was made yet.

    Raises:
        CheckpointError: `latest` is missing or damaged, or names a checkpoint that is missing.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        if there := all_checkpoints(folder):
            raise CheckpointError(
                f"{pointer}: is missing, but {there[-1].name} is there{remedy(folder)}"
            )
        return None
    with _with_remedy(folder), reading(pointer, rank=0):
        line = pointer.read_bytes()
    if line == f"{NONE_YET}\n".encode():
        return None
    if (found := _POINTER.fullmatch(line)) is None:
        raise CheckpointError(f"{pointer}: is damaged (written by rank 0){remedy(folder)}")
    checkpoint = folder / found[1].decode()
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{pointer}: names {checkpoint.name}, which is missing{remedy(folder)}"
        )
    if found[2] is not None and found[2].decode() != _manifest_sha256(checkpoint):
        raise CheckpointError(
            f"{pointer}: {checkpoint.name}/{MANIFEST} is not the one it names (both written by "
            f"rank 0){remedy(folder)}"
        )
    return checkpoint


def name_latest(checkpoint: Path) -> None:
    """Have `latest` name a checkpoint, with the hash of its manifest."""
    line = f"{checkpoint.name} {_manifest_sha256(checkpoint)}\n"
    write_text_atomically(checkpoint.parent / LATEST, line)


def read_progress(checkpoint: Path) -> Progress:
    """Return where the run stood at a checkpoint.

    Raises:
        CheckpointError: the manifest or progress.json is missing or damaged.
    """
    fields = json.loads(read_file(checkpoint, PROGRESS))
    ledger = tuple((stage, source, tokens) for stage, source, tokens in fields.pop("ledger"))
    return Progress(**fields, ledger=ledger)


def read_file(checkpoint: Path, name: str) -> bytes:
    """Return what is in a small file of a checkpoint, once it is known to be what was written.

    Raises:
        CheckpointError: the manifest or the file is missing or damaged.
    """
    with _with_remedy(checkpoint.parent):
        entry = _entry(read_manifest(checkpoint), name, checkpoint)
        check_file(checkpoint, entry)
        with reading(checkpoint / name, entry.rank):
            return (checkpoint / name).read_bytes()


def write_progress(checkpoint: Path, progress: Progress) -> FileEntry:
    """Write progress.json into a checkpoint that is being made."""
    text = json.dumps(asdict(progress), indent=1, ensure_ascii=False) + "\n"
    return write_file(checkpoint / PROGRESS, text.encode(), rank=0)


def verify(checkpoint: Path) -> tuple[FileEntry, ...]:
    """Read every file of a checkpoint and compare it with the manifest; return the entries.

    Raises:
        CheckpointError: names the first file that is missing or damaged and the rank that wrote it.
    """
    entries = read_manifest(checkpoint)
    threads = min(_MAX_THREADS, os.cpu_count() or 1)  # hashing leaves the interpreter free
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda entry: check_file(checkpoint, entry), entries):
            pass
    return entries


def begin(folder: Path, name: str) -> Path | None:
    """Make the hidden folder that a checkpoint is written in; None where it exists already."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    if not (folder / LATEST).exists() and not all_checkpoints(folder):
        write_text_atomically(folder / LATEST, f"{NONE_YET}\n")
    with suppress(CheckpointError):  # what `latest` names is damaged or gone, so it is not this one
        if latest(folder) == folder / name:
            return None
    partial = folder / f".{name}.partial"
    if partial.exists():  # a killed save left it, and it cannot be deleted
        partial.rename(_free_name(f"{folder}/.{name}.removed"))
    partial.mkdir()
    return partial


def publish(partial: Path, final: Path, keep: int) -> None:
    """Give a checkpoint that is written, manifest included, its name; have `latest` name it.

    Checkpoints that are newer belong to a line that was left: they are renamed to
    `<tokens>.abandoned`.

    Args:
        partial: the hidden folder.
        final: its name from now on.
        keep: number of checkpoints to keep, this one and those before it.
    """
    for path in partial.iterdir():
        _flush(path)  # of files other ranks wrote too: a shared file system may keep them back
    _flush(partial)
    if final.exists():  # `latest` does not name it: a save that died before it did, or a way back
        _remove(final)
    partial.rename(final)
    _flush(final.parent)
    there = all_checkpoints(final.parent)
    name_latest(final)
    _settle_others(there, final, keep)


def fall_back(folder: Path) -> tuple[Path | None, list[str]]:
    """Have `latest` name the newest sound checkpoint, not newer than the one it names now.

    Damaged ones on the way are renamed to `<tokens>.damaged`.

    Returns:
        The sound checkpoint (None where none was made yet), and what is wrong with the others.

    Raises:
        CheckpointError: no checkpoint is sound; nothing was changed.
    """
    problems: list[str] = []
    candidates = all_checkpoints(folder)
    try:
        newest = latest(folder)
    except CheckpointError as error:
        problems.append(str(error).partition("; ")[0])
    else:
        if newest is None:
            return None, problems
        candidates = [path for path in candidates if path.name <= newest.name]
    damaged = []
    for checkpoint in reversed(candidates):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
            damaged.append(checkpoint)
            continue
        name_latest(checkpoint)
        for bad in damaged:
            bad.rename(_free_name(f"{bad}.damaged"))
        return checkpoint, problems
    left = [path.name for path in all_checkpoints(folder) if path not in candidates]
    left += sorted(path.name for path in folder.glob(f"[0-9]*{_ABANDONED}*"))
    raise CheckpointError(
        f"{folder}: no checkpoint is sound ({'; '.join(problems)}); start another run folder"
        + (f", or go on from one that was left: {', '.join(left)}" if left else "")
    )


def _entry(entries: tuple[FileEntry, ...], name: str, checkpoint: Path) -> FileEntry:
    for entry in entries:
        if entry.name == name:
            return entry
    raise CheckpointError(f"{checkpoint / MANIFEST}: does not list {name}")


def _manifest_sha256(checkpoint: Path) -> str:
    manifest = checkpoint / MANIFEST
    with _with_remedy(checkpoint.parent), reading(manifest, rank=0):
        return file_sha256(manifest)


@contextmanager
def _with_remedy(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{remedy(folder)}") from error


def remedy(folder: Path) -> str:
    """Return what to do about a damaged checkpoint, as the end of a message."""
    return f"; `megamoe run {folder.parent} --fallback` goes on from the newest sound checkpoint"


def _free_name(wanted: str) -> Path:
    number, free = 1, Path(wanted)
    while free.exists():
        number += 1
        free = Path(f"{wanted}.{number}")
    return free


def _settle_others(there: list[Path], newest: Path, keep: int) -> None:
    """Set aside what is newer than a checkpoint, and remove what is too old beside it.

    The checkpoint is published: what the system refuses here waits for the next save.
    """
    for path in (path for path in there if path.name > newest.name):
        with suppress(OSError):
            path.rename(_free_name(f"{path}{_ABANDONED}"))
    for path in [path for path in there if path.name <= newest.name][:-keep]:
        with suppress(OSError):
            _remove(path)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left: all of it has hidden names."""
    for pattern in _LEFTOVERS:
        for leftover in folder.glob(pattern):
            _delete(leftover)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed on the way, it leaves a hidden folder, not half a checkpoint."""
    hidden = _free_name(f"{checkpoint.parent}/.{checkpoint.name}.removed")
    checkpoint.rename(hidden)
    _delete(hidden)


def _delete(hidden: Path) -> None:
    """Delete what has a hidden name, or as much as the system lets us; each save tries again.

    NFS keeps a file that is open somewhere under another name, and so its folder.
    """
    if hidden.is_dir():
        shutil.rmtree(hidden, ignore_errors=True)
    else:  # a pointer that was never put in place
        with suppress(OSError):
            hidden.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
