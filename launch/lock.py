"""One run folder, one run: an flock that lives as long as any process of the run.

The supervisor takes the lock; its ranks inherit the descriptor. The kernel releases it when the last
of them ends, however it ends, so there is no stale lock to clean up.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megamoe.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock; written in the file for the message of whoever is refused."""

    pid: int
    host: str
    since: str
    ranks: tuple[int, ...]  # process ids


@contextmanager
def hold_lock(run_dir: Path) -> Iterator[int]:
    """Hold the lock of a run folder; gives the descriptor that ranks must inherit.

    Raises:
        LaunchError: another process, or ranks that outlived theirs, hold it.
    """
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(f"{run_dir}: {_refusal(descriptor)}") from error
        write_holder(descriptor, ())
        yield descriptor
    finally:
        # closed, never unlocked: LOCK_UN would take the lock from ranks that still live
        os.close(descriptor)


def write_holder(descriptor: int, ranks: Sequence[int]) -> None:
    """Write into the lock file that this process holds it, with these ranks."""
    holder = Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        ranks=tuple(ranks),
    )
    # first over what is there: most file systems need no room for that
    os.ftruncate(descriptor, os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0))
    os.fsync(descriptor)


def _refusal(descriptor: int) -> str:
    try:
        holder = Holder(**json.loads(os.pread(descriptor, 65_536, 0)))
    except (ValueError, TypeError):
        return "held by another process; wait for it to end, or give another --run-dir"
    alive = [pid for pid in holder.ranks if _is_alive(pid, holder.host)]
    if not _is_alive(holder.pid, holder.host) and alive:
        pids = " ".join(str(pid) for pid in alive)
        return (
            f"process {holder.pid} has ended, but its ranks still run (process ids {pids}); "
            f"wait for them to end, or `kill {pids}`"
        )
    return (
        f"held by process {holder.pid} on {holder.host} since {holder.since}; wait for it to end, "
        f"`kill {holder.pid}` there, or give another --run-dir"
    )


def _is_alive(pid: int, host: str) -> bool:
    """Tell whether a process lives; on another host it is taken to."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
