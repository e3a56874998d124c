"""Has two ranks verify checkpoints and text together, each damaged in another way, for a test to read.

Run as a program with a folder: leaves in FOLDER/rank<n>.json what each rank was told, by case.
Ranks are forks of this process, which does nothing else.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import checkpoint, groups
    from megamoe.mcore.data import check_shards

from megamoe.checkpoints.folder import name_of
from megamoe.errors import CheckpointError, DataError
from megamoe.plan.plan import Plan
from tests.mcore import tiny
from tests.unit import saved

WORLD_SIZE = 2
# Of the files by name, rank 0 checks __0_0.distcp and progress.json, rank 1 the other two.
CASES = {
    "sound": (),
    "rank 0": ("__0_0.distcp",),
    "rank 1": ("__1_0.distcp",),
    "rank 1, another": ("tensors.json",),
    "both": ("__0_0.distcp", "__1_0.distcp"),
    "manifest": ("manifest.json",),
}


def main() -> None:
    """Save, damage and verify."""
    folder = Path(sys.argv[1])
    for case, names in CASES.items():
        found = saved.save(folder / case / "checkpoints", saved.progress(64))
        for name in names:
            (found / name).write_bytes(b"x" + (found / name).read_bytes()[1:])
    plan = tiny.tiny_plan(folder / "data", world_size=WORLD_SIZE, dp=WORLD_SIZE)
    children = [os.fork() or _be_rank(plan, folder, rank) for rank in range(WORLD_SIZE)]
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert not any(ended), ended


def _be_rank(plan: Plan, folder: Path, rank: int) -> int:
    status = 1
    try:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=WORLD_SIZE
        )
        groups.form(plan, plan.segments[0])
        told = {case: _told(folder / case / "checkpoints" / name_of(64)) for case in CASES}
        told |= _told_of_text(plan, folder / "data", rank)
        (folder / f"rank{rank}.json").write_text(json.dumps(told))
        torch.distributed.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _told(found: Path) -> str | None:
    try:
        checkpoint.verify(found)
    except CheckpointError as error:
        return str(error)
    return None


def _told_of_text(plan: Plan, folder: Path, rank: int) -> dict[str, str | None]:
    """Return what a rank is told of text that is whole, then of one shard after another taken away."""
    told = {}
    for gone in (
        "no text",
        "one.idx",
        "two.idx",
    ):  # rank 0 looks at the first shard, rank 1 at the next
        torch.distributed.barrier()
        if rank == 0 and gone != "no text":
            (folder / gone).rename(folder / f"{gone}.gone")
        torch.distributed.barrier()
        try:
            assert plan.data is not None
            check_shards(plan.data, plan.segments[0])
            told[gone] = None
        except DataError as error:
            told[gone] = str(error)
        torch.distributed.barrier()
        if rank == 0 and gone != "no text":
            (folder / f"{gone}.gone").rename(folder / gone)
    return told


if __name__ == "__main__":
    main()
