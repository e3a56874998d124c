"""Trains one plan on forks of this process, one a rank, over gloo."""

import gc
import json
import os
import signal
import traceback
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import groups
    from megamoe.mcore.engine import Engine
    from megamoe.parity.copies import unequal_copies

from megamoe.errors import LaunchError
from megamoe.plan.plan import Plan

_TIMEOUT = timedelta(seconds=300)  # of a collective whose other ranks have died
_RESULTS, _ERROR, _LOG, _STORE = "results.json", "error.txt", "log.txt", "store"


def train(plan: Plan, run_dir: Path, *, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train the plan's steps, a checkpoint after each; return what each step measured.

    Megatron-core is imported once: each rank is a fork.

    Args:
        plan: of one segment.
        run_dir: a folder to make, or one where an earlier call stopped, to go on from there.
        stop_after: stop after so many steps; None: at the end.

    Raises:
        LaunchError: a rank failed; the others have been ended. Or there is a GPU.
    """
    if not cpu.is_needed():  # then Megatron-core has not been told to do without
        raise LaunchError(
            "megamoe parity compares on the processor, and here is a GPU; give CUDA_VISIBLE_DEVICES=''"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / _STORE).unlink(missing_ok=True)  # of an earlier call
    torch.set_num_threads(1)  # ranks share the cores, and a fork has no threads but its own
    gc.freeze()  # what imports have made is no garbage; looking for it takes a rank seconds
    running = {
        _fork(plan, run_dir, rank, stop_after) for rank in range(plan.segments[0].world_size)
    }
    try:
        while running:
            child, status = os.wait()
            running.discard(child)
            if status:
                raise LaunchError(_problem(run_dir, status))
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
        for child in running:
            os.waitpid(child, 0)
    results: list[dict[str, Any]] = json.loads((run_dir / _RESULTS).read_text(encoding="utf-8"))
    return results


def _fork(plan: Plan, run_dir: Path, rank: int, stop_after: int | None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _redirect(run_dir / _LOG)
        _be_rank(plan, run_dir, rank, stop_after)
        status = 0
    except BaseException:
        # The first to fail is the cause of what the others then meet.
        if not (run_dir / _ERROR).exists():
            text = f"rank {rank}: {traceback.format_exc()}"
            (run_dir / _ERROR).write_text(text, encoding="utf-8")
    finally:
        os._exit(status)


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _be_rank(plan: Plan, run_dir: Path, rank: int, stop_after: int | None) -> None:
    segment = plan.segments[0]
    # Megatron-Core 0.16.1 jit.py compiles small functions: a third of the time of so short a run.
    torch.compiler.set_stance("force_eager")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{run_dir / _STORE}",
        rank=rank,
        world_size=segment.world_size,
        timeout=_TIMEOUT,
    )
    groups.form(plan, segment)
    engine = Engine(plan, segment, run_dir)
    results: list[dict[str, Any]] = []
    while not engine.is_done and len(results) != stop_after:
        measured = asdict(engine.train_step())
        results.append(measured | {"unequal_copies": unequal_copies(engine.chunks)})
        engine.save(wait=True)
    if rank == 0:
        (run_dir / _RESULTS).write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    # Groups are left to the end of the process: gloo takes seconds to end them one by one.


def _problem(run_dir: Path, status: int) -> str:
    if not (run_dir / _ERROR).exists():
        return f"a rank was ended by signal {os.WTERMSIG(status)}"
    lines = (run_dir / _ERROR).read_text(encoding="utf-8").splitlines()
    return f"{lines[0].split(':')[0]}: {lines[-1]}"
