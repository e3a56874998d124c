"""A checkpoint and the plan of its run, found from what a person gives: a run folder, or itself."""

from dataclasses import dataclass
from pathlib import Path

from megamoe.checkpoints.folder import Progress, latest, read_progress
from megamoe.checkpoints.manifest import MANIFEST
from megamoe.errors import CheckpointError
from megamoe.plan.json import digest, read_plan
from megamoe.plan.plan import Plan, Segment

PLAN = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A checkpoint and the plan that it was made by."""

    plan: Plan
    checkpoint: Path
    progress: Progress

    @property
    def segment(self) -> Segment:
        """Return the segment that made the checkpoint."""
        return self.plan.segments[self.progress.segment]


def find_checkpoint(path: Path) -> Place:
    """Return the latest checkpoint of a run folder, or the one that is given itself.

    Raises:
        CheckpointError: it is neither, or there is none yet, or it belongs to another plan.
    """
    if (path / PLAN).is_file():
        run, checkpoint = path, latest(path / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(
                f"{path}: has no checkpoint yet; `megamoe run {path}` goes on until there is one"
            )
    else:
        run, checkpoint = path.resolve().parent.parent, path
        if not ((path / MANIFEST).is_file() and (run / PLAN).is_file()):
            raise CheckpointError(
                f"{path}: is neither a run folder nor a checkpoint in one; give for example "
                "runs/tiny or runs/tiny/checkpoints/000000000564224"
            )
    plan, progress = read_plan(run / PLAN), read_progress(checkpoint)
    if progress.plan_digest != digest(plan):
        raise CheckpointError(f"{checkpoint}: belongs to another plan than {run / PLAN}")
    return Place(plan=plan, checkpoint=checkpoint, progress=progress)
