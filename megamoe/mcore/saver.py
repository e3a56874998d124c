"""Writes checkpoints while training goes on.

Training stops while the tensors are copied to the CPU. A thread of each rank then writes, hashes and
publishes them; the threads talk over a group of their own (gloo), so that their collectives cannot
mix with training's. There is no other process that could die unnoticed.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch.distributed.checkpoint.api import CheckpointException

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.folder import Progress
from megamoe.checkpoints.manifest import write_file, write_manifest
from megamoe.errors import CheckpointError
from megamoe.mcore import groups
from megamoe.mcore.checkpoint import Snapshot, cause
from megamoe.mcore.shards import ShardWriter, write_shards
from megamoe.step import SaveResult


@dataclass(slots=True, kw_only=True)
class _Save:
    """A save under way, filled in by its thread."""

    result: SaveResult  # complete when the thread has ended
    started: float
    thread: threading.Thread | None = None


class Saver:
    """Saves one checkpoint at a time, in the background, on every rank.

    Args:
        folder: the run's checkpoint folder, seen by all ranks.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Nothing is under way."""
        self._folder, self._keep = folder, keep
        self._save: _Save | None = None
        self._ended: list[SaveResult] = []

    def start(self, take: Callable[[], Snapshot], progress: Progress, stage: str) -> None:
        """Copy the state and begin to write it; waits for the save before, if that goes on.

        Args:
            take: copies the state of this rank to the CPU.
            progress: where the run stands.
            stage: what is trained, for the record.
        """
        started = time.perf_counter()
        self.wait()
        snapshot = take()
        save = _Save(
            result=SaveResult(
                stage=stage,
                segment=progress.segment,
                step=progress.step,
                tokens_seen=progress.tokens_seen,
                stall_seconds=time.perf_counter() - started,
                seconds=0.0,
                num_bytes=0,
                error=None,
            ),
            started=started,
        )
        # A daemon: a rank that fails ends without waiting for collectives others will not answer.
        save.thread = threading.Thread(
            target=self._write, args=(save, snapshot, progress), name="save", daemon=True
        )
        save.thread.start()
        self._save = save

    def finish(self) -> str | None:
        """Wait for the save just started, which training stands still for from beginning to end."""
        error = self.wait()
        last = self._ended.pop()
        self._ended.append(replace(last, stall_seconds=last.seconds))
        return error

    def ended(self) -> list[SaveResult]:
        """Return the saves that have ended since the last call, failed ones too."""
        thread = None if self._save is None else self._save.thread
        if thread is not None and not thread.is_alive():
            self.wait()
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> str | None:
        """Wait until nothing is being written; return why the last save failed, if it did."""
        save, self._save = self._save, None
        if save is None or save.thread is None:
            return None
        save.thread.join()
        self._ended.append(save.result)
        return save.result.error

    def _write(self, save: _Save, snapshot: Snapshot, progress: Progress) -> None:
        """Write, publish, and note what happened; runs in the thread."""
        num_bytes, error = 0, None
        try:
            num_bytes = _write(self._folder, snapshot, progress, self._keep)
        except (Exception, CheckpointException) as problem:  # the latter is no Exception
            error = cause(problem)
            if torch.distributed.get_rank() == 0:
                name = files.name_of(progress.tokens_seen)
                shutil.rmtree(self._folder / f".{name}.partial", ignore_errors=True)
        seconds = time.perf_counter() - save.started
        save.result = replace(save.result, seconds=seconds, num_bytes=num_bytes, error=error)


def _write(folder: Path, snapshot: Snapshot, progress: Progress, keep: int) -> int:
    """Write a checkpoint from all ranks and make it the latest; return its bytes."""
    name = files.name_of(progress.tokens_seen)
    partial = _on_first(lambda: files.begin(folder, name))
    if partial is None:  # this very state is the latest checkpoint already
        return 0
    group = groups.saving()
    writer = write_shards(snapshot.boxes, partial, group, validate=snapshot.validate)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    written: list[Any] | None = [None] * world if rank == 0 else None
    torch.distributed.gather_object(writer.entries(rank), written, dst=0, group=group)

    def finish() -> int:
        assert written is not None
        entries = [entry for part in written for entry in part]
        entries += _write_metadata(partial, snapshot, writer)
        entries.append(files.write_progress(partial, progress))
        write_manifest(partial, entries)
        files.publish(partial, folder / name, keep)
        return sum(entry.num_bytes for entry in entries)

    num_bytes: int = _on_first(finish)
    return num_bytes


def _write_metadata(partial: Path, snapshot: Snapshot, writer: ShardWriter) -> list[Any]:
    """Write what Megatron-core wants beside the shards, and the names of the tensors for people."""
    config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()
    tensors = json.dumps(writer.tensors, indent=0).encode()
    return [
        write_file(partial / "common.pt", snapshot.common, rank=0),
        write_file(partial / "metadata.json", config, rank=0),
        write_file(partial / "tensors.json", tensors, rank=0),
    ]


def _on_first(function: Callable[[], Any]) -> Any:
    """Call a function on the first rank; return on every rank what it returned.

    Raises:
        CheckpointError: on every rank, if it failed.
    """
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = cause(error)
    torch.distributed.broadcast_object_list(answer, src=0, group=groups.saving())
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]
