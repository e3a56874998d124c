"""Trains the same small model under many layouts, for the tests to compare.

Run as a program with a folder, and MODEL/LAYOUT where not all are wanted: Megatron-core is imported
once, and each rank of each layout is a fork of this process. Leaves in FOLDER/<model>/<layout> the checkpoint after two steps,
`evaluation.json` with the loss on held-out text before them and `result.json` with what they measured,
or `error.txt`. MODEL/LAYOUT/imported instead loads the run FOLDER/<model>/imported in bfloat16 and saves
it in FOLDER/<model>/<layout>_imported.
"""

import gc
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import checkpoint, groups
    from megamoe.mcore.engine import Engine

from megamoe.checkpoints import folder as files
from megamoe.plan.plan import Plan
from megamoe.recipe import AdamW, Bf16, LearningRate, Mtp
from tests.mcore import tiny

Work = Callable[[Plan, Path, int], None]  # of one rank
NUM_STEPS = 2
TIMEOUT = timedelta(seconds=120)  # of a collective whose other ranks have died
# Three layers, so that the second of two pipeline ranks holds one less.
DUAL = replace(
    tiny.DUAL,
    num_layers=3,
    experts=replace(tiny.DUAL.experts, num_groups=2, group_top_k=1, top_k=2),
)
DEEP = replace(DUAL, num_layers=5, mtp=Mtp(num_layers=2, ffn="dense"))
MODELS = {
    "latent": tiny.LATENT,
    "grouped": tiny.GROUPED,
    "softmax": tiny.SOFTMAX,
    "dual": DUAL,
    # One table for both ends and multi-token prediction: the last rank has a copy that serves as both.
    "tied": replace(DUAL, tied_embeddings=True),
    # Enough layers for chunks of two rounds, and two depths of prediction on one of them.
    "deep": DEEP,
    "deep tied": replace(DEEP, tied_embeddings=True),
    # One key-value head, which ranks of tp share.
    "shared head": replace(tiny.GROUPED, attention=replace(tiny.GROUPED.attention, num_kv_heads=1)),
}
ONE = "one"
# Number of processes, data-parallel ranks, and what differs from one process.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    ONE: (1, 1, {}),
    "dp2": (2, 2, {}),
    "ep2": (2, 2, {"ep": 2}),
    "tp2": (2, 1, {"tp": 2}),
    "tp2 etp2": (2, 1, {"tp": 2, "etp": 2}),
    "pp2": (2, 1, {"pp": 2}),
    "pp2 vpp2": (2, 1, {"pp": 2, "vpp": 2}),
    "pp3 written": (3, 1, {"pp": 3, "pipeline": "E|ttt|mL"}),
    "pp4 apart": (4, 1, {"pp": 4, "pipeline": "E|ttt|m|L"}),
    "pp4 vpp2 apart": (4, 1, {"pp": 4, "vpp": 2, "pipeline": "E|t|t|t|t|t|mm|L"}),
    "cp2 heads": (2, 1, {"cp": 2, "cp_scheme": "heads"}),
    "cp2 ring": (2, 1, {"cp": 2, "cp_scheme": "ring"}),
    "cp4 gather": (4, 1, {"cp": 4, "cp_scheme": "gather"}),
    "tp2 cp2 ring": (4, 1, {"tp": 2, "cp": 2, "cp_scheme": "ring"}),
    "tp2 cp2 heads": (4, 1, {"tp": 2, "cp": 2, "cp_scheme": "heads"}),
    "tp2 cp2 ep2": (4, 1, {"tp": 2, "cp": 2, "ep": 2}),
    "dp2 tp2 ep2": (4, 2, {"tp": 2, "ep": 2}),
    "dp2 pp2 ep2": (4, 2, {"pp": 2, "ep": 2}),
}
# What test_parity.py reads back through Megatron-core: every way in which ranks share a tensor.
# More layouts of more models: test_parity_recipes.py.
READ_BACK = {
    "latent": ("dp2", "pp2", "tp2 etp2", "cp2 heads", "tp2 cp2 ep2"),
    "grouped": ("pp2 vpp2", "cp2 ring", "dp2 tp2 ep2"),
    "softmax": ("cp4 gather", "dp2 pp2 ep2"),
    "dual": ("pp2",),
    "tied": ("pp3 written", "pp4 apart"),
    "deep": ("pp4 vpp2 apart",),
    "deep tied": ("pp4 vpp2 apart",),
    "shared head": ("tp2 cp2 ring", "tp2 cp2 heads"),
}
CASES = [(model, layout) for model, layouts in READ_BACK.items() for layout in (ONE, *layouts)]


def plan_of(folder: Path, model: str, layout: str) -> Plan:
    """Return the plan of one layout of one model; all layouts of a model read the same text.

    Weights are as large as keeps a sum over the hidden dimension at the size of its terms, so that
    attention and routing are far from even and every weight matters.
    Adam divides a gradient by its size plus eps. With eps 1 an error of a gradient moves a weight by
    at most lr times that error; with the usual 1e-8 rounding alone can turn a step around.
    """
    world_size, dp, axes = LAYOUTS[layout]
    whole = MODELS[model]
    plan = tiny.tiny_plan(
        folder / model / "data",
        replace(
            whole,
            init_std=whole.hidden_dim**-0.5,
            experts=replace(whole.experts, num_routed=4),  # saving takes its time by weight
        ),
        world_size=world_size,
        dp=dp,
        layout=replace(tiny.LAYOUT, **axes),
        lr=LearningRate(peak=0.5, final=None, warmup_tokens=0, decay_tokens=0, decay="linear"),
    )
    optimizer = AdamW(
        beta1=0.9, beta2=0.95, eps=1.0, weight_decay=0.1, grad_clip=1.0, moments_dtype="float32"
    )
    return replace(plan, optimizer=optimizer)


def run_dir_of(folder: Path, model: str, layout: str) -> Path:
    """Return where a layout leaves its checkpoint and results."""
    return folder / model / layout.replace(" ", "_")


def imported_dir_of(folder: Path, model: str, layout: str) -> Path:
    """Return where a layout leaves the checkpoint of what was imported."""
    return run_dir_of(folder, model, f"{layout} imported")


def in_bfloat16(plan: Plan) -> Plan:
    """Return the plan with rounded weights, and the optimizer's float32 copies of them."""
    return replace(plan, segments=(replace(plan.segments[0], precision=Bf16()),))


def _train(plan: Plan, run_dir: Path, rank: int) -> None:
    _join(plan, run_dir, rank)
    engine = Engine(plan, plan.segments[0], run_dir)
    evaluation = [asdict(result) for result in engine.evaluate()]
    results = [asdict(engine.train_step()) for _ in range(NUM_STEPS)]
    engine.save(wait=True)
    if rank == 0:
        (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
        (run_dir / "result.json").write_text(json.dumps(results))
    groups.stop()


def _load_imported(plan: Plan, run_dir: Path, rank: int) -> None:
    _join(plan, run_dir, rank)
    engine = Engine(plan, plan.segments[0], run_dir)
    imported = files.latest(run_dir.parent / "imported/checkpoints")
    assert imported is not None, run_dir
    checkpoint.load(imported, engine.chunks, engine.optimizer, same_layout=False)
    engine.save(wait=True)
    groups.stop()


def _join(plan: Plan, run_dir: Path, rank: int) -> None:
    # Megatron-Core 0.16.1 jit.py compiles small functions: a third of the time of so short a run.
    torch.compiler.set_stance("force_eager")
    store = f"file://{run_dir}/store"
    world_size = plan.segments[0].world_size
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    groups.form(plan, plan.segments[0])


def _fork_rank(plan: Plan, run_dir: Path, rank: int, work: Work) -> int:
    child = os.fork()
    if child:
        return child
    status = 0
    try:
        work(plan, run_dir, rank)
    except BaseException:
        (run_dir / "error.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        status = 1
    os._exit(status)


def _run(plan: Plan, run_dir: Path, work: Work) -> None:
    """Work on as many forks as the plan has ranks; when one fails, end the others."""
    run_dir.mkdir(parents=True)
    gc.freeze()  # what imports have made is no garbage; looking for it takes a rank seconds
    ranks = range(plan.segments[0].world_size)
    running = {_fork_rank(plan, run_dir, rank, work) for rank in ranks}
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)


def main() -> None:
    """Run layouts of models, one after the other."""
    folder, *wanted = sys.argv[1:]
    for model, layout, *imported in [tuple(case.split("/")) for case in wanted] or CASES:
        case = Path(folder), model, layout
        if imported:
            _run(in_bfloat16(plan_of(*case)), imported_dir_of(*case), _load_imported)
        else:
            _run(plan_of(*case), run_dir_of(*case), _train)


if __name__ == "__main__":
    main()
