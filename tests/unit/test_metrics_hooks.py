"""What is done after each step, and when."""

import argparse
import importlib.util
import sys
import threading

import pytest

from megamoe.errors import CheckpointError, MegamoeError, TrainingError
from megamoe.train.hooks import (
    Recording,
    add_recording_arguments,
    is_due,
    make_hooks,
    open_recorders,
    recording_from_args,
    recording_the_last_save,
    scalars,
)
from tests.unit.disks import room
from tests.unit.test_metrics_records import PLAN, SEGMENT, measured, records, result, saved

SECOND = PLAN.segments[1]  # 28 steps after 147, saved every 5
PLAIN = Recording(tensorboard=False, wandb=None)


class FakeEngine:
    """Keeps the order in which it was asked."""

    is_done = False

    def __init__(self):
        self.asked = []

    def train_step(self):
        raise AssertionError

    def evaluate(self):
        self.asked.append("evaluate")
        return [measured(1), measured(1, source="code")]

    def save(self, *, wait):
        self.asked.append("save and wait" if wait else "save")

    def ended_saves(self):
        return [saved(9)] if "save" in self.asked else []

    def close(self):
        self.asked.append("close")


class Keeper:
    """A recorder that keeps everything."""

    def __init__(self):
        self.kept = []

    def record_step(self, step):
        self.kept.append(step.step)

    def record_evals(self, evaluation):
        self.kept += [item.source for item in evaluation]

    def record_save(self, saving):
        self.kept.append(f"saved at {saving.step}")

    def close(self):
        self.kept.append("closed")


def after(step, segment=SEGMENT, *, is_done=False):
    engine, keeper = FakeEngine(), Keeper()
    engine.is_done = is_done
    for hook in make_hooks(segment, [keeper]):
        hook.after_step(result(step), engine)
    return engine.asked, keeper.kept


@pytest.mark.parametrize(
    ("step", "due"), [(28, False), (29, True), (30, False), (145, True), (146, False), (147, True)]
)
def test_a_fifth_of_the_segment_and_its_end_are_due(step, due):
    assert is_due(SEGMENT, SEGMENT.checkpoint_every, step) is due
    assert ("save" in after(step)[0]) is due


@pytest.mark.parametrize(("step", "due"), [(151, False), (152, True), (174, False), (175, True)])
def test_a_later_segment_counts_its_own_steps(step, due):
    assert is_due(SECOND, SECOND.checkpoint_every, step) is due


@pytest.mark.parametrize(
    ("step", "due"),
    [(9, False), (10, True), (11, False), (28, False), (29, True), (146, False), (147, True)],
)
def test_held_out_loss_is_measured_after_ten_steps_each_fifth_and_at_the_end(step, due):
    assert ("evaluate" in after(step)[0]) is due


def test_a_step_is_recorded_before_its_evaluation_and_both_before_the_checkpoint():
    asked, kept = after(147)
    assert asked == ["evaluate", "save"]
    assert kept == [147, "korean", "code", "saved at 9"]


def test_the_end_of_a_segment_waits_for_its_checkpoint_and_no_other_step_does():
    assert after(29)[0] == ["evaluate", "save"]
    assert after(147, is_done=True)[0] == ["evaluate", "save and wait"]


def test_a_last_checkpoint_that_fails_is_recorded_and_ends_the_segment():
    class Full(FakeEngine):
        is_done = True

        def save(self, *, wait):
            raise CheckpointError("no room")

        def ended_saves(self):
            return [saved(147, error="no room")]

    keeper = Keeper()
    with pytest.raises(CheckpointError, match="no room"):
        make_hooks(SEGMENT, [keeper])[-1].after_step(result(147), Full())
    assert keeper.kept == ["saved at 147"]


def test_ranks_without_recorders_evaluate_and_save_all_the_same():
    engine = FakeEngine()
    for hook in make_hooks(SEGMENT, []):
        hook.after_step(result(147), engine)
    assert engine.asked == ["evaluate", "save"]


def test_rank_0_records_to_the_file_and_the_console(tmp_path, capsys):
    with open_recorders(tmp_path, PLAN, SEGMENT, 0, PLAIN) as recorders:
        for recorder in recorders:
            recorder.record_step(result(1))
    assert [record["step"] for record in records(tmp_path)] == [1]
    assert "step 1/147" in capsys.readouterr().out


def test_recorders_are_closed_after_an_error(tmp_path):
    opened = open_recorders(tmp_path, PLAN, SEGMENT, 0, PLAIN)
    recorders = opened.__enter__()
    recorders[0].record_step(result(1))
    opened.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    with pytest.raises(ValueError, match="closed file"):
        recorders[0].record_step(result(2))


@pytest.mark.parametrize("error", [None, "no room"])
def test_a_save_under_way_when_training_fails_is_recorded_before_the_recorders_close(
    tmp_path, error
):
    class Writing(FakeEngine):
        def ended_saves(self):
            return [saved(3, error=error)] if self.asked == ["close"] else []

    with (
        pytest.raises(ZeroDivisionError),
        open_recorders(tmp_path, PLAN, SEGMENT, 0, PLAIN) as recorders,
        recording_the_last_save(Writing(), recorders),
    ):
        raise ZeroDivisionError
    [record] = records(tmp_path)
    assert (record["kind"], record["step"], record.get("error")) == ("save", 3, error)


def test_a_disk_without_room_for_the_records_is_told_and_they_follow(tmp_path, capsys):
    place = tmp_path / "metrics.jsonl"
    with open_recorders(tmp_path, PLAN, SEGMENT, 0, PLAIN) as recorders:
        with room(0):
            for step in (1, 2):
                for recorder in recorders:
                    recorder.record_step(result(step))
        assert capsys.readouterr().out.count(f"{place}: File too large; its lines wait") == 1
        recorders[0].record_step(result(3))
        assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_records_that_never_found_room_are_told_at_the_end(tmp_path, capsys):
    opened = open_recorders(tmp_path, PLAN, SEGMENT, 0, PLAIN)
    recorders = opened.__enter__()
    with room(0):
        recorders[0].record_step(result(1))
        opened.__exit__(None, None, None)
    out = capsys.readouterr().out
    assert f"{tmp_path}/metrics.jsonl: File too large; 1 lines are lost\n" in out


def test_records_that_cannot_begin_are_a_mistake_of_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    opened = open_recorders(tmp_path, PLAN, SEGMENT, 0, PLAIN)
    with (
        pytest.raises(MegamoeError, match=r"metrics\.jsonl: Is a directory; mend that, then"),
        opened,
    ):
        pass


@pytest.mark.parametrize(
    ("recording", "module", "flag"),
    [
        (Recording(tensorboard=True, wandb=None), "torch.utils.tensorboard", "--tensorboard"),
        (Recording(tensorboard=False, wandb="offline"), "wandb", "--wandb"),
    ],
)
def test_a_library_that_is_missing_is_named_in_one_line(
    tmp_path, monkeypatch, recording, module, flag
):
    monkeypatch.setitem(sys.modules, module, None)
    opened = open_recorders(tmp_path, PLAN, SEGMENT, 0, recording)
    with pytest.raises(TrainingError, match=rf"{flag}: .*is not installed; `pip install"), opened:
        pass


def test_the_flags_of_the_train_command():
    parser = argparse.ArgumentParser()
    add_recording_arguments(parser)
    assert recording_from_args(parser.parse_args([])) == PLAIN
    args = parser.parse_args(["--tensorboard", "--wandb", "offline"])
    assert recording_from_args(args) == Recording(tensorboard=True, wandb="offline")


def test_numbers_are_charted_and_positions_and_words_are_not():
    record = {
        "stage": "a",
        "step": 3,
        "lr": 0.5,
        "expert_load_max_over_mean": [1, 4],
        "loss": "nan",
    }
    assert dict(scalars(record)) == {"lr": 0.5, "expert_load_max_over_mean": 4}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_works_offline_without_an_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recording = Recording(tensorboard=False, wandb="offline")
    for steps_done in (0, 1):  # a second process goes on with the same run
        with open_recorders(tmp_path, PLAN, SEGMENT, steps_done, recording) as recorders:
            recorders[1].record_step(result(steps_done + 1))
            recorders[1].record_evals([measured(steps_done + 1)])
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1
    assert all(path.stat().st_size > 0 for path in files)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the libraries
def test_tensorboard_counts_tokens_and_voids_what_is_done_again(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recording = Recording(tensorboard=True, wandb=None)
    for steps_done, loss in ((0, 1.0), (2, 2.0)):  # killed after step 3, goes on after step 2
        with open_recorders(tmp_path, PLAN, SEGMENT, steps_done, recording) as recorders:
            for step in range(steps_done + 1, 4):
                recorders[1].record_step(result(step, loss=loss))
            recorders[1].record_evals([measured(3)])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(item.step, item.value) for item in events.Scalars("train/loss_nats_per_token")]
    assert losses == [(512, 1.0), (1_024, 1.0), (1_536, 2.0)]
    assert [item.step for item in events.Scalars("heldout_loss_nats_per_token/korean")] == [1_536]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the libraries
def test_tensorboard_without_room_ends_and_says_so(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch.utils.tensorboard")
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of its thread, which fails
    recording = Recording(tensorboard=True, wandb=None)
    with open_recorders(tmp_path, PLAN, SEGMENT, 0, recording) as recorders:
        with room(2_000):
            for step in range(1, 100):
                recorders[1].record_step(result(step))
        recorders[1].record_step(result(100))
    said = f"{tmp_path}/tensorboard: File too large; nothing more of this segment is written there"
    assert capsys.readouterr().out.count(said) == 1
