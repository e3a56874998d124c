"""`megamoe run`: plan a recipe for this machine and train it here, or continue a run folder."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from launch.local import LocalJob, run_job, train_command
from launch.lock import hold_lock
from launch.run_dir import RunDir, open_run_dir, record_event, settle_run_dir
from launch.supervise import read_progress, say, supervise
from megamoe.checkpoints.folder import fall_back, latest
from megamoe.checkpoints.refused import one_line
from megamoe.errors import DataError, LaunchError, PlanError
from megamoe.plan.build import build_plan
from megamoe.plan.cli import (
    KEEP_CHECKPOINTS,
    add_option_arguments,
    local_cluster,
    options_from_args,
    plan_table,
)
from megamoe.plan.layout import settle_dp
from megamoe.plan.plan import Plan
from megamoe.plan.trainable import check_trainable
from megamoe.recipe.cli import add_recipe_arguments, recipe_from_args
from megamoe.recipe.recipe import Recipe
from megamoe.report.write import write_report

SAMPLE_DATA = Path("data/sample")
CommandOf = Callable[[int], tuple[str, ...]]
_MAX_DEFAULT_RANKS = 4
_EPILOG = """examples:
  megamoe run vaetki_7b_a1b --scale tiny --nproc 2
  megamoe run vaetki_7b_a1b --scale tiny --data data/mine --set general.lr.peak=1e-3
  megamoe run runs/vaetki_7b_a1b-tiny-20261122-101500        (continue it)
  megamoe run runs/vaetki_7b_a1b-tiny-20261122-101500 --fallback
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe run`."""
    parser.epilog = _EPILOG
    add_recipe_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="processes, one a rank")
    add_option_arguments(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/RECIPE-TIME")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline"),
        metavar="MODE",
        help="also log to Weights & Biases",
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="of a run folder: go on from the newest checkpoint that is not damaged",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan or open, then train to the end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as Ctrl-C does
    with one_line(Path(args.recipe), "give a recipe, or a run folder that can be read"):
        is_run = (Path(args.recipe) / "plan.json").is_file()
    if is_run:
        return _continue(Path(args.recipe), args)
    if args.fallback:
        raise LaunchError(f"--fallback continues a run, and {args.recipe} is no run folder")
    recipe = recipe_from_args(args).recipe
    args.data = args.data or _sample_data()
    options = options_from_args(args)
    num_ranks = args.nproc if args.nproc is not None else _num_ranks(recipe, args.device)
    plan = build_plan(recipe, local_cluster(num_ranks, args.device), options)
    check_trainable(plan)
    asked = tuple(stage.tokens for stage in recipe.stages)
    sys.stdout.write(plan_table(plan, asked) + "\n")
    path = args.run_dir or _new_path(plan)
    return train_here(path, plan, {"tokens_asked": asked}, _command_of(path, args))


def train_here(
    path: Path,
    plan: Plan,
    facts: Mapping[str, object],
    command_of: CommandOf,
    *,
    fallback: bool = False,
) -> int:
    """Train a plan in a run folder on this machine, from where it stands to its end; 0 then.

    Args:
        path: the run folder, new or with the same plan.
        plan: what to train.
        facts: kept in the first event of a new folder.
        command_of: the command of a rank, by index of the segment.
        fallback: go on from the newest checkpoint whose files are all sound.

    Raises:
        MegamoeError: the folder is in use, holds another plan or cannot be written, or a rank failed.
    """
    if plan.cluster.num_nodes > 1:
        raise LaunchError(
            f"{path}: is planned for {plan.cluster.num_nodes} nodes of {plan.cluster.name!r}; "
            "`megamoe run` trains on this machine only"
        )
    with one_line(path, "mend that and give the command again, or give another --run-dir"):
        return _train(path, plan, facts, command_of, fallback=fallback)


def _train(
    path: Path,
    plan: Plan,
    facts: Mapping[str, object],
    command_of: CommandOf,
    *,
    fallback: bool,
) -> int:
    path.mkdir(parents=True, exist_ok=True)
    with hold_lock(path) as lock:
        run_dir = settle_run_dir(path, plan, facts)
        record_event(path, "launched", {"pid": os.getpid(), "command": sys.argv})
        if fallback:
            _fall_back(run_dir)
        say(
            f"{'continues' if read_progress(run_dir) else 'starts'} in {path}; logs in {run_dir.logs}"
        )

        def run_segment(index: int) -> None:
            segment = plan.segments[index]
            job = LocalJob(
                name=f"{plan.recipe}/{segment.stage}",
                segment=index,
                num_ranks=segment.world_size,
                command=command_of(index),
                logs=run_dir.logs,
            )
            run_job(job, lock)

        try:
            supervise(run_dir, run_segment)
        except (KeyboardInterrupt, LaunchError):
            say(f"not finished; continue with `megamoe run {path}`")
            raise
        checkpoint = latest(run_dir.checkpoints)
    assert checkpoint is not None, path
    for name, file in (("checkpoint", checkpoint), *write_report(path)):
        say(f"{name:<10}  {file}")
    return 0


def _continue(path: Path, args: argparse.Namespace) -> int:
    planned = {
        "--scale": args.scale,
        "--set": args.overrides,
        "--nproc": args.nproc,
        "--device": args.device != "cpu",
        "--data": args.data,
        "--seed": args.seed,
        "--checkpoint-every": args.checkpoint_every,
        "--eval-every": args.eval_every,
        "--eval-tokens": args.eval_tokens,
        "--keep-checkpoints": args.keep_checkpoints != KEEP_CHECKPOINTS,
        "--nondeterministic": args.nondeterministic,
        "--run-dir": args.run_dir,
    }
    if refused := [name for name, value in planned.items() if value]:
        raise LaunchError(
            f"{path}: is a run folder, and its plan.json settles {', '.join(refused)}; "
            "leave that out, or give the recipe to start another run"
        )
    command_of = _command_of(path, args)
    return train_here(path, open_run_dir(path).plan, {}, command_of, fallback=args.fallback)


def _fall_back(run_dir: RunDir) -> None:
    """Read all of the latest checkpoint and, where it is damaged, go back to one that is not."""
    say("reads the checkpoint and compares it with its manifest")
    checkpoint, problems = fall_back(run_dir.checkpoints)
    for problem in problems:
        say(f"set aside: {problem}")
    if checkpoint is not None:
        say(f"sound: {checkpoint}")
    if problems:
        facts = {"checkpoint": checkpoint.name if checkpoint else None, "problems": problems}
        record_event(run_dir.path, "fell_back", facts)


def _command_of(path: Path, args: argparse.Namespace) -> CommandOf:
    tensorboard = ["--tensorboard"] if args.tensorboard else []
    wandb = ["--wandb", args.wandb] if args.wandb else []
    return lambda index: train_command(path, index, [*tensorboard, *wandb])


def _sample_data() -> str:
    if (SAMPLE_DATA / "manifest.json").is_file():
        return str(SAMPLE_DATA)
    raise DataError(
        f"no data is named and {SAMPLE_DATA} has no manifest.json; make one with `make train`, or "
        "`megamoe data tokenizer train` and `megamoe data tokenize`, and give --data DIR"
    )


def _num_ranks(recipe: Recipe, device: str) -> int:
    """Return the most processes, up to the cores and a few, that every stage's layout fits."""
    if device == "cuda":
        raise LaunchError("--device cuda: say how many GPUs to use; give --nproc N")
    for count in range(min(_MAX_DEFAULT_RANKS, os.cpu_count() or 1), 0, -1):
        try:
            for stage in recipe.stages:
                settle_dp(recipe, stage, local_cluster(count, "cpu"))
        except PlanError:
            continue
        return count
    return 1  # fits no better than any other: planning for it says why


def _new_path(plan: Plan) -> Path:
    scale = f"-{plan.scale}" if plan.scale else ""
    return Path("runs") / f"{plan.recipe}{scale}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
