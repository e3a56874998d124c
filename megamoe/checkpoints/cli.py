"""`megamoe checkpoint`: are files what was written, what is in them, how two differ, their mean.

Merging and comparing need torch: megamoe/convert holds both, and is imported when they are asked for.
"""

import argparse
import importlib
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from megamoe.checkpoints.folder import all_checkpoints, latest, read_file, read_progress, verify
from megamoe.checkpoints.manifest import MANIFEST, read_manifest
from megamoe.checkpoints.refused import one_line
from megamoe.checkpoints.tensors import kind_of
from megamoe.errors import CheckpointError
from megamoe.packages import require_packages

_EXIT_DAMAGED = 1
_EXIT_DIFFERENT = 1
_EPILOG = """examples:
  megamoe checkpoint verify runs/tiny
  megamoe checkpoint inspect runs/tiny
  megamoe checkpoint inspect runs/tiny/checkpoints/000000000564224 --tensors
  megamoe checkpoint diff runs/a runs/b
  megamoe checkpoint merge runs/a runs/b --weights 0.5,0.5
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `megamoe checkpoint`."""
    parser.epilog = _EPILOG
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    checking = commands.add_parser(
        "verify",
        help="read every file and compare it with the manifest",
        description="Read every file and compare it with the manifest; exit 1 if one is damaged.",
        epilog="example:\n  megamoe checkpoint verify runs/tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checking.add_argument("path", type=Path, metavar="RUN", help="a run folder, or one checkpoint")
    checking.set_defaults(run=run_verify)
    showing = commands.add_parser(
        "inspect",
        help="say where a checkpoint stands and what is in it",
        description="Say where a checkpoint stands and what is in it.",
        epilog="example:\n  megamoe checkpoint inspect runs/tiny --tensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    showing.add_argument(
        "path", type=Path, metavar="RUN", help="a run folder (its latest), or one checkpoint"
    )
    showing.add_argument("--tensors", action="store_true", help="name every tensor")
    showing.set_defaults(run=run_inspect)
    comparing = commands.add_parser(
        "diff",
        help="compare the tensors of two checkpoints",
        description="Compare the tensors of two checkpoints; exit 1 if they differ.",
        epilog="example:\n  megamoe checkpoint diff runs/a runs/b",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("a", "b"):
        comparing.add_argument(
            name, type=Path, metavar=name.upper(), help="a run folder (its latest), or a checkpoint"
        )
    comparing.add_argument("--tensors", action="store_true", help="name every tensor that differs")
    comparing.set_defaults(run=run_diff)
    merging = commands.add_parser(
        "merge",
        help="write the weighted mean of checkpoints of one model",
        description="Write the weighted mean of checkpoints of one model as the first checkpoint of a new run, "
        "which has the plan of the first and stands where it stands. Weights alone: a run that goes on "
        "from it begins the optimizer's moments at zero.",
        epilog="example:\n  megamoe checkpoint merge runs/a runs/b --weights 0.5,0.5 --out runs/merged",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merging.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folders (their latest), or checkpoints",
    )
    merging.add_argument(
        "--weights", metavar="W,W", help="of each, which sum to 1; default: the same for all"
    )
    merging.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="the run to make; default: that of the first, with -merged",
    )
    merging.set_defaults(run=run_merge)


def run_verify(args: argparse.Namespace) -> int:
    """Verify one checkpoint, or all of a run and what `latest` names; 1 if something is damaged."""
    folder = args.path / "checkpoints"
    status = 0
    if folder.is_dir():
        found = all_checkpoints(folder)
        if not found:
            raise CheckpointError(f"{folder}: holds no checkpoint yet")
    else:
        found = [_one(args.path)]
    for checkpoint in found:
        started = time.perf_counter()
        try:
            entries = verify(checkpoint)
        except CheckpointError as error:
            status = _EXIT_DAMAGED
            _say(f"{checkpoint.name}  DAMAGED  {error}")
            continue
        size = sum(entry.num_bytes for entry in entries)
        seconds = time.perf_counter() - started
        _say(f"{checkpoint.name}  sound    {len(entries)} files, {size:,} bytes, {seconds:.2f} s")
    if folder.is_dir():
        try:
            newest = latest(folder)
        except CheckpointError as error:
            status = _EXIT_DAMAGED
            _say(f"latest           DAMAGED  {error}")
        else:
            _say(f"latest           {'names ' + newest.name if newest else 'names none yet'}")
    return status


def run_inspect(args: argparse.Namespace) -> int:
    """Print where a checkpoint stands, its files and its tensors."""
    checkpoint = _checkpoint(args.path)
    progress = read_progress(checkpoint)
    tensors = json.loads(read_file(checkpoint, "tensors.json"))
    entries = read_manifest(checkpoint)
    ranks = {entry.rank for entry in entries}
    state = "done" if progress.segment_done else "not done"
    _say(f"checkpoint   {checkpoint}")
    _say(f"plan         {progress.plan_digest[:12]}")
    _say(f"segment      {progress.segment}, {state}; step {progress.step:,} of the run")
    _say(f"tokens seen  {progress.tokens_seen:,}")
    for stage, source, tokens in progress.ledger:
        _say(f"             {tokens:>18,}  {stage}: {source}")
    _say(
        f"files        {len(entries)} from {len(ranks)} ranks, "
        f"{sum(entry.num_bytes for entry in entries):,} bytes"
    )
    for entry in entries:
        _say(
            f"             {entry.num_bytes:>18,}  {entry.name}  {entry.sha256[:16]}  rank {entry.rank}"
        )
    _say_tensors(tensors, every=args.tensors)
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Print how two checkpoints differ; 1 if they do."""
    diff, stored = _import("megamoe.convert.diff"), _import("megamoe.mcore.stored")
    a, b = _checkpoint(args.a), _checkpoint(args.b)
    _say(f"A  {a}\nB  {b}")
    found = list(diff.differences(stored.TensorReader(a), stored.TensorReader(b)))
    for line in diff.table(found, every=args.tensors):
        _say(line)
    return 0 if all(difference.is_equal for difference in found) else _EXIT_DIFFERENT


def run_merge(args: argparse.Namespace) -> int:
    """Write the mean of checkpoints; 0 then."""
    shares = _shares(args.weights, len(args.paths))
    merge = _import("megamoe.convert.merge").merge
    with one_line(args.out or args.paths[0]):
        checkpoint = merge(
            args.paths, args.out, shares, say=lambda line: sys.stderr.write(line + "\n")
        )
    _say(str(checkpoint))
    return 0


def _shares(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise CheckpointError(
            f"--weights {text!r} are no numbers; give for example 0.5,0.5"
        ) from error


def _import(module: str) -> Any:  # noqa: ANN401  (a module)
    require_packages("train", "torch", "numpy")
    return importlib.import_module(module)


def _say_tensors(tensors: dict[str, tuple[str, list[int]]], *, every: bool) -> None:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, (dtype, shape) in tensors.items():
        groups[kind_of(name), dtype].append(math.prod(shape))
    _say(f"tensors      {len(tensors):,}")
    for (kind, dtype), sizes in sorted(groups.items()):
        _say(f"             {sum(sizes):>18,}  {kind}, {dtype}, {len(sizes):,} tensors")
    for name, (dtype, shape) in sorted(tensors.items()) if every else ():
        _say(f"             {name}  {dtype} {shape}")


def _checkpoint(path: Path) -> Path:
    """Return the latest checkpoint of a run folder, or the one that is given."""
    folder = path / "checkpoints"
    checkpoint = latest(folder) if folder.is_dir() else _one(path)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: holds no checkpoint yet")
    return checkpoint


def _one(path: Path) -> Path:
    # One without a manifest is damaged if its name says that it is one, `<tokens>.damaged` too.
    has_name = path.resolve().name.partition(".")[0].isdigit()
    if not path.is_dir() or not ((path / MANIFEST).exists() or has_name):
        raise CheckpointError(f"{path}: is neither a run folder nor a checkpoint")
    return path


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
