"""Ask child processes about packages: each has a time limit and may end as it likes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "child.py"
_POLL_S = 0.02
_PIPE_BYTES = 65_536  # what a pipe holds; an answer is far shorter

Facts = dict[str, Any]  # with 'absent': True, or 'broken': one line, where that is so


def probe_all(
    jobs: Mapping[str, Sequence[str]], *, limit_s: float, at_once: int
) -> dict[str, Facts]:
    """Return what each child found out.

    Args:
        jobs: the arguments of megamoe/doctor/child.py, by any name.
        limit_s: seconds a child may take.
        at_once: children that run at a time.
    """
    waiting = list(jobs)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    found: dict[str, Facts] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[name] = (_start(jobs[name]), time.monotonic() + limit_s)
            time.sleep(_POLL_S)
            for name, (process, deadline) in list(running.items()):
                if process.poll() is not None:
                    found[name] = _answer(process)
                elif time.monotonic() > deadline:
                    found[name] = {"broken": f"did not end within {limit_s:g} s"}
                else:
                    continue
                _end(running.pop(name)[0])
    finally:
        for process, _ in running.values():
            _end(process)
    return {name: found[name] for name in jobs}


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: no folder is put before the installed packages, neither this one nor the reader's
        [sys.executable, "-P", str(CHILD), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # ended with all that a package started
    )


def _answer(process: subprocess.Popen[bytes]) -> Facts:
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)  # what a package left running may hold the other end
    try:
        text = os.read(pipe, _PIPE_BYTES)  # the whole answer: its writer has ended
    except BlockingIOError:
        text = b""
    if process.returncode < 0:
        return {"broken": f"ended by {signal.Signals(-process.returncode).name}"}
    try:
        facts = json.loads(text)
    except ValueError:
        return {"broken": f"ended the process with exit code {process.returncode}"}
    assert isinstance(facts, dict), facts
    return facts


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # nothing is left of its group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
