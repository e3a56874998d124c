"""Real text for gpu_check.py: tokenised by `make data` if it is there, else bytes as tokens."""

import io
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy
from numpy.typing import NDArray

from benchmarks.megamoe_step import with_text, write
from benchmarks.record import ROOT
from megamoe.plan.plan import Plan, Shard

TOKENISED = ROOT / "data" / "sample"
PACKAGED = ROOT / "data_prep" / "sample"
FIRST_BYTE = 2  # 0 ends a document, 1 pads
MAX_TOKENS = 2_000_000  # of a source: more than the timed steps read


def sample_text(plan: Plan, folder: Path) -> tuple[Plan | None, str]:
    """Return the plan with sample text, and what that is; None and why where there is none."""
    manifest = TOKENISED / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text(encoding="utf-8"))
        shards = {
            name: Shard(prefix=s["prefix"], tokens=s["tokens"], sha256_idx=s["sha256_idx"])
            for name, s in ((name, forms["train"]) for name, forms in content["sources"].items())
        }
        vocab_size = content["tokenizer"]["vocab_size"]
        return with_text(plan, TOKENISED, shards, vocab_size), f"data/sample, {vocab_size} tokens"
    if find_spec("zstandard") is None:
        return None, "no data/sample (make data), and no zstandard to read the packaged text"
    shards = {
        path.name.split(".")[0]: write(folder, path.name.split(".")[0], _documents(path), 512)
        for path in sorted(PACKAGED.glob("*.jsonl.zst"))
    }
    if not shards:
        return None, "no data/sample (make data), and no packaged text"
    return with_text(plan, folder, shards, 512), "packaged sample, bytes as tokens"


def _documents(path: Path) -> Iterator[NDArray[numpy.integer]]:
    """Yield documents as bytes, until there are enough."""
    import zstandard

    total = 0
    with path.open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        for line in lines:
            raw = numpy.frombuffer(json.loads(line)["text"].encode(), dtype=numpy.uint8)
            yield numpy.append(raw.astype(numpy.int64) + FIRST_BYTE, 0)
            total += len(raw) + 1
            if total > MAX_TOKENS:
                return
