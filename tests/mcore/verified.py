"""Has two ranks verify checkpoints and text together, each damaged in another way, for a test to read.

Run as a program with a folder: leaves in FOLDER/rank<n>.json what each rank was told, by case, and
which indices it hashed.
Ranks are forks of this process, which does nothing else.
"""

import hashlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import BinaryIO
from unittest import mock

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import checkpoint, data, groups

from megamoe.checkpoints.folder import name_of
from megamoe.errors import CheckpointError, DataError
from megamoe.plan.plan import Plan, Shard
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
# Of the shards s0, s1 and s2, rank 0 hashes the first and the last, rank 1 the other.
TEXT_CASES = {
    "sound": (),
    "first": ("s0.idx",),
    "middle": ("s1.idx",),
    "last two": ("s2.idx", "s1.idx"),
    "last, and one that is missing": ("s2.idx", "-s1.bin"),
}


def main() -> None:
    """Save, damage and verify."""
    folder = Path(sys.argv[1])
    for case, names in CASES.items():
        found = saved.save(folder / case / "checkpoints", saved.progress(64))
        for name in names:
            (found / name).write_bytes(b"x" + (found / name).read_bytes()[1:])
    for case, names in TEXT_CASES.items():
        text = folder / "text" / case
        shards = [tiny.write_text(text, f"s{i}", seed=i) for i in range(3)]
        for name in names:
            if name.startswith("-"):
                (text / name[1:]).unlink()
            else:
                (text / name).write_bytes((text / name).read_bytes()[:-1] + b"\x01")
    plan = tiny.tiny_plan(folder / "data", world_size=WORLD_SIZE, dp=WORLD_SIZE)
    children = [os.fork() or _be_rank(plan, folder, rank, shards) for rank in range(WORLD_SIZE)]
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert not any(ended), ended


def _be_rank(plan: Plan, folder: Path, rank: int, shards: list[Shard]) -> int:
    status = 1
    try:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=WORLD_SIZE
        )
        groups.form(plan, plan.segments[0])
        told = {case: _told(folder / case / "checkpoints" / name_of(64)) for case in CASES}
        texts = {case: _told_of_text(folder / "text" / case, shards) for case in TEXT_CASES}
        hashed: list[str] = []
        hashes = hashlib.file_digest

        def noting(file: BinaryIO, name: str) -> object:
            hashed.append(Path(file.name).stem)
            return hashes(file, name)

        with mock.patch.object(hashlib, "file_digest", noting):
            data.check_shards(folder / "text" / "sound", shards)
        answer = {"checkpoints": told, "texts": texts, "hashed": hashed}
        (folder / f"rank{rank}.json").write_text(json.dumps(answer))
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


def _told_of_text(folder: Path, shards: list[Shard]) -> str | None:
    try:
        data.check_shards(folder, shards)
    except DataError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
