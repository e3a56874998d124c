"""Segment after segment, across starts, with everything that happened on record."""

import json
from contextlib import ExitStack

import pytest

from launch.run_dir import open_run_dir, settle_run_dir
from launch.supervise import next_segment, read_progress, supervise
from megamoe.errors import CheckpointError, LaunchError, PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.json import digest
from tests.unit import saved
from tests.unit.disks import room
from tests.unit.test_plan_build import CPU, RECIPE

PLAN = build_plan(RECIPE, CPU, Options())


@pytest.fixture
def run_dir(tmp_path):
    return settle_run_dir(tmp_path / "run", PLAN, {"tokens_asked": [1, 2]})


def save(run_dir, segment, *, done, tokens=500, plan_digest=None):
    plan_digest = plan_digest or digest(PLAN)
    progress = saved.progress(tokens, segment=segment, segment_done=done, plan_digest=plan_digest)
    saved.save(run_dir.checkpoints, progress)


def events(run_dir):
    lines = (run_dir.path / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_new_run_folder_describes_itself(run_dir):
    assert open_run_dir(run_dir.path) == run_dir
    assert (run_dir.logs.is_dir(), run_dir.checkpoints.is_dir()) == (True, True)
    environment = json.loads((run_dir.path / "environment.json").read_text())
    assert {"megamoe", "commit", "command", "host", "python", "packages"} <= environment.keys()
    created = events(run_dir)[0]
    assert (created["event"], created["tokens_asked"]) == ("created", [1, 2])
    assert created["time"].endswith("+00:00")


def test_no_secret_of_the_environment_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0451")
    run_dir = settle_run_dir(tmp_path / "run", PLAN, {})
    for path in run_dir.path.rglob("*"):
        assert path.is_dir() or "canary-0451" not in path.read_text()


def test_the_same_plan_opens_the_folder_again(run_dir):
    assert settle_run_dir(run_dir.path, PLAN, {}) == run_dir
    assert len(events(run_dir)) == 1


def test_another_plan_is_refused_with_what_differs(run_dir):
    other = build_plan(RECIPE, CPU, Options(seed=9, keep_checkpoints=7, checkpoint_every=3))
    with pytest.raises(LaunchError) as caught:
        settle_run_dir(run_dir.path, other, {})
    message = str(caught.value)
    assert "holds another plan (keep_checkpoints: 3, not 7; seed: 0, not 9; " in message
    assert "; and 3 more); give another --run-dir" in message
    assert f"`megamoe run {run_dir.path}`" in message


def test_a_folder_without_a_plan_is_no_run(tmp_path):
    with pytest.raises(PlanError, match=r"plan\.json: No such file"):
        open_run_dir(tmp_path)


def test_segments_run_in_order_to_the_end(run_dir):
    ran = []

    def run_segment(index):
        ran.append(index)
        save(run_dir, index, done=True, tokens=100 * (index + 1))

    supervise(run_dir, run_segment)
    assert ran == [0, 1]
    assert [event["event"] for event in events(run_dir)] == [
        "created",
        "segment_started",
        "segment_done",
        "segment_started",
        "segment_done",
        "run_done",
    ]
    assert events(run_dir)[4]["tokens_seen"] == 200


def test_a_run_goes_on_with_the_segment_its_checkpoint_is_in(run_dir):
    ran = []

    def run_segment(index):
        ran.append(index)
        save(run_dir, index, done=True, tokens=600)

    save(run_dir, 1, done=False)
    supervise(run_dir, run_segment)
    assert ran == [1]


@pytest.mark.parametrize(
    ("segment", "done", "following"), [(0, False, 0), (0, True, 1), (1, False, 1), (1, True, None)]
)
def test_what_follows_a_checkpoint(run_dir, segment, done, following):
    save(run_dir, segment, done=done)
    assert next_segment(run_dir, read_progress(run_dir)) == following


def test_a_run_that_is_done_runs_nothing(run_dir):
    save(run_dir, 1, done=True)
    supervise(run_dir, lambda index: pytest.fail(f"ran {index}"))


def test_a_failed_segment_is_on_record(run_dir):
    def fail(index):
        raise LaunchError(f"rank 1 of segment {index} ended")

    with pytest.raises(LaunchError):
        supervise(run_dir, fail)
    last = events(run_dir)[-1]
    assert (last["event"], last["error"]) == ("segment_failed", "rank 1 of segment 0 ended")


def test_a_segment_that_ends_without_its_checkpoint_has_failed(run_dir):
    with pytest.raises(LaunchError, match="segment 0 ended, but no checkpoint says it is done"):
        supervise(run_dir, lambda _: save(run_dir, 0, done=False))
    assert events(run_dir)[-1]["event"] == "segment_failed"


def test_an_interrupt_is_on_record(run_dir):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(run_dir, interrupt)
    assert events(run_dir)[-1]["event"] == "interrupted"


def test_events_of_a_while_without_room_follow_and_the_run_goes_on(run_dir, capsys):
    with ExitStack() as disk:

        def run_segment(index):
            disk.close()
            save(run_dir, index, done=True, tokens=100 * (index + 1))
            if index == 0:
                disk.enter_context(room(0))

        supervise(run_dir, run_segment)
    assert [event["event"] for event in events(run_dir)] == [
        "created",
        "segment_started",
        "segment_done",
        "segment_started",
        "segment_done",
        "run_done",
    ]
    place = run_dir.path / "events.jsonl"
    assert capsys.readouterr().out == (
        f"{place}: File too large; its lines wait in memory until they can be written\n"
    )


def test_events_that_never_found_room_are_told_at_the_end(run_dir, capsys):
    def fail(_):
        raise LaunchError("rank 1 ended")

    with room(0), pytest.raises(LaunchError, match="rank 1 ended"):
        supervise(run_dir, fail)
    assert len(events(run_dir)) == 1
    assert capsys.readouterr().out.endswith("events.jsonl: File too large; 2 lines are lost\n")


def test_what_the_system_refuses_while_a_segment_starts_is_on_record(run_dir):
    def refuse(_):
        raise OSError(24, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        supervise(run_dir, refuse)
    assert events(run_dir)[-1]["event"] == "segment_failed"


def test_a_checkpoint_of_another_plan_is_refused(run_dir):
    save(run_dir, 0, done=True, plan_digest="f" * 64)
    with pytest.raises(CheckpointError, match="is of plan ffffffffffff, not of this run's"):
        read_progress(run_dir)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"segment": "x"}'])
def test_a_checkpoint_without_sound_progress_is_refused(run_dir, content):
    save(run_dir, 0, done=True)
    progress = run_dir.checkpoints / f"{500:015d}" / "progress.json"
    progress.unlink() if content is None else progress.write_text(content)
    with pytest.raises(CheckpointError, match=r"/progress\.json: .*written by rank 0.*--fallback"):
        read_progress(run_dir)
