"""Shows how far a long reading has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Is told what was done."""

    def file_done(self) -> None:
        """Another input file was read."""
        ...

    def advance(self, documents: int, bytes_text: int) -> None:
        """So many more documents and bytes were dealt with."""
        ...


@contextmanager
def show_progress(label: str, num_files: int) -> Iterator[Progress]:
    """A progress display on standard error while the block runs."""
    if not sys.stderr.isatty():
        yield _Lines(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files  {task.fields[documents]:,} documents  {task.fields[megabytes]:,.1f} MB"),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        yield _Bar(display, label, num_files)


class _Lines:
    def __init__(self, label: str) -> None:
        self._label = label
        self._documents = 0
        self._bytes_text = 0
        self._next_s = time.monotonic() + _SECONDS_BETWEEN_LINES

    def file_done(self) -> None:
        """Says nothing: small files would make many lines."""

    def advance(self, documents: int, bytes_text: int) -> None:
        self._documents += documents
        self._bytes_text += bytes_text
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _SECONDS_BETWEEN_LINES
            megabytes = self._bytes_text / 1e6
            sys.stderr.write(f"{self._label}: {self._documents:,} documents, {megabytes:,.1f} MB\n")
            sys.stderr.flush()


class _Bar:
    def __init__(self, display: "RichProgress", label: str, num_files: int) -> None:
        self._display = display
        self._task = display.add_task(label, total=num_files, documents=0, megabytes=0.0)
        self._documents = 0
        self._bytes_text = 0

    def file_done(self) -> None:
        self._display.advance(self._task)

    def advance(self, documents: int, bytes_text: int) -> None:
        self._documents += documents
        self._bytes_text += bytes_text
        self._display.update(
            self._task, documents=self._documents, megabytes=self._bytes_text / 1e6
        )
