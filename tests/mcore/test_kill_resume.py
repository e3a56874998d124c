"""A run that is killed anywhere, saves included, ends as one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.run_dir import settle_run_dir
from megamoe.checkpoints import folder as files
from megamoe.plan.plan import Plan
from megamoe.train.metrics import read_records
from tests.mcore import tiny

_KILLS = 10
_STEPS = 30  # of each of the two segments; ten kills, some steps apart, must find it running


def _two_segments(folder: Path) -> Plan:
    """EP2, then PP2 with sequences twice as long: the checkpoint between them is re-sharded."""
    plan = tiny.tiny_plan(
        folder,
        world_size=2,
        dp=2,
        layout=replace(tiny.LAYOUT, ep=2, dispatcher="deepep"),
        num_steps=_STEPS,
        tokens=_STEPS * 128,
        eval_every=5,
        checkpoint_every=2,
    )
    first = plan.segments[0]
    second = replace(
        first,
        index=1,
        stage="long_context",
        tokens_start=first.tokens,
        steps_start=first.num_steps,
        seq_len=32,
        batch_ramp=((0, 4),),
        dp=1,
        layout=replace(tiny.LAYOUT, pp=2),
    )
    return replace(plan, segments=(first, second))


def _start(run_dir: Path) -> subprocess.Popen[bytes]:
    with (run_dir / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megamoe", "run", str(run_dir)], stdout=log, stderr=log
        )


def _trajectory(run_dir: Path) -> list[tuple[object, ...]]:
    """Everything measured that does not depend on the clock."""
    names = ("kind", "step", "tokens_seen", "source", "loss_nats_per_token", "grad_norm", "lr")
    return [
        tuple(r.get(name) for name in names)
        for r in read_records(run_dir / "metrics.jsonl")
        if r["kind"] != "save"
    ]


def _steps_done(run_dir: Path) -> int:
    return max((int(r["step"]) for r in read_records(run_dir / "metrics.jsonl")), default=0)


def _ranks(run_dir: Path) -> list[int]:
    text = (run_dir / "lock").read_text()
    return list(json.loads(text)["ranks"]) if text else []


def _wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)


def _kill_one(run_dir: Path, chance: random.Random, *, while_saving: bool) -> None:
    process = _start(run_dir)
    target = min(_steps_done(run_dir) // 2 * 2 + chance.choice([2, 3]), 2 * _STEPS - 1)
    _wait_for(lambda: _steps_done(run_dir) >= target, process)
    if while_saving:
        _wait_for(lambda: any((run_dir / "checkpoints").glob(".*.partial")), process)
        time.sleep(chance.uniform(0, 0.3))
    else:
        time.sleep(chance.uniform(0, 0.5))
    _wait_for(lambda: _ranks(run_dir), process)  # none between two segments
    os.kill(chance.choice(_ranks(run_dir)), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    newest = files.latest(run_dir / "checkpoints")
    if newest is not None:
        files.verify(newest)


@pytest.mark.slow
def test_killed_ten_times_it_ends_bit_for_bit_as_the_uninterrupted_run(tmp_path: Path) -> None:
    plan = _two_segments(tmp_path / "data")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        settle_run_dir(tmp_path / name, plan, {})
    status = _start(tmp_path / "whole").wait(timeout=600)
    said = (tmp_path / "whole" / "supervisor.log").read_text()
    assert status == 0, said
    # Once: the other rank says nothing, and the second segment has nothing to say.
    assert said.count("general: dispatcher deepep: package deep_ep needs a GPU; all_to_all is") == 1
    chance = random.Random(20261122)
    for kill in range(_KILLS):
        _kill_one(tmp_path / "killed", chance, while_saving=kill % 2 == 1)
    assert _start(tmp_path / "killed").wait(timeout=600) == 0
    whole = _trajectory(tmp_path / "whole")
    assert whole[-1][1] == 2 * _STEPS
    assert _trajectory(tmp_path / "killed") == whole
