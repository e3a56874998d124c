"""Files of JSON, a line a record, that grow by whole lines: also where a disk is full for a while."""

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

MOST_WAITING = 64 << 20  # bytes of lines in memory: some 50,000 steps
_BLOCK = 65_536  # bytes


class LinesFile:
    """Appends records to a file; those that cannot be written wait in memory for the next one.

    A full disk is told once and ends nothing. No line is written in part: a write that failed is
    undone.

    Args:
        path: the file; made where it is not there, and cut after its last whole line.
        say: is told what a person should know, a line at a time.
        durable: whether a line is on disk, not on its way there, when the call returns.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, durable: bool = False) -> None:
        """Open the file."""
        self._path, self._say, self._durable = path, say, durable
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._num_lost = 0
        self._has_told = False
        self._file = path.open("a+b", buffering=0)
        self._size = _cut(self._file.fileno())  # of the whole lines
        self._is_torn = False

    def append(self, record: Mapping[str, object]) -> None:
        """Write what waits and this record, as far as there is room."""
        line = _encode(record)
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        error = self._write()
        if self._waiting_bytes > MOST_WAITING:
            self._waiting_bytes -= len(self._waiting.pop())
            self._num_lost += 1
        if error is not None and not self._has_told:
            self._has_told = True
            self._tell(error, "its lines wait in memory until they can be written")

    def close(self) -> None:
        """Make all of it durable; tell what could not be written."""
        error = self._write()
        lost = self._num_lost + len(self._waiting)
        what = f"{lost:,} lines are lost" if lost else "its last lines may be lost"
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as problem:
            error = error or problem
        if error is not None or lost:
            self._tell(error, what)

    def _write(self) -> OSError | None:
        """Write what waits; return why not all of it could be."""
        descriptor = self._file.fileno()
        try:
            self._mend(descriptor)
            while self._waiting:
                self._is_torn = True
                _write(descriptor, self._waiting[0], durable=self._durable)
                line = self._waiting.popleft()
                self._size += len(line)
                self._waiting_bytes -= len(line)
                self._is_torn = False
        except OSError as error:
            with suppress(OSError):  # it is done before the next write at the latest
                self._mend(descriptor)
            return error
        return None

    def _mend(self, descriptor: int) -> None:
        if self._is_torn:
            os.ftruncate(descriptor, self._size)
            self._is_torn = False

    def _tell(self, error: OSError | None, what: str) -> None:
        why = f"{error.strerror or error}; " if error else ""
        with suppress(OSError):  # whoever listens may write to the same disk
            self._say(f"{self._path}: {why}{what}")


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Append a record to a file; it is on disk on return.

    Raises:
        OSError: it cannot be written. What was written of it is cut off by whoever appends next.
    """
    with path.open("a+b", buffering=0) as file:
        _cut(file.fileno())
        _write(file.fileno(), _encode(record), durable=True)


def _encode(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _write(descriptor: int, line: bytes, *, durable: bool) -> None:
    left = memoryview(line)
    while left:
        left = left[os.write(descriptor, left) :]  # less than all of it, just before a disk is full
    if durable:
        os.fsync(descriptor)


def _cut(descriptor: int) -> int:
    """Cut a file after its last whole line, where a process was killed in the next; return its size."""
    size = end = os.fstat(descriptor).st_size
    whole = 0
    while end and not whole:
        start = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n") + 1
        whole, end = (start + found if found else 0), start
    if whole != size:
        os.ftruncate(descriptor, whole)
    return whole
