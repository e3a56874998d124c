"""A checkpoint folder without room: the save fails and says so, training goes on, nothing stays."""

import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megamoe.checkpoints import folder as files
from megamoe.errors import CheckpointError
from megamoe.mcore import shards
from tests.mcore import tiny
from tests.mcore.world import train, world_of_one

SIZE = 64 << 20
# 2.7 million weights: one checkpoint (weights, and three numbers each of the optimizer) is 43 MB.
MODEL = replace(
    tiny.LATENT,
    num_layers=2,
    window_pattern="LG",
    dense_ffn_dim=28_000,
    experts=replace(tiny.LATENT.experts, num_routed=4),
)


@contextmanager
def tmpfs(folder):
    """A file system of 64 MB at a folder; skips where this user may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def engine(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", MODEL)
    with tmpfs(tmp_path / "run" / "checkpoints"), world_of_one(plan):
        yield train(plan, tmp_path / "run", 1)


def test_a_save_without_room_says_what_it_needs_and_what_there_is(engine):
    first = engine.save(wait=True)
    engine.train_step()
    engine.save()
    loss = engine.train_step().loss  # training goes on
    engine.saver.wait()
    written, failed = engine.ended_saves()
    assert (written.error, failed.num_bytes) == (None, 0)
    assert 0.6 * SIZE < written.num_bytes < SIZE
    numbers = re.fullmatch(
        rf"{first.parent}: a checkpoint needs ([\d,]+) bytes, ([\d,]+) are available; "
        r"make room, or remove checkpoints that `latest` does not name \(rank 0\)",
        failed.error,
    )
    needed, available = (int(number.replace(",", "")) for number in numbers.groups())
    assert written.num_bytes <= needed < 1.1 * written.num_bytes
    assert available < SIZE - written.num_bytes
    assert loss > 0
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, files.LATEST]
    assert files.latest(first.parent) == first
    files.verify(first)


def test_what_the_message_says_makes_room_for_the_next_save(engine):
    first = engine.save(wait=True)
    set_aside = first.with_name("000000000000064.damaged")
    first.rename(set_aside)
    engine.train_step()
    with pytest.raises(CheckpointError, match="remove checkpoints that `latest` does not name"):
        engine.save(wait=True)
    shutil.rmtree(set_aside)
    saved = engine.save(wait=True)
    assert files.latest(first.parent) == saved


def test_a_disk_that_fills_up_during_a_save_costs_only_that_save(engine, monkeypatch):
    first = engine.save(wait=True)
    engine.train_step()
    monkeypatch.setattr(shards, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    engine.save()
    engine.train_step()
    engine.saver.wait()
    _, failed = engine.ended_saves()
    assert "No space left on device" in failed.error
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, files.LATEST]
    assert files.latest(first.parent) == first
    files.verify(first)
