"""A weighted mean of checkpoints of one model becomes the first checkpoint of a new run.

Published models merge so before their last stage or between stages (VAETKI report; A.X K1 report).
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

import megamoe
from megamoe.checkpoints.folder import name_of
from megamoe.checkpoints.manifest import MANIFEST, file_sha256
from megamoe.checkpoints.place import PLAN, Place, find_checkpoint
from megamoe.convert import audit
from megamoe.convert.ours import EXPERTS, our_tensors, share_tensors
from megamoe.convert.weights import weight_sources
from megamoe.convert.weights_only import new_checkpoint
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import TensorReader
from megamoe.plan.json import write_plan

Say = Callable[[str], None]
NOTE = "merged.json"
_SUM_ERROR = 1e-6  # of shares as people write them: 0.3333333


def merge(paths: Sequence[Path], out: Path | None, shares: Sequence[float], *, say: Say) -> Path:
    """Write the weighted mean of checkpoints and return the folder of the new checkpoint.

    The new run has the plan of the first, and stands where the first stands. Means are taken in
    float32, of the optimizer's float32 weights where there are any; what is written has the dtype
    of the first. Of the optimizer nothing is kept.

    Args:
        paths: run folders (of each its latest checkpoint is taken) or checkpoints, two or more.
        out: the run folder to make; None: beside the first run, with its name and `-merged`.
        shares: of each; they sum to 1.
        say: takes lines on what happens.

    Raises:
        CheckpointError: shares do not sum to 1; the checkpoints are of different models; one is
            damaged; the mean of a tensor is not finite.
    """
    _check_shares(paths, shares)
    places = [find_checkpoint(path) for path in paths]
    for place in places[1:]:
        _check_same_model(places[0], place)
    out = out or _beside(places[0])
    if out.exists():
        raise CheckpointError(f"{out}: exists already; give another folder (--out), or remove it")
    sources = []
    for place, share in zip(places, shares, strict=True):
        say(f"{share:g} of {place.checkpoint}")
        sources.append(_Source(place, share))
    first = places[0]
    try:
        _write(out, places, sources)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # it was not there before
        raise
    return out / "checkpoints" / name_of(first.progress.tokens_seen)


class _Source:
    """A verified checkpoint and its share."""

    def __init__(self, place: Place, share: float) -> None:
        self.reader = TensorReader(place.checkpoint)
        self.names = weight_sources(place, self.reader, exact=True)
        self.share = share


def _write(out: Path, places: list[Place], sources: list[_Source]) -> None:
    """Write the mean as the first checkpoint of a run that stands where the first stands."""
    first = places[0]
    with new_checkpoint(out, first.progress) as new:
        pairs = []
        for name, shape in our_tensors(first.plan.model).items():
            count = shape[0] if EXPERTS in name else None
            for expert in range(count or 1):
                index = None if count is None else (expert, count)
                mean = _mean(sources, name, None if count is None else expert)
                audit.check_finite(str(out), name, mean)
                mean = mean.to(sources[0].reader.tensors[name].dtype)
                new.tensors.write(name, mean, index)
                pairs.append(audit.record(name, mean, None if count is None else expert))
        for name, shape in share_tensors(first.plan.model).items():
            new.tensors.write(name, torch.full(shape, 1 / shape[0]))  # even, as a router begins
        new.notes[NOTE] = _note(places, [source.share for source in sources], pairs).encode()
        write_plan(out / PLAN, first.plan)


def _beside(first: Place) -> Path:
    run = first.checkpoint.resolve().parent.parent
    return run.with_name(f"{run.name}-merged")


def _mean(sources: list[_Source], name: str, expert: int | None) -> Tensor:
    total: Tensor | None = None
    for source in sources:
        weight = source.reader.read(source.names[name], expert).to(torch.float32)
        if total is None:
            total = weight * source.share
        else:
            total.add_(weight, alpha=source.share)
    assert total is not None, name
    return total


def _check_shares(paths: Sequence[Path], shares: Sequence[float]) -> None:
    if len(paths) < 2:
        raise CheckpointError("a merge takes two checkpoints or more")
    if len(shares) != len(paths):
        raise CheckpointError(
            f"--weights has {len(shares)} numbers for {len(paths)} checkpoints; give one for each"
        )
    total = math.fsum(shares)
    if not (math.isfinite(total) and abs(total - 1) <= _SUM_ERROR):
        raise CheckpointError(f"--weights sum to {total:g}; give numbers that sum to 1")


def _check_same_model(first: Place, other: Place) -> None:
    ours, theirs = first.plan.model, other.plan.model
    names = (field.name for field in fields(ours))
    for name in names:
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            raise CheckpointError(
                f"{other.checkpoint}: is of another model than {first.checkpoint}: {name} is {b}, not {a}"
            )


def _note(places: list[Place], shares: Sequence[float], tensors: list[audit.Record]) -> str:
    """Return what was merged, with the hashes by which it can be found again."""
    content = {
        "megamoe": megamoe.__version__,
        "sources": [
            {
                "checkpoint": str(place.checkpoint.resolve()),
                "manifest_sha256": file_sha256(place.checkpoint / MANIFEST),
                "weight": share,
            }
            for place, share in zip(places, shares, strict=True)
        ],
        "tensors": [
            {"name": tensor.name, "index": tensor.index, "sha256": tensor.sha256}
            for tensor in tensors
        ],
    }
    return json.dumps(content, indent=1) + "\n"
