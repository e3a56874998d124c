"""The commit that the running code is of."""

import subprocess
from pathlib import Path

_LIMIT_S = 30.0  # a folder on a slow network disk


def running_commit() -> str | None:
    """Return the commit the code runs from, '+changes' when files differ; None outside git."""
    folder = Path(__file__).parent
    try:
        # An installed megamoe may lie inside a repository of someone else's.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        head = _git(folder, "rev-parse", "HEAD")
        state = _git(folder, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if state else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_LIMIT_S,
    )
    return done.stdout.strip()
