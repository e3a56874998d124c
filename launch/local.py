"""One segment as processes of this machine, one a rank.

The ranks get the variables torchrun would set, so `torchrun -m megamoe train RUN --segment N` is the
same run. Starting them here gives each rank's own exit code and log, passes the run's lock on, and
needs no second import of torch. A rank that fails ends the others; ranks end with their parent.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.lock import write_holder
from megamoe.errors import LaunchError

_POLL_S = 0.05
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch puts it before tracebacks
_ERROR_LINE = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b|^megamoe: error: ")
_TAIL_BYTES = 65_536
_MAX_ERROR = 1_000  # characters: paths are long, and the remedy is at the end
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalJob:
    """One segment of a run on this machine."""

    name: str  # for messages: recipe/stage
    segment: int
    num_ranks: int
    command: tuple[str, ...]  # of every rank
    logs: Path
    stop_s: float = 30.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # bytes in the log before this start

    @property
    def returncode(self) -> int | None:
        return self.process.poll()


def train_command(run_dir: Path, segment: int, extra: Sequence[str]) -> tuple[str, ...]:
    """Return the command of a rank."""
    train = ("-m", "megamoe", "train", str(run_dir), "--segment", str(segment))
    return (sys.executable, *train, *extra)


def run_job(job: LocalJob, lock: int) -> None:
    """Run all ranks of a segment to their end.

    Args:
        job: what to run.
        lock: descriptor of the run's lock, inherited by the ranks.

    Raises:
        LaunchError: a rank failed; names the rank, its end, its log and the error in it.
    """
    ranks: list[_Rank] = []
    port = free_port()
    try:
        for rank in range(job.num_ranks):
            ranks.append(_start(job, rank, port, lock))
        _write_holder(lock, [rank.process.pid for rank in ranks])
        failed = _wait(ranks)
    finally:
        _stop(ranks, job.stop_s)
        _write_holder(lock, ())
    if failed is not None:
        raise LaunchError(_failure(job, failed))


def _write_holder(lock: int, ranks: Sequence[int]) -> None:
    with suppress(OSError):  # for messages alone: a full disk is no reason to end a run
        write_holder(lock, ranks)


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(job: LocalJob, rank: int, port: int, lock: int) -> _Rank:
    log = job.logs / f"segment-{job.segment}-rank-{rank}.log"
    with log.open("ab") as file:
        log_start = file.tell()
        process = subprocess.Popen(
            job.command,
            env=_environment(rank, job.num_ranks, port),
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else file,  # rank 0 speaks for all, to the terminal
            stderr=file,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C reaches the supervisor, which stops the ranks
            preexec_fn=_die_with_parent(),  # noqa: PLW1509  (no threads here)
        )
    return _Rank(rank=rank, process=process, log=log, log_start=log_start)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    inherited = dict(os.environ)  # noqa: TID251  (launch hands the environment on)
    inherited.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    inherited.setdefault("PYTHONUNBUFFERED", "1")
    return inherited | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a child calls before exec so that the kernel kills it when its parent ends."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return before_exec


def _wait(ranks: Sequence[_Rank]) -> _Rank | None:
    """Return the first rank that fails, or None once all have ended well."""
    while True:
        codes = [rank.returncode for rank in ranks]
        failed = [rank for rank, code in zip(ranks, codes, strict=True) if code]
        if failed:
            # one that a signal ended is the cause of what the others then met
            return min(failed, key=lambda rank: rank.process.returncode)
        if None not in codes:
            return None
        time.sleep(_POLL_S)


def _stop(ranks: Sequence[_Rank], stop_s: float) -> None:
    """End what still runs: SIGTERM, then SIGKILL for whole process groups."""
    try:
        for rank in ranks:
            if rank.returncode is None:
                rank.process.terminate()
        deadline = time.monotonic() + stop_s
        while any(rank.returncode is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    finally:
        for rank in ranks:
            if rank.returncode != 0:
                with suppress(ProcessLookupError):  # nothing is left of its group
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()


def _failure(job: LocalJob, rank: _Rank) -> str:
    code = rank.process.returncode
    end = (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )
    # one that a signal ended has written nothing about it
    error = "" if code < 0 else _last_error(rank.log, rank.log_start)
    return (
        f"{job.name}: rank {rank.rank} of segment {job.segment} {end}"
        + (f" ({error})" if error else "")
        + f"; see {rank.log}"
    )


def _last_error(log: Path, start: int) -> str:
    """Return the last line of a log that names an error, else its last line, else ''."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.search(_RANK_PREFIX.sub("", line))]
    last = (errors or lines or [""])[-1]
    return _RANK_PREFIX.sub("", last).removeprefix("megamoe: error: ")[:_MAX_ERROR]
