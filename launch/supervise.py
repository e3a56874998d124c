"""Which segment is next, and running one after another to the end of the plan."""

import sys
from collections.abc import Callable
from contextlib import closing

from launch.run_dir import Events, RunDir
from megamoe.checkpoints import folder as checkpoints
from megamoe.checkpoints.folder import Progress, latest
from megamoe.errors import CheckpointError, LaunchError, MegamoeError


def read_progress(run_dir: RunDir) -> Progress | None:
    """Return how far the latest checkpoint is; None where there is none.

    Raises:
        CheckpointError: `latest`, or what it names, is missing or damaged, or is of another plan.
    """
    checkpoint = latest(run_dir.checkpoints)
    if checkpoint is None:
        return None
    progress = checkpoints.read_progress(checkpoint)
    if progress.plan_digest != run_dir.plan_digest:
        raise CheckpointError(
            f"{checkpoint}: is of plan {progress.plan_digest[:12]}, not of this run's "
            f"{run_dir.plan_digest[:12]}; it was copied here, or plan.json was edited"
        )
    return progress


def next_segment(run_dir: RunDir, progress: Progress | None) -> int | None:
    """Return the index of the segment to run; None when all are done."""
    if progress is None:
        return 0
    index = progress.segment + 1 if progress.segment_done else progress.segment
    return index if index < len(run_dir.plan.segments) else None


def supervise(run_dir: RunDir, run_segment: Callable[[int], None]) -> None:
    """Run segment after segment until the plan is done, recording what happens.

    Args:
        run_dir: the run, locked by the caller.
        run_segment: runs one segment, by index, to its end.

    Raises:
        LaunchError: a segment failed, or ended without the checkpoint that ends it.
    """
    with closing(Events(run_dir.path, say)) as events:
        _supervise(run_dir, run_segment, events)


def say(line: str) -> None:
    """Write a line for the person who runs this."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()  # before rank 0 writes to the same terminal


def _supervise(run_dir: RunDir, run_segment: Callable[[int], None], events: Events) -> None:
    progress = read_progress(run_dir)
    while (index := next_segment(run_dir, progress)) is not None:
        started = {"segment": index, "tokens_seen": progress.tokens_seen if progress else 0}
        events.record("segment_started", started)
        try:
            run_segment(index)
        except KeyboardInterrupt:
            events.record("interrupted", {"segment": index})
            raise
        except (MegamoeError, OSError) as error:
            events.record("segment_failed", {"segment": index, "error": str(error)})
            raise
        progress = read_progress(run_dir)
        if progress is None or progress.segment < index or not progress.segment_done:
            problem = f"{run_dir.path}: segment {index} ended, but no checkpoint says it is done"
            events.record("segment_failed", {"segment": index, "error": problem})
            raise LaunchError(f"{problem}; see {run_dir.logs}")
        done = {"segment": index, "step": progress.step, "tokens_seen": progress.tokens_seen}
        events.record("segment_done", done)
    events.record("run_done", {})
