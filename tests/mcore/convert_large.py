"""Converts a checkpoint of more bytes than the memory it is given; says how much it took.

Run as a program with a folder and a number of layers: writes a run of one wide model there, expert
by expert. Then it limits its own memory, exports and imports the run, and prints bytes of the weights, the limit, and
the growth of its largest resident set, in which the pages of mapped files count.
"""

import json
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.convert_memory import write_run
from megamoe.convert.from_hf import from_hf
from megamoe.convert.to_hf import to_hf
from megamoe.plan.json import write_plan
from tests.mcore import tiny

MODEL = replace(
    tiny.GROUPED,
    hidden_dim=512,
    experts=replace(tiny.GROUPED.experts, num_routed=32, ffn_dim=512),
    mtp=None,
)
LIMIT_BYTES = 100_000_000  # beyond what the process has when it begins to convert


def _status_bytes(key: str) -> int:
    """Return a size of /proc/self/status; getrusage's peak begins at that of the parent."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, key
    return int(found[1]) * 1024


def _limit_memory() -> None:
    """Have the system refuse more than so many bytes of memory that is written to."""
    most = _status_bytes("VmData") + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _is_refused(num_bytes: int) -> bool:
    try:
        torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        return "can't allocate memory" in str(error)
    return False


def main() -> None:
    """Convert there and back."""
    root, model = Path(sys.argv[1]), replace(MODEL, num_layers=int(sys.argv[2]))
    torch.set_num_threads(1)  # stacks of threads count as memory
    (root / "again").mkdir()
    write_plan(root / "again/plan.json", tiny.tiny_plan(root / "data", model))
    total = write_run(root / "run", root / "again/plan.json")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_bytes("VmHWM")
    _limit_memory()
    to_hf(root / "run", root / "out", dtype=None, shard_bytes=8_000_000, say=lambda _: None)
    from_hf(root / "out", root / "again", tokens_seen=0, say=lambda _: None)
    grown = _status_bytes("VmHWM") - before
    # last: an allocation that fails leaves the allocator with a heap it may not have needed
    refused = _is_refused(total)
    result = {"weights": total, "limit": LIMIT_BYTES, "grown": grown, "whole_is_refused": refused}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
