"""`megamoe convert`: checkpoints to and from Hugging Face folders."""

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from megamoe.checkpoints.refused import one_line
from megamoe.errors import CheckpointError
from megamoe.packages import require_packages

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EPILOG = """examples:
  megamoe convert to-hf runs/tiny out/tiny
  megamoe convert to-hf runs/tiny/checkpoints/000000000564224 out/tiny --dtype bfloat16
  megamoe convert from-hf models/K-EXAONE-236B-A23B runs/continued
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `megamoe convert`."""
    parser.epilog = _EPILOG
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    writing = commands.add_parser(
        "to-hf",
        help="write a Hugging Face folder from a checkpoint",
        description="Write a Hugging Face folder from a checkpoint.",
        epilog="example:\n  megamoe convert to-hf runs/tiny out/tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    writing.add_argument(
        "path", type=Path, metavar="RUN", help="a run folder (its latest), or one checkpoint"
    )
    writing.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    writing.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as trained")
    writing.add_argument("--shard-size", default="2GB", metavar="SIZE", help="default: 2GB")
    writing.set_defaults(run=run_to_hf)
    reading = commands.add_parser(
        "from-hf",
        help="write a first checkpoint of a run from a Hugging Face folder",
        description="Write a first checkpoint of a run from a Hugging Face folder: weights alone.",
        epilog="example:\n  megamoe convert from-hf models/K-EXAONE-236B-A23B runs/continued",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reading.add_argument("folder", type=Path, metavar="DIR", help="config.json and *.safetensors")
    reading.add_argument(
        "run_dir", type=Path, metavar="RUN", help="a folder with plan.json and no checkpoint"
    )
    reading.add_argument(
        "--tokens-seen", type=int, default=0, metavar="N", help="where the run begins (default 0)"
    )
    reading.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of config.json that is wrong: the plan overrules it; for each key once more",
    )
    reading.set_defaults(run=run_from_hf)


def run_to_hf(args: argparse.Namespace) -> int:
    """Write a Hugging Face folder; 0 then."""
    shard_bytes = _num_bytes(args.shard_size)
    to_hf = _import("megamoe.convert.to_hf").to_hf
    with one_line(args.out):
        to_hf(args.path, args.out, dtype=args.dtype, shard_bytes=shard_bytes, say=_say)
    sys.stdout.write(f"{args.out}\n")
    return 0


def run_from_hf(args: argparse.Namespace) -> int:
    """Write the first checkpoint of a run; 0 then."""
    from_hf = _import("megamoe.convert.from_hf").from_hf
    with one_line(args.run_dir):
        checkpoint = from_hf(
            args.folder,
            args.run_dir,
            tokens_seen=args.tokens_seen,
            say=_say,
            ignored=args.ignore_config,
        )
    sys.stdout.write(f"{checkpoint}\n")
    return 0


def _import(module: str) -> Any:  # noqa: ANN401  (a module)
    """Import what needs torch and safetensors."""
    require_packages("convert", "torch", "numpy", "safetensors")
    return importlib.import_module(module)


def _num_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.strip().upper())
    if not found or not int(found[1]):
        raise CheckpointError(f"--shard-size {text!r} is no size; give for example 2GB or 512MiB")
    return int(found[1]) * _UNITS[found[2] or ""]


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
