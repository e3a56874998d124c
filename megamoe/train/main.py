"""The life of one rank: join, build, train one segment, leave.

Started once a rank by `megamoe run`, torchrun or a cluster's launcher, with the environment that
torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

import argparse
import gc
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from megamoe.errors import PlanError, TrainingError
from megamoe.plan.json import read_plan
from megamoe.plan.plan import Plan, Segment

_EPILOG = """example (two ranks on this machine, as `megamoe run` does it):
  torchrun --nproc-per-node 2 -m megamoe train runs/mine --segment 0
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe train`."""
    from megamoe.train.hooks import add_recording_arguments

    parser.epilog = _EPILOG
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder with a plan.json")
    parser.add_argument("--segment", type=int, required=True, metavar="N", help="index, from 0")
    add_recording_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train one segment on this rank; 0 when its last checkpoint is durable."""
    plan = read_plan(args.run_dir / "plan.json")
    if not 0 <= args.segment < len(plan.segments):
        raise PlanError(
            f"{args.run_dir}: has no segment {args.segment}; give 0 to {len(plan.segments) - 1}"
        )
    if "RANK" not in os.environ:
        raise TrainingError(
            "RANK is not set: `megamoe train` is one rank of many; use `megamoe run`, or "
            "torchrun -m megamoe train RUN --segment N"
        )
    _train(args, plan, plan.segments[args.segment])
    return 0


def _train(args: argparse.Namespace, plan: Plan, segment: Segment) -> None:
    if plan.deterministic and plan.cluster.device == "cuda":
        # Read when CUDA starts; without it torch refuses matrix products in a deterministic run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from megamoe.mcore import cpu, groups

    cpu.enable()
    from megamoe.mcore.engine import Engine
    from megamoe.mcore.sharing import describe
    from megamoe.train.hooks import (
        make_hooks,
        open_recorders,
        recording_from_args,
        recording_the_last_save,
    )
    from megamoe.train.loop import train

    groups.start(plan, segment)
    try:
        engine = Engine(plan, segment, args.run_dir)
        gc.freeze()  # all that lives as long as this process: a save collects garbage twice
        is_first = int(os.environ["RANK"]) == 0
        recording = recording_from_args(args)
        if is_first:
            lines = (*describe(plan, segment, groups.context_sharing()), *engine.notes)
            sys.stdout.writelines(f"{line}\n" for line in lines)
        with ExitStack() as stack:
            recorders = (
                stack.enter_context(
                    open_recorders(args.run_dir, plan, segment, engine.step, recording)
                )
                if is_first
                else []
            )
            stack.enter_context(recording_the_last_save(engine, recorders))
            train(engine, make_hooks(segment, recorders))
    finally:
        groups.stop()
