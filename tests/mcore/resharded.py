"""Trains a small recipe for a step in one layout; others load its checkpoint, save it and go on.

Run as a program with FOLDER, RECIPE and layouts, the first of which trains: prints for each layout the
names of tensors whose bits are not those of the first one's checkpoint, and the step it then makes.
Ranks are forks of this process, which does nothing else.
"""

import json
import os
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.convert.diff import differences
    from megamoe.mcore import checkpoint, groups
    from megamoe.mcore.engine import Engine
    from megamoe.mcore.stored import TensorReader

from megamoe.checkpoints.folder import name_of
from megamoe.parity import ranks, small
from megamoe.parity.layouts import Grid, one_process, parse_layouts
from megamoe.plan.plan import Plan

STEP_TOKENS = small.BATCHES[0] * small.SEQ_LEN
STEP = Path("checkpoints", name_of(STEP_TOKENS))


def main() -> None:
    """Train two steps in the first layout; load, save and train in each other."""
    folder, recipe = Path(sys.argv[1]), small.small_recipe(sys.argv[2])
    shards = tuple(
        small.write_text(folder / "text", name, seed) for seed, name in enumerate(("one", "two"))
    )
    found = {}
    for index, name in enumerate(sys.argv[3:]):
        plan = small.with_text(small.plan_of(recipe, _grid(name), seed=1), folder / "text", shards)
        run_dir = folder / str(index)
        result = _goes_on(plan, folder / "0", run_dir) if index else ranks.train(plan, run_dir)[-1]
        different = _different(folder / "0" / STEP, run_dir / STEP)
        found[name] = {"different": different, "result": result}
    sys.stdout.write(json.dumps(found))


def _grid(name: str) -> Grid:
    if name == "one":
        return one_process(small.MICRO_BATCH)
    [grid] = parse_layouts(name, small.MICRO_BATCH)
    return grid


def _different(a: Path, b: Path) -> list[str]:
    """Return the names of tensors that differ; random states belong to a layout's own ranks."""
    found = differences(TensorReader(a), TensorReader(b))
    return [each.name for each in found if not each.is_equal and not each.name.startswith("random")]


def _goes_on(plan: Plan, source: Path, run_dir: Path) -> dict[str, object]:
    run_dir.mkdir()
    world = range(plan.segments[0].world_size)
    children = [os.fork() or _be_rank(plan, source / STEP, run_dir, rank) for rank in world]
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert not any(ended), ended
    result: dict[str, object] = json.loads((run_dir / "result.json").read_text())
    return result


def _be_rank(plan: Plan, source: Path, run_dir: Path, rank: int) -> int:
    status = 1
    try:
        segment, store = plan.segments[0], f"file://{run_dir / 'store'}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=segment.world_size
        )
        groups.form(plan, segment)
        engine = Engine(plan, segment, run_dir)
        checkpoint.load(source, engine.chunks, engine.optimizer, same_layout=False)
        engine.step, engine.tokens_seen = 1, STEP_TOKENS
        engine.save(wait=True)
        result = asdict(engine.train_step())
        if rank == 0:
            (run_dir / "result.json").write_text(json.dumps(result))
        torch.distributed.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


if __name__ == "__main__":
    main()
