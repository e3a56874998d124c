"""`megamoe parity`: train the same model under many layouts, and compare with one process."""

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.commit import running_commit
from megamoe.errors import LaunchError, PlanError
from megamoe.parity.layouts import DEFAULT, Grid, one_process, parse_layouts
from megamoe.parity.small import (
    MICRO_BATCH,
    on_a_gpu,
    plan_of,
    small_recipe,
    with_text,
    write_text,
)
from megamoe.plan.plan import Plan, Shard
from megamoe.recipe.layout import Layout

if TYPE_CHECKING:
    from megamoe.parity.compare import Comparison, Left

BOUNDS = {"float32": 2e-5, "float64": 1e-10}  # of an error of rounding: docs/parallelism.md
_TEXTS = ("one", "two")
_EPILOG = f"""Two steps of each recipe at its smallest scale, on processes of this machine. Where there
is a GPU all of them share it; CUDA_VISIBLE_DEVICES='' compares on the processor.
Ends with 1 when a difference exceeds the bound.

layouts: {DEFAULT}

examples:
  megamoe parity vaetki_7b_a1b
  megamoe parity k_exaone_236b_a23b --layouts tp2,cp2xring,dp2xpp2xep2 --json parity.json
  megamoe parity k_exaone_236b_a23b --layouts 'pp3xE|ttt|tmL'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One layout of one recipe."""

    recipe: str
    layout: str
    processes: int
    seconds: float
    error: str | None  # a rank failed; then nothing is compared
    comparison: "Comparison | None"

    @property
    def is_equal(self) -> bool:
        """Tell whether the layout ran and nothing exceeds the bound."""
        return self.comparison is not None and self.comparison.is_equal


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe parity`."""
    parser.epilog = _EPILOG
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="names or files of recipes")
    parser.add_argument("--layouts", default=DEFAULT, metavar="LIST", help="such as tp2,cp2xep2")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of weights and text")
    parser.add_argument(
        "--document-mask", action="store_true", help="documents do not see each other"
    )
    parser.add_argument("--dtype", choices=tuple(BOUNDS), default="float32", help="of everything")
    parser.add_argument(
        "--bound", type=float, metavar="X", help="relative (default 2e-5; in float64 1e-10)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all numbers here, and what gave them"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan everything, train, compare, print; 1 when a layout differs."""
    grids = (one_process(MICRO_BATCH), *parse_layouts(args.layouts, MICRO_BATCH))
    recipes = [small_recipe(name, document_mask=args.document_mask) for name in args.recipes]
    planned = [[(grid, plan_of(recipe, grid, args.seed)) for grid in grids] for recipe in recipes]
    if args.json is not None:
        _check_writable(args.json)
    bound = BOUNDS[args.dtype] if args.bound is None else args.bound
    if not (math.isfinite(bound) and bound >= 0):
        raise PlanError(f"--bound: {bound} is no relative difference; give a number from 0 on")
    if args.dtype == "float64":
        from megamoe.mcore import double

        double.enable()
    gpu = _gpu()
    if gpu is not None:
        _say(f"on {gpu}, which all processes share")
        planned = [[(grid, on_a_gpu(plan)) for grid, plan in plans] for plans in planned]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="megamoe-parity-") as folder:
        for index, plans in enumerate(planned):
            found = _compare(plans, (Path(folder) / str(index), args.seed), bound)
            sys.stdout.write(table(found))
            sys.stdout.flush()
            rows += found
    if args.json is not None:
        text = json.dumps(_record(rows, gpu), indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.is_equal for row in rows) else 1


def table(rows: Sequence[Row]) -> str:
    """Return a recipe's layouts as text, worst tensors below."""
    head = ("layout", "ranks", "loss", "mtp", "aux", "norm", "gradient", "adam", "weight", "", "s")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [f"{rows[0].recipe}: largest relative difference from one process"]
    for line in cells:
        first, *others = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    lines += _notes(rows)
    return "\n".join(lines) + "\n\n"


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _check_writable(file: Path) -> None:
    """Refuse a file that could not be written once everything has trained."""
    if not file.absolute().parent.is_dir():
        raise PlanError(f"--json: {file}: there is no such folder; make it first")
    try:
        is_new = not file.exists()
        file.open("a").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise PlanError(f"--json: {file}: {error.strerror}; give a file to write") from error


def _compare(
    plans: Sequence[tuple[Grid, Plan]], place: tuple[Path, int], bound: float
) -> list[Row]:
    folder, seed = place
    shards = tuple(write_text(folder / "text", each, seed + i) for i, each in enumerate(_TEXTS))
    (_, first), *others = plans
    name = first.recipe
    started = time.monotonic()
    one = _leave(first, folder, shards)
    _say(f"{name}: one process, {time.monotonic() - started:.1f} s")
    found: dict[tuple[Layout, int], Row] = {}
    rows = []
    for grid, plan in others:
        key = grid.layout, grid.world_size
        if key not in found:
            found[key] = _row(grid, plan, (folder, shards), one, bound)
        # 'ep2xpp2' is 'dp2xpp2xep2': two names of a grid have the numbers of one run.
        row = replace(found[key], layout=grid.name)
        rows.append(row)
        outcome = row.error or ("equal" if row.is_equal else "DIFFERS")
        _say(f"{name}: {grid.name}, {grid.world_size} processes, {row.seconds:.1f} s: {outcome}")
    return rows


def _row(
    grid: Grid, plan: Plan, text: tuple[Path, tuple[Shard, ...]], one: "Left", bound: float
) -> Row:
    from megamoe.parity.compare import compare

    folder, shards = text
    started = time.monotonic()
    error = comparison = None
    try:
        comparison = compare(_leave(plan, folder, shards, grid.name), one, bound)
    except LaunchError as failure:
        error = str(failure)
    shutil.rmtree(folder / grid.name)
    return Row(
        recipe=plan.recipe,
        layout=grid.name,
        processes=grid.world_size,
        seconds=time.monotonic() - started,
        error=error,
        comparison=comparison,
    )


def _leave(plan: Plan, folder: Path, shards: tuple[Shard, ...], name: str = "one") -> "Left":
    from megamoe.parity import ranks
    from megamoe.parity.compare import read

    run_dir = folder / name
    results = ranks.train(with_text(plan, folder / "text", shards), run_dir)
    return read(run_dir, results)


def _cells(row: Row) -> tuple[str, ...]:
    name = (row.layout, str(row.processes))
    if row.comparison is None:
        return (*name, *[""] * 7, "FAILED", f"{row.seconds:.0f}")
    measured, tensors = row.comparison.measured, row.comparison.tensors
    aux = [value for key, value in measured.items() if key.endswith(("aux_loss", "z_loss"))]
    mtp = measured.get("mtp_loss")
    values = (measured["loss"], mtp, max(aux), measured["grad_norm"])
    return (
        *name,
        *("-" if value is None else f"{value:.1e}" for value in values),
        *(f"{worst.difference:.1e}" for worst in tensors.values()),
        "equal" if row.is_equal else "DIFFERS",
        f"{row.seconds:.0f}",
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    lines = []
    compared = [(row, row.comparison) for row in rows if row.comparison is not None]
    if compared:
        row, worst = max(compared, key=lambda each: each[1].tensors["gradient"].difference)
        lines.append(f"worst gradient: {row.layout}, {worst.tensors['gradient'].name}")
        lines.append(f"experts without a token in a batch: {worst.idle_experts}")
    for row in rows:
        if row.comparison is None:
            lines.append(f"{row.layout} failed: {row.error}")
        elif row.comparison.beyond:
            lines.append(f"{row.layout} differs in {_beyond(row.comparison)}")
    return lines


def _beyond(found: "Comparison") -> str:
    count, first, tensor = len(found.beyond), found.beyond[0], found.first_tensor
    named = "" if tensor in (first, None) else f"; first tensor: {tensor}"
    return f"{count}, first in {first}{named}"


def _record(rows: Sequence[Row], gpu: str | None) -> dict[str, object]:
    """Return what was found, and by what: such a file is kept."""
    return {
        "command": sys.argv,
        "device": gpu or "CPU",
        "commit": running_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core")},
        },
        "rows": [{**asdict(row), "is_equal": row.is_equal} for row in rows],
    }


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
