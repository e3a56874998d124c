"""What the system refuses while a folder is written: a full disk, a place that is not ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.errors import CheckpointError


@contextmanager
def one_line(out: Path) -> Iterator[None]:
    """Turn what the system refuses into a mistake of one line, with path and reason.

    Args:
        out: the folder to write, named where the system names no path.

    Raises:
        CheckpointError: a file cannot be written or read.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read our lines has gone
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or out}: {error.strerror or error}; nothing was kept; mend that, or give "
            "another place"
        ) from error
