"""Which segment is next, and running one after another to the end of the plan."""

from collections.abc import Callable

from launch.run_dir import RunDir, record_event
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
    progress = read_progress(run_dir)
    while (index := next_segment(run_dir, progress)) is not None:
        started = {"segment": index, "tokens_seen": progress.tokens_seen if progress else 0}
        record_event(run_dir.path, "segment_started", started)
        try:
            run_segment(index)
        except KeyboardInterrupt:
            record_event(run_dir.path, "interrupted", {"segment": index})
            raise
        except MegamoeError as error:
            record_event(run_dir.path, "segment_failed", {"segment": index, "error": str(error)})
            raise
        progress = read_progress(run_dir)
        if progress is None or progress.segment < index or not progress.segment_done:
            problem = f"{run_dir.path}: segment {index} ended, but no checkpoint says it is done"
            record_event(run_dir.path, "segment_failed", {"segment": index, "error": problem})
            raise LaunchError(f"{problem}; see {run_dir.logs}")
        done = {"segment": index, "step": progress.step, "tokens_seen": progress.tokens_seen}
        record_event(run_dir.path, "segment_done", done)
    record_event(run_dir.path, "run_done", {})
