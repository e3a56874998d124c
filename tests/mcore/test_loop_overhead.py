"""The benchmark of our loop compares two loops that compute the same thing."""

import io
from collections import defaultdict
from contextlib import redirect_stdout

import pytest

from benchmarks.loop_overhead import summary
from benchmarks.loops import Loop, check_equal, run_both, timed_measure
from megamoe.train.hooks import Recording, open_recorders
from tests.mcore import tiny
from tests.mcore.world import world_of_one

# Eight steps, so that nothing is due in the first four: each loop takes each turn once.
LONGER = {"tokens": 1_024, "num_steps": 8, "checkpoint_every": 9, "eval_every": 9}


@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED], ids=["latent", "grouped"])
def test_both_loops_have_the_same_losses_bit_for_bit(model, tmp_path):
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
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    found = summary(steps, parts)
    assert found["steps"] == 4
    assert {"measure", "hook RecordSteps", "hook Save"} <= found["parts_s"].keys()


def test_a_difference_is_noticed(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", **LONGER)
    with world_of_one(plan):
        first, second = (Loop(plan, plan.segments[0], tmp_path) for _ in range(2))
        second.bare()
        parts = second.bare()
        with pytest.raises(AssertionError):
            check_equal(first.ours(), parts)
