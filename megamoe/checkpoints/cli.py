"""`megamoe checkpoint`: are the files of a checkpoint what was written, and what is in them."""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

from megamoe.checkpoints.folder import all_checkpoints, latest, read_progress, verify
from megamoe.checkpoints.manifest import read_manifest
from megamoe.errors import CheckpointError

_EXIT_DAMAGED = 1
_EPILOG = """examples:
  megamoe checkpoint verify runs/tiny
  megamoe checkpoint inspect runs/tiny
  megamoe checkpoint inspect runs/tiny/checkpoints/000000000564224 --tensors
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
    folder = args.path / "checkpoints"
    checkpoint = latest(folder) if folder.is_dir() else _one(args.path)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: holds no checkpoint yet")
    progress = read_progress(checkpoint)
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
    _say_tensors(checkpoint, every=args.tensors)
    return 0


def _say_tensors(checkpoint: Path, *, every: bool) -> None:
    tensors = json.loads((checkpoint / "tensors.json").read_bytes())
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, (dtype, shape) in tensors.items():
        groups[_kind(name), dtype].append(math.prod(shape))
    _say(f"tensors      {len(tensors):,}")
    for (kind, dtype), sizes in sorted(groups.items()):
        _say(f"             {sum(sizes):>18,}  {kind}, {dtype}, {len(sizes):,} tensors")
    for name, (dtype, shape) in sorted(tensors.items()) if every else ():
        _say(f"             {name}  {dtype} {shape}")


def _kind(name: str) -> str:
    """Return what a tensor is, as its name says: 'weights', 'optimizer exp_avg', ..."""
    _, of_optimizer, rest = name.partition("optimizer.state.")
    if of_optimizer:
        return f"optimizer {rest.partition('.')[0]}"
    return "random state" if name.startswith("random.") else "weights"


def _one(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: is neither a run folder nor a checkpoint")
    return path


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
