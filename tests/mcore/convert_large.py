"""Converts a checkpoint of more bytes than the memory it needs; says how much that was.

Run as a program with a folder: writes a run of one wide model there, expert by expert, exports and
imports it, and prints bytes of the weights and the growth of this process's peak of memory.
"""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.folder import Progress
from megamoe.checkpoints.manifest import write_manifest
from megamoe.convert.from_hf import from_hf
from megamoe.convert.ours import EXPERTS, our_tensors
from megamoe.convert.to_hf import to_hf
from megamoe.mcore.stored import TensorWriter
from megamoe.plan.json import digest, write_plan
from tests.mcore import tiny

MODEL = replace(
    tiny.GROUPED,
    hidden_dim=512,
    num_layers=4,
    experts=replace(tiny.GROUPED.experts, num_routed=32, ffn_dim=512),
    mtp=None,
)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_run(folder: Path) -> int:
    plan = tiny.tiny_plan(folder / "data", MODEL)
    write_plan(folder / "plan.json", plan)
    write_plan(folder.with_name("again") / "plan.json", plan)
    partial = files.begin(folder / "checkpoints", files.name_of(0))
    assert partial is not None
    total = 0
    with TensorWriter(partial) as writer:
        for name, shape in our_tensors(MODEL).items():
            count = shape[0] if EXPERTS in name else 1
            for i in range(count):
                own = shape[1:] if EXPERTS in name else shape
                writer.write(name, torch.full(own, 0.5), (i, count) if EXPERTS in name else None)
                total += torch.Size(own).numel() * 4
        entries, _ = writer.finish()
    progress = Progress(
        plan_digest=digest(plan),
        segment=0,
        step=0,
        tokens_seen=0,
        segment_done=False,
        ledger=(),
    )
    write_manifest(partial, [*entries, files.write_progress(partial, progress)])
    files.publish(partial, folder / "checkpoints" / files.name_of(0), keep=1)
    return total


def main() -> None:
    """Convert there and back."""
    root = Path(sys.argv[1])
    for name in ("run", "again"):
        (root / name).mkdir()
    total = _write_run(root / "run")
    before = _peak_bytes()
    to_hf(root / "run", root / "out", dtype=None, shard_bytes=16_000_000, say=lambda _: None)
    from_hf(root / "out", root / "again", tokens_seen=0, say=lambda _: None)
    sys.stdout.write(json.dumps({"weights": total, "grown": _peak_bytes() - before}))


if __name__ == "__main__":
    main()
