"""What the system refuses while a folder is written: a full disk, a place that is not ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.errors import MegamoeError

_REMEDY = "nothing was kept; mend that, or give another place"


@contextmanager
def one_line(out: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn what the system refuses into a mistake of one line, with path and reason.

    Args:
        out: the folder to write, named where the system names no path.
        remedy: what was kept and what would do.

    Raises:
        MegamoeError: a file cannot be written or read.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read our lines has gone
        raise
    except OSError as error:
        place = error.filename or out
        raise MegamoeError(f"{place}: {error.strerror or error}; {remedy}") from error
