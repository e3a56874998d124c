"""One run folder, one run, however its processes end."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.lock import hold_lock, write_holder
from megamoe.errors import LaunchError

HOLD = """
import sys, time
from pathlib import Path
from launch.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def is_gone(pid):
    """Whether a process has ended; one that waits to be reaped has."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path, holder):
    with pytest.raises(LaunchError) as caught, hold_lock(tmp_path):
        pass
    message = str(caught.value)
    assert re.search(rf"held by process {holder.pid} on \S+ since 20\d\d-", message)
    assert f"`kill {holder.pid}` there, or give another --run-dir" in message


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with hold_lock(tmp_path):
        pass


def test_the_lock_lives_as_long_as_a_rank_that_inherited_it(tmp_path):
    with hold_lock(tmp_path) as lock:
        rank = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        write_holder(lock, [rank.pid])
    try:
        with pytest.raises(LaunchError, match="held by process"), hold_lock(tmp_path):
            pass
    finally:
        rank.kill()
        rank.wait()
    with hold_lock(tmp_path):
        pass


def test_ranks_that_outlived_their_supervisor_are_named(tmp_path):
    code = (
        "import os, signal, subprocess, sys\n"
        "from pathlib import Path\n"
        "from launch.lock import hold_lock, write_holder\n"
        "with hold_lock(Path(sys.argv[1])) as lock:\n"
        "    quiet = subprocess.DEVNULL\n"
        "    rank = subprocess.Popen(['sleep', '60'], pass_fds=(lock,), stdout=quiet)\n"
        "    write_holder(lock, [rank.pid])\n"
        "    print(rank.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False
    )
    rank = int(ended.stdout)
    try:
        with pytest.raises(LaunchError) as caught, hold_lock(tmp_path):
            pass
        assert f"its ranks still run (process ids {rank}); wait" in str(caught.value)
        assert f"`kill {rank}`" in str(caught.value)
    finally:
        os.kill(rank, signal.SIGKILL)
    wait_until(lambda: is_gone(rank))
    with hold_lock(tmp_path):
        pass


def test_a_lock_file_without_a_holder_is_refused_all_the_same(tmp_path):
    with hold_lock(tmp_path) as lock:
        os.ftruncate(lock, 0)
        with pytest.raises(LaunchError, match="held by another process; wait"), hold_lock(tmp_path):
            pass
