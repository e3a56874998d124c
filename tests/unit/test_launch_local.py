"""Ranks as processes: what they are told, and what happens when one or its parent ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launch.local import LocalJob, run_job, train_command
from launch.lock import hold_lock
from megamoe.errors import LaunchError
from tests.unit.disks import room
from tests.unit.test_launch_lock import is_gone, wait_until


def job(folder, code, num_ranks=2, stop_s=5.0):
    (folder / "logs").mkdir(exist_ok=True)
    return LocalJob(
        name="small/general",
        segment=3,
        num_ranks=num_ranks,
        command=(sys.executable, "-c", code, str(folder)),
        logs=folder / "logs",
        stop_s=stop_s,
    )


def run(folder, code, **changes):
    with hold_lock(folder) as lock:
        run_job(job(folder, code, **changes), lock)


WRITE_ENVIRONMENT = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "OMP_NUM_THREADS")
with open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump({name: os.environ[name] for name in names}, file)
print("out of", os.environ["RANK"])
print("err of", os.environ["RANK"], file=sys.stderr)
"""


def test_ranks_get_the_environment_that_torchrun_sets(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run(tmp_path, WRITE_ENVIRONMENT)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    port = first["MASTER_PORT"]
    assert first == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    assert second == {**first, "RANK": "1", "LOCAL_RANK": "1"}
    assert 1_024 <= int(port) <= 65_535


def test_threads_that_a_person_asked_for_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run(tmp_path, WRITE_ENVIRONMENT, num_ranks=1)
    assert json.loads((tmp_path / "rank0.json").read_text())["OMP_NUM_THREADS"] == "3"


def test_rank_0_speaks_to_the_terminal_and_all_else_goes_to_logs(tmp_path, capfd):
    run(tmp_path, WRITE_ENVIRONMENT)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("out of 0\n", "")
    logs = tmp_path / "logs"
    assert (logs / "segment-3-rank-0.log").read_text() == "err of 0\n"
    assert sorted((logs / "segment-3-rank-1.log").read_text().splitlines()) == [
        "err of 1",
        "out of 1",
    ]


def test_a_second_start_appends_to_the_logs(tmp_path):
    for _ in range(2):
        run(tmp_path, WRITE_ENVIRONMENT, num_ranks=1)
    assert (tmp_path / "logs" / "segment-3-rank-0.log").read_text() == "err of 0\n" * 2


def test_ranks_run_where_there_is_no_room_for_their_names(tmp_path):
    with hold_lock(tmp_path) as lock, room(0):
        run_job(job(tmp_path, "pass"), lock)


RANK_1_FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("a line before", file=sys.stderr)
    raise ValueError("tensor of odd size")
open(f"{sys.argv[1]}/pid", "w").write(str(os.getpid()))
time.sleep(60)
"""


def test_a_rank_that_fails_is_named_with_its_error_and_its_log(tmp_path):
    with pytest.raises(LaunchError) as caught:
        run(tmp_path, RANK_1_FAILS)
    assert str(caught.value) == (
        "small/general: rank 1 of segment 3 ended with exit code 1 (ValueError: tensor of odd "
        f"size); see {tmp_path}/logs/segment-3-rank-1.log"
    )


def test_a_rank_that_fails_ends_the_others(tmp_path):
    started = time.monotonic()
    with pytest.raises(LaunchError):
        run(tmp_path, RANK_1_FAILS)
    assert time.monotonic() - started < 10
    if (tmp_path / "pid").exists():  # rank 0 may not have come that far
        assert is_gone(int((tmp_path / "pid").read_text()))


def test_a_rank_that_a_signal_ends_is_the_cause_of_what_others_meet(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "mark = f'{sys.argv[1]}/mark'\n"
        "if os.environ['RANK'] == '1':\n"
        "    open(mark, 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "while not os.path.exists(mark): time.sleep(0.001)\n"
        "time.sleep(1)\n"  # as a rank does that waits for another
        "print('RuntimeError: peer is gone', file=sys.stderr)\n"
        "sys.exit(1)\n"
    )
    with pytest.raises(LaunchError, match="rank 1 of segment 3 was ended by SIGKILL; see"):
        run(tmp_path, code)


def test_a_mistake_that_the_rank_reports_in_one_line_is_repeated(tmp_path):
    code = "import sys; sys.stderr.write('megamoe: error: no data\\nlast words\\n'); sys.exit(2)"
    with pytest.raises(LaunchError, match=r"exit code 2 \(no data\); see"):
        run(tmp_path, code, num_ranks=1)


def test_the_remedy_at_the_end_of_a_long_mistake_is_repeated(tmp_path):
    problem = (
        f"{'a/long/path/' * 30}shard: is damaged; `megamoe run {'a/long/path/' * 30} --fallback`"
    )
    code = f"import sys; sys.stderr.write('megamoe: error: {problem}'); sys.exit(2)"
    with pytest.raises(LaunchError) as caught:
        run(tmp_path, code, num_ranks=1)
    assert f"({problem}); see " in str(caught.value)


def test_the_prefix_that_torch_puts_before_a_traceback_is_left_out(tmp_path):
    code = "import sys; sys.exit('[rank0]: Traceback\\n[rank0]: KeyError: 3\\nnext to last')"
    with pytest.raises(LaunchError, match=r"exit code 1 \(KeyError: 3\); see"):
        run(tmp_path, code, num_ranks=1)


def test_only_the_log_of_this_start_is_searched_for_the_error(tmp_path):
    with pytest.raises(LaunchError, match="ValueError: old"):
        run(tmp_path, "raise ValueError('old')", num_ranks=1)
    with pytest.raises(LaunchError, match=r"exit code 5; see"):
        run(tmp_path, "raise SystemExit(5)", num_ranks=1)


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    open(f'{sys.argv[1]}/pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(f'{sys.argv[1]}/pid'): time.sleep(0.01)\n"
        "sys.exit(4)\n"
    )
    with pytest.raises(LaunchError, match="rank 1 of segment 3 ended with exit code 4"):
        run(tmp_path, code, stop_s=0.3)
    assert is_gone(int((tmp_path / "pid").read_text()))


SUPERVISOR = """
import sys
from pathlib import Path
from launch.local import LocalJob, run_job
from launch.lock import hold_lock
folder = Path(sys.argv[1])
(folder / "logs").mkdir()
code = '''
import os, sys, time
open(f"{sys.argv[1]}/{os.environ['RANK']}.pid", "w").write(str(os.getpid()))
time.sleep(60)
'''
with hold_lock(folder) as lock:
    run_job(LocalJob(name="a/b", segment=0, num_ranks=2, logs=folder / "logs",
                     command=(sys.executable, "-c", code, str(folder))), lock)
"""


def heed_ctrl_c() -> None:
    """Undo what a shell does to jobs in the background: have them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def supervisor(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        stderr=subprocess.DEVNULL,
        preexec_fn=heed_ctrl_c,  # noqa: PLW1509 - no threads here
    ) as process:
        files = [tmp_path / "0.pid", tmp_path / "1.pid"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        yield process, [int(file.read_text()) for file in files]
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_ranks_end_with_a_supervisor_that_is_killed(tmp_path, supervisor):
    process, ranks = supervisor
    with pytest.raises(LaunchError, match=f"held by process {process.pid}"), hold_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    wait_until(lambda: all(is_gone(rank) for rank in ranks))
    with hold_lock(tmp_path):
        pass


def test_ctrl_c_stops_the_ranks(tmp_path, supervisor):
    process, ranks = supervisor
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert all(is_gone(rank) for rank in ranks)


def test_the_command_of_a_rank_is_that_of_the_train_command(tmp_path):
    assert train_command(tmp_path, 2, ("--tensorboard",))[1:] == (
        "-m", "megamoe", "train", str(tmp_path), "--segment", "2", "--tensorboard",
    )  # fmt: skip
    assert os.path.basename(train_command(tmp_path, 2, ())[0]).startswith("python")  # noqa: PTH119
