"""Runs that are killed at a chosen moment of a save, and then continued, for the tests to compare.

Run as a program with a folder: Megatron-core is imported once, and each rank of each run is a fork
of this process. Leaves in FOLDER/<case>/result.json what the checkpoints were worth after the kill,
and the losses and final state of the continued run.
"""

import gc
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import engine, groups, saver
    from megamoe.mcore.engine import Engine

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.manifest import HashingFile
from megamoe.errors import CheckpointError
from megamoe.plan.plan import Plan
from megamoe.train.hooks import Save
from megamoe.train.loop import train
from tests.mcore import tiny
from tests.mcore.world import everything

SEED = 20261122
NUM_STEPS = 4  # a save after each
DIED = "died"  # file of a run: the save it was killed in
TIMEOUT = timedelta(seconds=60)  # of a collective whose other ranks have died
MODEL = replace(
    tiny.LATENT,
    num_layers=2,
    window_pattern="LG",
    experts=replace(tiny.LATENT.experts, num_routed=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One moment: in a save, at the n-th call of something, before or after it, on one rank."""

    name: str
    save: int  # 1 is the first of the run
    world_size: int
    rank: int
    point: str
    nth: int
    after: bool


Arm = Callable[[Case, Callable[[], None]], None]  # the second has this process die


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Something that every save does.

    Args:
        arm: has a process die there.
        most: calls, or milliseconds, to draw from, of each rank that gets there: each save has as
            many.
        first_save: where it happens first; two checkpoints are kept.
    """

    arm: Arm
    most: tuple[int, ...]
    first_save: int = 1


def cases() -> list[Case]:
    """Return thirty moments, seeded; every third with two ranks, which die by turns.

    Every sixth is in the first save, where its point is.
    """
    chance = random.Random(SEED)
    turns = itertools.cycle((1, 0))
    drawn = []
    for index in range(30):
        name = list(POINTS)[index % len(POINTS)]
        point = POINTS[name]
        world_size = 2 if index % 3 == 2 else 1
        rank = next(turns) if world_size == len(point.most) == 2 else 0
        save = 1 if index % 6 == 0 else chance.choice([2, 3])
        drawn.append(
            Case(
                name=f"{index:02d}-{name.replace(' ', '-')}",
                save=max(save, point.first_save),
                world_size=world_size,
                rank=rank,
                point=name,
                nth=chance.randrange(1, point.most[rank] + 1),
                after=chance.random() < 0.5,
            )
        )
    return drawn


def _die(run_dir: Path) -> None:
    """Note in which save, and die."""
    (run_dir / DIED).write_text(str(BEGUN[0]))
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(owner: Any, name: str) -> Arm:
    """Return what has this process die at the n-th call of a function."""

    def arm(case: Case, die: Callable[[], None]) -> None:
        function, calls = getattr(owner, name), [0]

        def counted(*args: Any, **options: Any) -> Any:
            calls[0] += BEGUN[0] >= case.save
            if calls[0] == case.nth and not case.after:
                die()
            result = function(*args, **options)
            if calls[0] == case.nth and BEGUN[0] >= case.save:
                die()
            return result

        setattr(owner, name, counted)

    return arm


def _half_removed(case: Case, die: Callable[[], None]) -> None:
    """Die when the first file of an old checkpoint is gone."""
    remove = files.shutil.rmtree

    def begin_to_remove(path: Path, **options: Any) -> None:
        if Path(path).name.endswith(".removed") and BEGUN[0] >= case.save:
            next(Path(path).iterdir()).unlink()
            die()
        remove(path, **options)

    files.shutil.rmtree = begin_to_remove  # type: ignore[assignment]


def _some_time_after(case: Case, die: Callable[[], None]) -> None:
    """Die while the writer writes and training goes on: so many milliseconds after it began."""
    write = saver._write

    def write_and_die(*args: Any) -> int:
        if BEGUN[0] < case.save:
            return write(*args)
        wait = threading.Thread(target=lambda: (time.sleep(case.nth / 1000), die()), daemon=True)
        wait.start()
        num_bytes = write(*args)
        wait.join()  # a writer that is faster has not ended either
        return num_bytes

    saver._write = write_and_die


def _count_saves() -> None:
    start = saver.Saver.start

    def counted(self: Any, take: Any, *rest: Any) -> None:
        def taken() -> Any:  # when the save before has ended
            BEGUN[0] += 1
            return take()

        start(self, taken, *rest)

    saver.Saver.start = counted  # type: ignore[method-assign, assignment]


BEGUN = [0]  # saves of this process
POINTS = {
    "copying": Point(arm=_at_call(engine.checkpoint, "snapshot"), most=(1, 1)),
    "making the folder": Point(arm=_at_call(files, "begin"), most=(1,)),
    "inside a shard": Point(arm=_at_call(HashingFile, "write"), most=(1_000, 1_000)),
    "between files": Point(arm=_at_call(HashingFile, "close"), most=(8, 2)),
    "before the manifest": Point(arm=_at_call(saver, "write_manifest"), most=(1,)),
    "flushing and renaming": Point(arm=_at_call(files, "_flush"), most=(9,)),
    "naming the latest": Point(arm=_at_call(files, "name_latest"), most=(1,)),
    "around cleanup": Point(arm=_at_call(files, "_remove"), most=(1,), first_save=3),
    "during cleanup": Point(arm=_half_removed, most=(1,), first_save=3),
    "in the writer": Point(arm=_some_time_after, most=(150, 150)),
}


def plan_of(folder: Path, world_size: int) -> Plan:
    """Return a plan of four steps, each saved."""
    plan = tiny.tiny_plan(
        folder / f"data{world_size}",
        MODEL,
        world_size=world_size,
        dp=world_size,
        layout=replace(tiny.LAYOUT, ep=world_size),
        checkpoint_every=1,
    )
    assert plan.segments[0].num_steps == NUM_STEPS
    return plan


def _digest(trained: Engine) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(everything(trained).items()):
        whole.update(name.encode() + value.contiguous().numpy().tobytes())
    return whole.hexdigest()


def _train(plan: Plan, run_dir: Path, rank: int, case: Case | None) -> None:
    segment = plan.segments[0]
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{run_dir}/store-{'killed' if case else 'whole'}",
        rank=rank,
        world_size=segment.world_size,
        timeout=TIMEOUT,
    )
    groups.form(plan, segment)
    trained = Engine(plan, segment, run_dir)
    gc.freeze()
    if case is not None and case.rank == rank:
        _count_saves()
        POINTS[case.point].arm(case, partial(_die, run_dir))
    losses = {}

    class Keep:
        def after_step(self, result: Any, _: Any) -> None:
            losses[result.step] = asdict(result)["loss"]

    train(trained, [Keep(), Save(segment, [])])
    if case is None:
        result = {"losses": losses, "digest": _digest(trained)}
        (run_dir / f"rank{rank}.json").write_text(json.dumps(result))


def _fork(plan: Plan, run_dir: Path, rank: int, case: Case | None) -> int:
    child = os.fork()
    if child:
        return child
    status = 0
    try:
        _train(plan, run_dir, rank, case)
    except BaseException:
        (run_dir / f"error{rank}.txt").write_text(traceback.format_exc())
        status = 1
    os._exit(status)


def _run(plan: Plan, run_dir: Path, case: Case | None) -> bool:
    """Run all ranks; when one ends badly, end the others. Tell whether all ended well."""
    running = {_fork(plan, run_dir, rank, case) for rank in range(plan.segments[0].world_size)}
    well = True
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and well:
            well = False
            for other in running:
                os.kill(other, signal.SIGKILL)
    return well


def _after_kill(checkpoints: Path) -> dict[str, object]:
    """Return what `latest` names, whether it is sound, and how many checkpoints are."""
    newest = files.latest(checkpoints)
    sound = []
    for checkpoint in files.all_checkpoints(checkpoints):
        try:
            files.verify(checkpoint)
        except CheckpointError:
            continue
        sound.append(checkpoint)
    return {
        "latest": newest.name if newest else None,
        "latest_is_sound": newest in sound if newest else None,
        "sound": len(sound),
        "there": len(files.all_checkpoints(checkpoints)),
    }


def main() -> None:
    """Run everything once without a kill, then each case."""
    folder = Path(sys.argv[1])
    for world_size in (1, 2):
        run_dir = folder / f"whole{world_size}"
        run_dir.mkdir(parents=True)
        assert _run(plan_of(folder, world_size), run_dir, None), run_dir
    for case in cases():
        run_dir = folder / case.name
        run_dir.mkdir()
        plan = plan_of(folder, case.world_size)
        assert not _run(plan, run_dir, case), case
        died = int((run_dir / DIED).read_text())
        result = {"died_in_save": died, **_after_kill(run_dir / "checkpoints")}
        result["continued"] = _run(plan, run_dir, None)
        (run_dir / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
