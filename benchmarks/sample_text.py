"""Real text for gpu_check.py: tokenised by `make data` if that was run, else bytes as tokens."""

import io
import json
from collections.abc import Iterable, Iterator
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
VOCAB_SIZE = 512
MAX_TOKENS = 2_000_000  # of a source: more than the timed steps read


def sample_text(plan: Plan, folder: Path) -> tuple[Plan, str]:
    """Return the plan with sample text, and what that is."""
    manifest = TOKENISED / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text(encoding="utf-8"))
        shards = {
            name: Shard(prefix=s["prefix"], tokens=s["tokens"], sha256_idx=s["sha256_idx"])
            for name, s in ((name, forms["train"]) for name, forms in content["sources"].items())
        }
        vocab_size = content["tokenizer"]["vocab_size"]
        return with_text(plan, TOKENISED, shards, vocab_size), f"data/sample, {vocab_size} tokens"
    if find_spec("zstandard") is not None:
        packaged = {
            path.name.split(".")[0]: _packaged(path) for path in PACKAGED.glob("*.jsonl.zst")
        }
        what = "packaged sample, bytes as tokens"
    else:
        files = (path for kind in ("py", "md") for path in ROOT.glob(f"*/**/*.{kind}"))
        packaged = {"repository": (path.read_bytes() for path in sorted(files))}
        what = "no data/sample, and no zstandard for the packaged one: this repository's own code and pages, bytes as tokens"
    shards = {
        name: write(folder, name, _tokens(documents), VOCAB_SIZE)
        for name, documents in sorted(packaged.items())
    }
    return with_text(plan, folder, shards, VOCAB_SIZE), what


def _packaged(path: Path) -> Iterator[bytes]:
    """Yield the documents of a file of JSON lines."""
    import zstandard

    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)["text"].encode()


def _tokens(documents: Iterable[bytes]) -> Iterator[NDArray[numpy.integer]]:
    """Yield documents with their bytes as tokens, until there are enough."""
    total = 0
    for document in documents:
        raw = numpy.frombuffer(document, dtype=numpy.uint8)
        yield numpy.append(raw.astype(numpy.int64) + FIRST_BYTE, 0)
        total += len(raw) + 1
        if total > MAX_TOKENS:
            return
