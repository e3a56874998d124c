"""Trains one plan on processes of this machine, one a rank, over gloo; on a GPU all share it."""

import gc
import json
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
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
from megamoe.parity import one_gpu
from megamoe.plan.plan import Plan

_TIMEOUT = timedelta(seconds=300)  # of a collective whose other ranks have died
_RESULTS, _ERROR, _LOG, _STORE = "results.json", "error.txt", "log.txt", "store"


def train(plan: Plan, run_dir: Path, *, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train the plan's steps, a checkpoint after each; return what each step measured.

    On a processor each rank is a fork, for which Megatron-core is imported once. A fork cannot use a GPU.

    Args:
        plan: of one segment.
        run_dir: a folder to make, or one where an earlier call stopped, to go on from there.
        stop_after: stop after so many steps; None: at the end.

    Raises:
        LaunchError: a rank failed; the others have been ended. Or there is a GPU, and the plan has none.
    """
    if plan.cluster.device == "cpu" and not cpu.is_needed():  # Megatron-core does not do without
        raise LaunchError(
            "the plan is for a processor, and here is a GPU; hide it: CUDA_VISIBLE_DEVICES=''"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / _STORE).unlink(missing_ok=True)  # of an earlier call
    torch.set_num_threads(1)  # ranks share the cores, and a fork has no threads but its own
    gc.freeze()  # what imports have made is no garbage; looking for it takes a rank seconds
    running: list[BaseProcess] = []
    try:
        for rank in range(plan.segments[0].world_size):
            process = _process(plan, run_dir, rank, stop_after)
            process.start()
            running.append(process)
        while running:
            wait([process.sentinel for process in running])
            for process in [each for each in running if each.exitcode is not None]:
                running.remove(process)
                if process.exitcode:
                    raise LaunchError(_problem(run_dir, process.exitcode))
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.join()
    results: list[dict[str, Any]] = json.loads((run_dir / _RESULTS).read_text(encoding="utf-8"))
    return results


def _process(plan: Plan, run_dir: Path, rank: int, stop_after: int | None) -> BaseProcess:
    work = (plan, run_dir, rank, stop_after)
    if plan.cluster.device == "cpu":
        return multiprocessing.get_context("fork").Process(
            target=be_rank, args=(*work, lambda: "gloo"), daemon=True
        )
    is_double = torch.float32 is torch.float64
    return multiprocessing.get_context("spawn").Process(
        target=one_gpu.be_rank, args=(work,), kwargs={"is_double": is_double}, daemon=True
    )


def be_rank(
    plan: Plan, run_dir: Path, rank: int, stop_after: int | None, prepare: Callable[[], str]
) -> None:
    """Train as one rank, and end this process; what it prints, and why it failed, is left in files.

    Args:
        plan: as `train` takes it, and the others.
        run_dir: a folder.
        rank: of the plan's.
        stop_after: so many steps.
        prepare: what is done first; returns the backend of the process group.
    """
    status = 1
    try:
        _redirect(run_dir / _LOG)
        _train(plan, run_dir, rank, stop_after, prepare())
        status = 0
    except BaseException:
        # The first to fail is the cause of what the others then meet.
        if not (run_dir / _ERROR).exists():
            text = f"rank {rank}: {traceback.format_exc()}"
            (run_dir / _ERROR).write_text(text, encoding="utf-8")
    finally:
        os._exit(status)  # groups are left to it: gloo takes seconds to end them one by one


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _train(plan: Plan, run_dir: Path, rank: int, stop_after: int | None, backend: str) -> None:
    segment = plan.segments[0]
    # Megatron-Core 0.16.1 jit.py compiles small functions: a third of the time of so short a run.
    torch.compiler.set_stance("force_eager")
    torch.distributed.init_process_group(
        backend,
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


def _problem(run_dir: Path, exitcode: int) -> str:
    if not (run_dir / _ERROR).exists():
        if exitcode < 0:
            return f"a rank was ended by signal {-exitcode}"
        return f"a rank ended with status {exitcode} before it began; see what it printed above"
    lines = (run_dir / _ERROR).read_text(encoding="utf-8").splitlines()
    return f"{lines[0].split(':')[0]}: {lines[-1]}"
