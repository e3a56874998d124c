"""What memory a conversion needs: a recipe at its full width, written, exported and imported.

    python -m benchmarks.convert_memory k_exaone_236b_a23b /tmp/large --layers 2

Weights are constants, written expert by expert; `megamoe convert` runs as it does for a user, in a
process of its own, whose largest resident set (page cache of mapped files included) is printed.
The folder takes twice the size of the weights; what was exported goes before it is imported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

_GIB = 1 << 30


def write_run(folder: Path, plan_file: Path) -> int:
    """Write a run of a plan with a first checkpoint; return the bytes of its weights."""
    import torch

    from megamoe.checkpoints import folder as files
    from megamoe.checkpoints.manifest import write_manifest
    from megamoe.convert.ours import EXPERTS, our_tensors
    from megamoe.mcore.stored import TensorWriter
    from megamoe.plan.json import digest, read_plan, write_plan
    from megamoe.recipe import Bf16

    plan = read_plan(plan_file)
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder / "plan.json", plan)
    dtype = torch.bfloat16 if isinstance(plan.segments[0].precision, Bf16) else torch.float32
    partial = files.begin(folder / "checkpoints", files.name_of(0))
    assert partial is not None, folder
    total = 0
    with TensorWriter(partial) as writer:
        for name, shape in our_tensors(plan.model).items():
            own = torch.float32 if name.endswith(".expert_bias") else dtype
            count = shape[0] if EXPERTS in name else None
            tensor = torch.full(shape[1:] if count else shape, 0.5, dtype=own)
            for i in range(count or 1):
                writer.write(name, tensor, (i, count) if count else None)
                total += tensor.nbytes
        entries, _ = writer.finish()
    progress = files.Progress(
        plan_digest=digest(plan), segment=0, step=0, tokens_seen=0, segment_done=False, ledger=()
    )
    write_manifest(partial, [*entries, files.write_progress(partial, progress)])
    files.publish(partial, folder / "checkpoints" / files.name_of(0), keep=1)
    return total


def _write(name: str, num_layers: int, folder: Path) -> None:
    from megamoe.mcore.meta import one_process_plan
    from megamoe.plan.json import write_plan
    from megamoe.recipe.layout import one_rank
    from megamoe.recipe.load import load_recipe

    recipe = load_recipe(name).recipe
    layout = one_rank(1)
    stage = replace(recipe.stages[0], layout=layout)
    model = replace(recipe.model, num_layers=num_layers)
    assumed = tuple(path for path in recipe.assumed if path.startswith(("model.", "optimizer.")))
    recipe = replace(recipe, model=model, stages=(stage,), assumed=assumed)
    (folder / "again").mkdir(parents=True)
    write_plan(folder / "again/plan.json", one_process_plan(recipe))
    total = write_run(folder / "run", folder / "again/plan.json")
    sys.stdout.write(json.dumps({"weights_gib": round(total / _GIB, 2)}) + "\n")


def _measure(name: str, arguments: list[str]) -> None:
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "megamoe", "convert", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    took, peak = time.monotonic() - start, usage.ru_maxrss * 1024 / _GIB
    sys.stdout.write(json.dumps({name: {"peak_gib": round(peak, 2), "took_s": round(took)}}) + "\n")


def main() -> None:
    """Write a run, export it, import it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        _write(args.recipe, args.layers, args.folder)
        return
    # A child's peak begins at its parent's, so this process stays small.
    own = [sys.executable, "-m", "benchmarks.convert_memory", args.recipe, str(args.folder)]
    subprocess.run([*own, "--layers", str(args.layers), "--write"], check=True)
    out = str(args.folder / "out")
    _measure("to-hf", ["to-hf", str(args.folder / "run"), out, "--shard-size", args.shard_size])
    shutil.rmtree(args.folder / "run")
    _measure("from-hf", ["from-hf", out, str(args.folder / "again")])
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
