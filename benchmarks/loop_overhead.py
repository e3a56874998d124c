"""What our training step costs over a bare loop on Megatron-core: same model, batches, optimizer.

    OMP_NUM_THREADS=1 python -m benchmarks.loop_overhead -o benchmarks/results/loop_overhead.json

Ours is `Engine.train_step` and the hooks of `megamoe train`: learning rate, measures over all
ranks, checks, metrics.jsonl, progress (lines into a file), and a save, hashed while it is written,
as often as the plan says. Bare is the least that computes the same losses: schedule,
optimizer, and telling the routers that the batch is over, without which the next loss is another.

Two like models train in one process, in step; of each step one takes ours and the other the bare
one, by turns, so neither the machine's other work nor where a model's memory lies favours one.
The losses of each step must be equal to the last bit. All steps have the size of the recipe's
first. A step that saves lasts until the checkpoint is written, so that its writer does not slow the
bare step in the same process; a run would train on meanwhile. The bound is on the ratio of medians,
which does not see a save every N steps; the ratio of means does. What a save stops a run for, and
an evaluation, are also measured by themselves, as shares of the time at the plan's own intervals.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch

from benchmarks.loops import Loop, Steps, run_both, timed, timed_measure
from megamoe.commit import running_commit
from megamoe.doctor.machine import this_machine
from megamoe.errors import MegamoeError
from megamoe.mcore import groups
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cli import local_cluster
from megamoe.plan.params import count_params
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe.load import load_recipe, override_recipe
from megamoe.recipe.scale import scale_tiny
from megamoe.step import StepResult
from megamoe.train.console import BarConsole
from megamoe.train.hooks import Recording, is_due, open_recorders

TARGET = 1.03
_RESAMPLES = 2_000
_INTERVAL = (0.025, 0.975)
_WARM_UP = 10  # steps
_SAVES = 3  # in timed steps, unless --steps says otherwise; and again by themselves
_HOW = (
    "ours: measures, metrics.jsonl, progress as lines into a file, and every checkpoint_every "
    "steps a save, hashed while it is written",
    "a step of ours that saves lasts until the checkpoint is the latest: the bare step shares the "
    "process; a run trains on meanwhile",
    "ratio is of medians, which do not see a save every checkpoint_every steps; mean_ratio is of "
    "means, saves included",
)
_EPILOG = """examples:
  OMP_NUM_THREADS=1 python -m benchmarks.loop_overhead --data data/sample
  OMP_NUM_THREADS=1 python -m benchmarks.loop_overhead --set 'general.batch_ramp=((0, 16),)' --steps 40
"""


def make_plan(args: argparse.Namespace) -> tuple[Plan, Segment]:
    """Return a plan for one process, and its first segment as steps of one size that save when due."""
    recipe = scale_tiny(load_recipe(args.recipe))
    recipe = override_recipe(recipe, args.overrides)
    options = Options(data=str(args.data), scale="tiny")
    plan = build_plan(recipe.recipe, local_cluster(1, "cpu"), options)
    segment = plan.segments[0]
    [(_, sequences), *_] = segment.batch_ramp  # steps of two sizes have no median to speak of
    return plan, replace(segment, batch_ramp=((0, sequences),), eval_every=segment.tokens)


def summary(steps: Steps, parts: dict[str, list[float]], segment: Segment) -> dict[str, Any]:
    """Return medians, means, their ratios, steps that saved, and the parts of our step."""
    wall = _ratio([step.wall_s for step in steps.ours], [step.wall_s for step in steps.bare])
    processor = _ratio(
        [step.processor_s for step in steps.ours], [step.processor_s for step in steps.bare]
    )
    return {
        "steps": len(steps.results),
        "wall": wall,
        "processor": processor,
        "steps_that_save_s": [
            step.wall_s
            for step, result in zip(steps.ours, steps.results, strict=True)
            if is_due(segment, segment.checkpoint_every, result.step)
        ],
        "parts_s": {name: statistics.median(seconds) for name, seconds in parts.items()},
    }


def _ratio(ours: Sequence[float], bare: Sequence[float]) -> dict[str, Any]:
    """Return medians, means and ratios; resampling keeps the two of a step together."""
    times = numpy.array([ours, bare])
    generator = numpy.random.default_rng(0)
    picks = generator.integers(0, len(ours), (_RESAMPLES, len(ours)))
    medians = numpy.median(times[:, picks], axis=2)
    differences = numpy.median((times[0] - times[1])[picks], axis=1)
    bare_s = statistics.median(bare)
    difference_s = statistics.median(a - b for a, b in zip(ours, bare, strict=True))
    return {
        "ours_s": statistics.median(ours),
        "bare_s": bare_s,
        "ratio": statistics.median(ours) / bare_s,
        "ratio_95_percent": numpy.quantile(medians[0] / medians[1], _INTERVAL).tolist(),
        "paired_ratio": 1 + difference_s / bare_s,
        "paired_ratio_95_percent": (
            1 + numpy.quantile(differences / medians[1], _INTERVAL)
        ).tolist(),
        "ours_mean_s": statistics.mean(ours),
        "bare_mean_s": statistics.mean(bare),
        "mean_ratio": statistics.mean(ours) / statistics.mean(bare),
    }


def measure_save(loop: Loop, *, count: int) -> dict[str, Any]:
    """Return how long a save holds the run up, and the time of the step after one."""
    stalls, after = [], []
    for _ in range(count):
        stalls.append(timed(loop.engine.save)[0].wall_s)
        after.append(timed(loop.ours)[0].wall_s)
        loop.engine.close()  # at the recipe's own interval it is written long before the next
    return {
        "saves": count,
        "stall_s": statistics.median(stalls),
        "stalls_s": stalls,
        "step_after_s": statistics.median(after),
    }


def measure_bar(results: Sequence[StepResult], segment: Segment, stream: TextIO) -> float:
    """Return seconds a step of the bar that a terminal gets in the place of lines."""
    bar = BarConsole(stream, segment)
    seconds = [timed(partial(bar.record_step, result))[0].wall_s for result in results]
    bar.close()
    return statistics.median(seconds)


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything and return what is written and printed."""
    plan, segment = make_plan(args)
    circumstances = _circumstances(
        args, plan, segment
    )  # before the run: files may change meanwhile
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    groups.form(plan, segment)
    # Both are built before either saves: an engine continues from a checkpoint it finds.
    first, second = Loop(plan, segment, folder), Loop(plan, segment, folder)
    parts: dict[str, list[float]] = defaultdict(list)
    with (
        timed_measure(parts),
        (folder / "console.log").open("w", encoding="utf-8") as console,
        redirect_stdout(console),
        open_recorders(folder, plan, segment, 0, Recording(tensorboard=False, wandb=None)) as recs,
    ):
        for loop in (first, second):
            loop.record_to(recs, parts)
        # The first steps allocate; after the tenth there is an evaluation, whatever the plan says.
        run_both(first, second, num_steps=_WARM_UP)
        parts.clear()
        num_steps = args.steps or _SAVES * segment.checkpoint_every
        found = summary(run := run_both(first, second, num_steps=num_steps), parts, segment)
        found["bar_of_a_terminal_s"] = measure_bar(run.results, segment, console)
        found["save"] = measure_save(first, count=_SAVES)
        evaluation_s = timed(first.engine.evaluate)[0].wall_s
    planned, step_s = plan.segments[0], found["wall"]["ours_s"]
    found["save"]["share_of_time"] = found["save"]["stall_s"] / (planned.checkpoint_every * step_s)
    found["evaluation"] = {
        "seconds": evaluation_s,
        "share_of_time": evaluation_s / (planned.eval_every * step_s),
    }
    groups.stop()
    return {"benchmark": "loop_overhead", "how": _HOW, **circumstances, **found}


def table(found: dict[str, Any]) -> str:
    """Return the result for people to read."""
    bare_s, save, evaluation = found["wall"]["bare_s"], found["save"], found["evaluation"]
    lines = [
        f"{found['recipe']}: {found['parameters']:,} parameters, {found['steps']} steps of "
        f"{found['sequences']} x {found['seq_len']} tokens",
        f"{found['machine']['system']}, {found['machine']['num_cpus']} cores, "
        f"{found['threads']} thread; load at the start {found['load_average'][0]:.1f}",
        f"Python {found['python']}, torch {found['torch']}, Megatron-core "
        f"{found['megatron_core']}, megamoe {found['megamoe']}",
        f"commit {found['commit']}",
        "",
        f"{'medians':<14}{'bare':>11}{'ours':>11}   ratio    95 %             paired   95 %",
        *(_row(name, found[name]) for name in ("wall", "processor")),
        f"target at most {TARGET}; the losses of every step are equal to the last bit",
        _means(found),
        "",
        "of our step, medians:",
        *(
            f"  {name:<24}{seconds * 1e3:8.3f} ms  {seconds / bare_s:8.3%} of a bare step"
            for name, seconds in found["parts_s"].items()
        ),
        "beside it:",
        f"  a terminal's bar instead of lines: {found['bar_of_a_terminal_s'] * 1e3:.3f} ms a step",
        f"  a save holds the run up for {save['stall_s']:.3f} s; every "
        f"{found['checkpoint_every']} steps that is {save['share_of_time']:.2%} of the time; the "
        f"step after it takes {save['step_after_s'] * 1e3:.1f} ms",
        f"  an evaluation takes {evaluation['seconds']:.3f} s; every {found['eval_every']} steps "
        f"that is {evaluation['share_of_time']:.2%} of the time",
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, times: dict[str, Any]) -> str:
    (low, high), (paired_low, paired_high) = (
        times["ratio_95_percent"],
        times["paired_ratio_95_percent"],
    )
    return (
        f"{name + ' time':<14}{times['bare_s'] * 1e3:8.2f} ms{times['ours_s'] * 1e3:8.2f} ms   "
        f"{times['ratio']:.4f}   {low:.4f}-{high:.4f}    "
        f"{times['paired_ratio']:.4f}   {paired_low:.4f}-{paired_high:.4f}"
    )


def _means(found: dict[str, Any]) -> str:
    """Return what medians do not see."""
    wall, saves = found["wall"], found["steps_that_save_s"]
    times = ", ".join(f"{seconds:.2f}" for seconds in saves)
    return (
        f"means, which see saves: bare {wall['bare_mean_s'] * 1e3:.2f} ms, ours "
        f"{wall['ours_mean_s'] * 1e3:.2f} ms, ratio {wall['mean_ratio']:.4f}; steps that saved, "
        f"until all was written: {len(saves)}{f', {times} s' if saves else ''}"
    )


def main() -> int:
    """Run the benchmark; 1 when the ratio of wall times is above the target."""
    parser = argparse.ArgumentParser(
        description="Compare our training step with a bare loop on Megatron-core, on CPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="vaetki_7b_a1b", help="at tiny scale")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="P=V")
    parser.add_argument("--data", type=Path, default=Path("data/sample"), metavar="DIR")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"of each loop (default: {_SAVES} saves apart)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write JSON here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Megatron-core calls what torch has renamed
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = benchmark(args, Path(folder))
    except MegamoeError as error:
        parser.error(str(error))
    sys.stdout.write(table(found))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(found["wall"]["ratio"] > TARGET)


def _circumstances(args: argparse.Namespace, plan: Plan, segment: Segment) -> dict[str, Any]:
    machine = this_machine()
    return {
        "recipe": f"{plan.recipe}, scale tiny, {segment.stage}",
        "overrides": args.overrides,
        "parameters": count_params(plan.model).total,
        "sequences": segment.batch_ramp[0][1],
        "seq_len": segment.seq_len,
        "checkpoint_every": plan.segments[0].checkpoint_every,
        "eval_every": plan.segments[0].eval_every,
        "machine": {"system": machine.system, "num_cpus": machine.num_cpus},
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "megamoe": plan.megamoe,
        "commit": running_commit(),
        "target": TARGET,
    }


if __name__ == "__main__":
    raise SystemExit(main())
