"""Which segment is next, and running one after another to the end of the plan."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.run_dir import RunDir, record_event
from megamoe.errors import CheckpointError, LaunchError, MegamoeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a checkpoint is, as its progress.json says."""

    checkpoint: Path
    segment: int
    step: int
    tokens_seen: int
    segment_done: bool


def read_progress(run_dir: RunDir) -> Progress | None:
    """Return how far the latest checkpoint is; None where there is none.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there, or of another plan.
    """
    latest = run_dir.checkpoints / "latest"
    if not latest.exists():
        return None
    checkpoint = run_dir.checkpoints / latest.read_text(encoding="utf-8").strip()
    try:
        data = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        progress = Progress(
            checkpoint=checkpoint,
            segment=int(data["segment"]),
            step=int(data["step"]),
            tokens_seen=int(data["tokens_seen"]),
            segment_done=bool(data["segment_done"]),
        )
        plan_digest = data["plan_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{latest}: names {checkpoint.name!r}, which has no sound progress.json ({error}); "
            "write the name of another folder beside it into `latest`"
        ) from error
    if plan_digest != run_dir.plan_digest:
        raise CheckpointError(
            f"{checkpoint}: is of plan {str(plan_digest)[:12]}, not of this run's "
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
