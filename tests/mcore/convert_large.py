"""Converts a checkpoint, of more bytes than the memory it is given; says how much it took.

Run as a program with a folder, numbers of layers, of experts and their width, and of words, and a limit
in bytes or 0: writes a run of such a model there, expert by expert. Then it limits its own memory, exports
and imports the run, and with one more word, `rounded`, exports it in bfloat16 too. Prints bytes of the
weights, their number in the folder, and for each way the largest resident set, in which pages of mapped
files count, its growth, and what was said to be the most.
"""

import json
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.convert_memory import write_run
from megamoe.convert.from_hf import from_hf
from megamoe.convert.to_hf import to_hf
from megamoe.plan.json import write_plan
from megamoe.recipe import Model
from tests.mcore import tiny

WIDTH = 512
SHARD_BYTES = 8_000_000


def model_of(num_layers: int, num_experts: int, expert_width: int, num_words: int) -> Model:
    """Return a model without multi-token prediction, its first layer dense."""
    experts = replace(tiny.GROUPED.experts, num_routed=num_experts, ffn_dim=expert_width)
    return replace(
        tiny.GROUPED,
        num_layers=num_layers,
        hidden_dim=WIDTH,
        vocab_size=num_words,
        experts=experts,
        mtp=None,
    )


def _status_bytes(key: str) -> int:
    """Return a size of /proc/self/status; getrusage's peak begins at that of the parent."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, key
    return int(found[1]) * 1024


def _limit_memory(limit_bytes: int) -> None:
    """Have the system refuse more than so many bytes of memory that is written to."""
    most = _status_bytes("VmData") + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _is_refused(num_bytes: int) -> bool:
    try:
        torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        return "can't allocate memory" in str(error)
    return False


def _measured(convert: Callable[[Callable[[str], None]], object], before: int) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    said: list[str] = []
    convert(said.append)
    peak = _status_bytes("VmHWM")
    [most] = [found for line in said if (found := re.match(r"needs at most ([\d.]+) GB", line))]
    return {"peak": peak, "grown": peak - before, "said": float(most[1]) * 1e9}


def main() -> None:
    """Convert there and back."""
    root, numbers, limit = Path(sys.argv[1]), map(int, sys.argv[2:6]), int(sys.argv[6])
    torch.set_num_threads(1)  # stacks of threads count as memory
    (root / "again").mkdir()
    write_plan(root / "again/plan.json", tiny.tiny_plan(root / "data", model_of(*numbers)))
    total = write_run(root / "run", root / "again/plan.json")
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmHWM")
    if limit:
        _limit_memory(limit)
    run, out = root / "run", root / "out"
    measured = {
        "export": _measured(
            lambda say: to_hf(run, out, dtype=None, shard_bytes=SHARD_BYTES, say=say), before
        ),
        "import": _measured(
            lambda say: from_hf(out, root / "again", tokens_seen=0, say=say), before
        ),
    }
    if "rounded" in sys.argv:
        measured["rounded"] = _measured(
            lambda say: to_hf(
                run, root / "rounded", dtype="bfloat16", shard_bytes=SHARD_BYTES, say=say
            ),
            before,
        )
    # last: an allocation that fails leaves the allocator with a heap it may not have needed
    refused = _is_refused(total) if limit else None
    index = json.loads((out / "model.safetensors.index.json").read_text())
    result = {"weights": total, "tensors": len(index["weight_map"]), "whole_is_refused": refused}
    sys.stdout.write(json.dumps({**result, **measured}))


if __name__ == "__main__":
    main()
