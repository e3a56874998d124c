"""The benchmark of our loop compares two loops that compute the same thing."""

import io
import json
import threading
from collections import defaultdict
from contextlib import redirect_stdout

import pytest

from benchmarks.loop_overhead import _ratio, summary
from benchmarks.loops import Loop, check_equal, run_both, timed_measure
from megamoe.checkpoints.folder import latest, name_of, verify
from megamoe.errors import CheckpointError
from megamoe.train.hooks import Recording, open_recorders
from tests.mcore import tiny
from tests.mcore.world import world_of_one

# Eight steps, of which four are made: each loop takes each turn once, and no step is the last.
LONGER = {"tokens": 1_024, "num_steps": 8, "checkpoint_every": 1, "eval_every": 9}


@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED], ids=["latent", "grouped"])
def test_both_loops_have_the_same_losses_bit_for_bit(model, tmp_path, monkeypatch):
    bare, alone = Loop.bare, []

    def watched(loop):
        alone.append(all(thread.name != "save" for thread in threading.enumerate()))
        return bare(loop)

    monkeypatch.setattr(Loop, "bare", watched)
    plan = tiny.tiny_plan(tmp_path / "data", model, **LONGER)
    segment = plan.segments[0]
    nowhere = Recording(tensorboard=False, wandb=None)
    with world_of_one(plan), redirect_stdout(io.StringIO()):
        first, second = Loop(plan, segment, tmp_path), Loop(plan, segment, tmp_path)
        parts = defaultdict(list)
        with (
            timed_measure(parts),
            open_recorders(tmp_path, plan, segment, 0, nowhere) as recorders,
        ):
            first.record_to(recorders, parts)
            second.record_to(recorders, parts)
            steps = run_both(first, second, num_steps=4)
    assert [result.step for result in steps.results] == [1, 2, 3, 4]
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    # A save is recorded by the next of our steps of the same model.
    kinds = [(record["kind"], record["step"]) for record in records]
    steps_and_saves = [("step", 1), ("step", 2), ("step", 3), ("save", 1), ("step", 4), ("save", 2)]
    assert kinds == steps_and_saves
    assert alone == [True] * 4, "a writer was at work beside a bare step"
    newest = latest(tmp_path / "checkpoints")
    assert newest.name == name_of(steps.results[-1].tokens_seen)
    verify(newest)
    found = summary(steps, parts, segment)
    assert found["steps"] == len(found["steps_that_save_s"]) == 4
    assert {"measure", "hook RecordSteps", "hook Save"} <= found["parts_s"].keys()


def test_means_see_what_medians_do_not():
    ratio = _ratio([1.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 1.0])
    assert (ratio["ratio"], ratio["mean_ratio"]) == (1.0, 2.0)


def test_a_checkpoint_that_cannot_be_written_ends_the_comparison(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", **LONGER)
    with world_of_one(plan):
        loop = Loop(plan, plan.segments[0], tmp_path)
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(CheckpointError, match="checkpoints"):
            loop.ours_alone()


def test_a_difference_is_noticed(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", **LONGER)
    with world_of_one(plan):
        first, second = (Loop(plan, plan.segments[0], tmp_path) for _ in range(2))
        second.bare()
        parts = second.bare()
        with pytest.raises(AssertionError):
            check_equal(first.ours(), parts)
