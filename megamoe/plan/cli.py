"""`megamoe plan`: settle a recipe for a cluster, show what it will do, write plan.json."""

import argparse
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megamoe.errors import PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cluster import Cluster
from megamoe.plan.flops import train_flops_per_token
from megamoe.plan.json import digest, write_plan
from megamoe.plan.layout import layout_text
from megamoe.plan.params import count_params
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe.check import FieldError, nearest
from megamoe.recipe.cli import add_recipe_arguments, recipe_from_args

KEEP_CHECKPOINTS = 3
_ASSUMED_MFU = 0.4
_FIFTH = "default: a fifth of the segment, at most 1,000"


_EPILOG = """examples:
  megamoe plan vaetki_7b_a1b --cluster h200-8x400g --nodes 32 -o plan.json
  megamoe plan vaetki_7b_a1b --scale tiny --nproc 2 --set long_context.layout.pp=2
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe plan`."""
    parser.epilog = _EPILOG
    add_recipe_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cluster", metavar="NAME", help="a named cluster, or a .toml file")
    where.add_argument("--nproc", type=int, metavar="N", help="processes on this machine")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the cluster (default 1)")
    add_option_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan here")
    parser.set_defaults(run=run)


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a person decides beyond recipe and cluster: data, seed, how often to save."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with --nproc")
    parser.add_argument("--data", metavar="DIR", help="folder with a manifest.json")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data")
    parser.add_argument("--checkpoint-every", type=int, metavar="STEPS", help=_FIFTH)
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help=_FIFTH)
    parser.add_argument("--eval-tokens", type=int, metavar="TOKENS", help="per held-out source")
    parser.add_argument("--keep-checkpoints", type=int, default=KEEP_CHECKPOINTS, metavar="N")
    parser.add_argument(
        "--nondeterministic",
        action="store_true",
        help="allow faster kernels that vary in sum order",
    )


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    recipe = recipe_from_args(args).recipe
    plan = build_plan(recipe, _cluster_from_args(args), options_from_args(args))
    asked = tuple(stage.tokens for stage in recipe.stages)
    sys.stdout.write(plan_table(plan, asked))
    if args.output is None:
        sys.stdout.write("write it with -o plan.json\n")
    else:
        _write(args.output, plan)
        sys.stdout.write(f"wrote {args.output}, digest {digest(plan)[:12]}\n")
    return 0


def _write(path: Path, plan: Plan) -> None:
    try:
        write_plan(path, plan)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; mend that, or give another -o") from error


def options_from_args(args: argparse.Namespace) -> Options:
    """Return the options of `add_option_arguments`.

    Raises:
        PlanError: a value is out of range.
    """
    try:
        return Options(
            seed=args.seed,
            deterministic=not args.nondeterministic,
            checkpoint_every=args.checkpoint_every,
            eval_every=args.eval_every,
            eval_tokens=args.eval_tokens,
            keep_checkpoints=args.keep_checkpoints,
            data=args.data,
            scale=args.scale,
        )
    except FieldError as error:
        raise PlanError(f"--{error.field.replace('_', '-')}: {error.problem}") from error


def plan_table(plan: Plan, tokens_asked: Sequence[int]) -> str:
    """Return the plan as text: a head, one column per segment, the totals.

    Args:
        plan: the plan.
        tokens_asked: the recipe's tokens of each stage, before whole steps settled them.
    """
    columns = [
        _column(plan, segment, asked)
        for segment, asked in zip(plan.segments, tokens_asked, strict=True)
    ]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_pad(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*_head(plan), "", *lines, "", *_mixture(plan), *_totals(plan)]) + "\n"


def local_cluster(num_processes: int, device: Literal["cpu", "cuda"]) -> Cluster:
    """Return this machine as a cluster of one node.

    Raises:
        PlanError: there is no process to run, or no NVIDIA GPU to be found.
    """
    if num_processes < 1:
        raise PlanError(f"--nproc: {num_processes} leaves nothing to run; give at least 1")
    gpu = _gpu_name() if device == "cuda" else None
    known = _known_gpu(gpu) if gpu else None
    return Cluster(
        name="local",
        num_nodes=1,
        devices_per_node=num_processes,
        device=device,
        device_name=gpu or "CPU",
        peak_flops_per_s=known.peak_flops_per_s if known else None,
        memory_bytes=known.memory_bytes if known else None,
        network_bytes_per_s=None,
    )


def named_cluster(name: str, num_nodes: int) -> Cluster:
    """Return a cluster described in a .toml file: a path, or a name in `launch/clusters`.

    Raises:
        PlanError: there is no such cluster, or its file is wrong.
    """
    files = {path.stem: path for path in _cluster_files()}
    path = Path(name) if name.endswith(".toml") else files.get(name)
    if path is None or not path.is_file():
        raise PlanError(f"--cluster: {name!r} is not known{nearest(name, files)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return Cluster(name=path.stem, num_nodes=num_nodes, **values)
    except FieldError as error:
        raise PlanError(f"{path}: {error}") from error
    except (tomllib.TOMLDecodeError, TypeError) as error:
        detail = str(error).replace("Cluster.__init__() ", "")
        raise PlanError(f"{path}: {detail}; compare with launch/clusters") from error


def _cluster_from_args(args: argparse.Namespace) -> Cluster:
    if args.cluster is not None:
        return named_cluster(args.cluster, 1 if args.nodes is None else args.nodes)
    if args.nproc is None:
        known = ", ".join(sorted(path.stem for path in _cluster_files()))
        raise PlanError(f"no machine is named; give --nproc N or --cluster NAME (known: {known})")
    if args.nodes is not None:
        raise PlanError("--nodes: counts the nodes of a cluster; give --cluster NAME as well")
    return local_cluster(args.nproc, args.device)


def _cluster_files() -> list[Path]:
    spec = importlib.util.find_spec("launch")
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted(Path(spec.submodule_search_locations[0]).glob("clusters/*.toml"))


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PlanError("--device cuda: nvidia-smi finds no GPU; give --device cpu") from error
    return answer.stdout.splitlines()[0].strip()


def _known_gpu(gpu: str) -> Cluster | None:
    """Return a named cluster of the same GPU: 'NVIDIA H200' is the one of 'H200 SXM'."""
    for path in _cluster_files():
        cluster = named_cluster(path.stem, 1)
        if cluster.device_name.split()[0] in gpu and "PCIe" not in gpu and "NVL" not in gpu:
            return cluster
    return None


def _head(plan: Plan) -> list[str]:
    cluster, params = plan.cluster, count_params(plan.model)
    scale = f", scale {plan.scale}" if plan.scale else ""
    return [
        f"recipe   {plan.recipe}{scale} ({plan.source})",
        f"cluster  {cluster.name}: {cluster.num_nodes} x {cluster.devices_per_node} "
        f"{cluster.device_name}",
        f"model    {params.total:,} parameters, {params.active:,} active for a token",
        f"data     {plan.data.folder if plan.data else 'none; give --data DIR to settle it'}",
    ]


def _column(plan: Plan, segment: Segment, asked: int) -> dict[str, str]:
    lr, ramp = segment.lr, segment.batch_ramp
    batches = f"{ramp[0][1]:,}" + (f" to {ramp[-1][1]:,}" if len(ramp) > 1 else "")
    flops = train_flops_per_token(plan, segment)
    return {
        "segment": f"{segment.index} {segment.stage}",
        "tokens asked": f"{asked:,}",
        "tokens settled": f"{segment.tokens:,}",
        "steps": f"{segment.num_steps:,}",
        "sequence length": f"{segment.seq_len:,}",
        "sequences a step": batches,
        "layout": layout_text(segment),
        "micro-batch": f"{segment.layout.micro_batch}",
        "precision": type(segment.precision).__name__,
        "peak lr": f"{lr.peak:g}",
        "final lr": "constant" if lr.final is None else f"{lr.final:g}",
        "checkpoint every": f"{segment.checkpoint_every:,} steps",
        "train FLOP/token": f"{flops:.4e}",
        "train FLOP": f"{flops * segment.tokens:.3e}",
    }


def _mixture(plan: Plan) -> list[str]:
    if plan.data is None:
        return []
    lines = []
    for segment in plan.segments:
        parts = [
            f"{source.name} {source.weight:.1%} "
            f"({source.weight * segment.tokens / source.shard.tokens:.2g} epochs)"
            for source in segment.sources
        ]
        lines.append(f"data of {segment.stage}: " + ", ".join(parts))
    return [*lines, ""]


def _totals(plan: Plan) -> list[str]:
    tokens = sum(segment.tokens for segment in plan.segments)
    total = sum(train_flops_per_token(plan, segment) * segment.tokens for segment in plan.segments)
    lines = [f"in all   {tokens:,} tokens, {total:.3e} FLOP"]
    peak = plan.cluster.peak_flops_per_s
    if peak is not None:
        seconds = total / (_ASSUMED_MFU * peak * plan.cluster.world_size)
        lines.append(
            f"time     {seconds / 86_400:,.1f} days at {_ASSUMED_MFU:.0%} of bf16 peak: "
            "an assumption, not a measurement"
        )
    return lines


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first = row[0].ljust(widths[0])
    return [first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
