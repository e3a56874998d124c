"""A disk without room: a save fails and says so, records wait, training goes on, nothing stays."""

import re
import shutil
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megamoe.checkpoints import folder as files
from megamoe.errors import CheckpointError
from megamoe.mcore import shards
from megamoe.mcore.engine import Engine
from megamoe.train.hooks import Recording, make_hooks, open_recorders
from megamoe.train.loop import train as train_segment
from megamoe.train.metrics import read_records
from tests.mcore import tiny
from tests.mcore.world import train, world_of_one
from tests.unit.disks import SIZE, tmpfs

# 2.7 million weights: one checkpoint (weights, and three numbers each of the optimizer) is 43 MB.
MODEL = replace(
    tiny.LATENT,
    num_layers=2,
    window_pattern="LG",
    dense_ffn_dim=28_000,
    experts=replace(tiny.LATENT.experts, num_routed=4),
)


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


class Disk:
    """A hook that leaves no room from one step to another. What is left of a block takes lines."""

    def __init__(self, folder, *, full_after, room_after):
        self.ballast = folder / "ballast"
        self.full_after, self.room_after = full_after, room_after

    def after_step(self, result, engine):
        if result.step == self.full_after:
            self.fill()
        elif result.step == self.room_after:
            self.ballast.unlink()

    def fill(self):
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))


def test_a_run_whose_disk_is_full_for_a_while_goes_on_and_records_every_step_once(tmp_path, capsys):
    sizes = {"num_steps": 24, "tokens": 24 * 128, "checkpoint_every": 12, "eval_every": 24}
    plan = tiny.tiny_plan(tmp_path / "data", MODEL, **sizes)
    segment, run, nowhere = (
        plan.segments[0],
        tmp_path / "run",
        Recording(tensorboard=False, wandb=None),
    )
    with tmpfs(run), world_of_one(plan):
        engine = Engine(plan, segment, run)
        with open_recorders(run, plan, segment, 0, nowhere) as recorders:
            disk = Disk(run, full_after=2, room_after=20)
            train_segment(engine, [disk, *make_hooks(segment, recorders)])
        records = list(read_records(run / "metrics.jsonl"))
        files.verify(files.latest(run / "checkpoints"))
    said = capsys.readouterr().out
    assert said.count(f"{run}/metrics.jsonl: No space left on device; its lines wait") == 1
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 25))
    assert {r["step"] for r in records if r["kind"] == "eval"} == {10, 24}
    failed, written = (r for r in records if r["kind"] == "save")
    assert (failed["step"], written["step"]) == (12, 24)
    assert "No space left on device" in failed["error"]
    assert "error" not in written
