"""Checkpoints that are whole or absent, in Megatron-core's distributed format.

A checkpoint is a folder `<tokens>` of one shard a rank, Megatron-core's metadata and
`progress.json`. It is written under a hidden name and renamed when every byte is on disk; only
then does the file `latest` name it, and only then are older ones removed.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from megamoe.errors import CheckpointError
from megamoe.mcore.groups import sharding
from megamoe.mcore.model import unwrap
from megamoe.mcore.optim import separate_steps

LATEST = "latest"
PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stood when a checkpoint was made."""

    plan_digest: str
    segment: int
    step: int  # optimizer steps of the run
    tokens_seen: int  # input tokens of the run
    segment_done: bool
    ledger: tuple[tuple[str, str, int], ...]  # (stage, source, tokens drawn from it), in order


class ShardWriter(TorchDistSaveShardedStrategy):
    """Write shards in the rank's own process.

    Megatron-Core 0.16.1 strategies/filesystem_async.py starts a process for each file, which
    imports torch again (seconds a save) and hangs its parent when it dies.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write this rank's shard and flush it to disk; the first rank writes the metadata."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_shards(
            mcore_to_pyt_state_dict(state, False),  # noqa: FBT003 - not loading
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def save(
    folder: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    progress: Progress,
    keep: int,
) -> Path:
    """Write a checkpoint from all ranks and make it the latest.

    Args:
        folder: the run's checkpoint folder, seen by all ranks.
        chunks: model chunks of this rank.
        optimizer: the optimizer over them.
        progress: where the run stands.
        keep: number of checkpoints to keep, this one included.
    """
    final = folder / f"{progress.tokens_seen:015d}"
    partial = folder / f".{final.name}.partial"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(
        _state(chunks, optimizer, is_loading=False), partial, ShardWriter("torch_dist", 1)
    )
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _publish(partial, final, progress)
        _remove_old(folder, keep)
    torch.distributed.barrier()
    return final


def load(
    folder: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    same_layout: bool,
) -> None:
    """Load a checkpoint into a model of any layout; random states only into the same one.

    Raises:
        CheckpointError: the folder is not a whole checkpoint of this model.
    """
    state = _state(chunks, optimizer, is_loading=True)
    random_state = state.pop("random")
    if same_layout:
        state["random"] = random_state
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:  # the latter is no Exception in torch 2.13
        raise CheckpointError(f"{folder} cannot be loaded: {_cause(error)}") from error
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    if same_layout:
        _set_random_state(loaded["random"])


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None where there is none yet.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    checkpoint = folder / pointer.read_text().strip()
    if not (checkpoint / PROGRESS).is_file():
        raise CheckpointError(f"{pointer} names {checkpoint.name}, which is missing")
    return checkpoint


def read_progress(checkpoint: Path) -> Progress:
    """Return where the run stood at a checkpoint."""
    fields = json.loads((checkpoint / PROGRESS).read_text())
    ledger = tuple((stage, source, tokens) for stage, source, tokens in fields.pop("ledger"))
    return Progress(**fields, ledger=ledger)


def _state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    metadata = sharding()
    state: dict[str, Any] = {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    models = state if len(chunks) > 1 else state["model0"]
    state["optimizer"] = optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=metadata
    )
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    state["random"] = ShardedObject("random", _random_state(), (world,), (rank,))
    return state


def _random_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _publish(partial: Path, final: Path, progress: Progress) -> None:
    (partial / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
    for path in partial.iterdir():
        _flush(path)
    _flush(partial)
    if final.exists():  # a save that died before `latest` moved
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    pointer = final.parent / f".{LATEST}"
    pointer.write_text(final.name + "\n")
    _flush(pointer)
    pointer.replace(final.parent / LATEST)
    _flush(final.parent)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:  # a pointer that was never put in place
            leftover.unlink()


def _cause(error: BaseException) -> str:
    """Return in one line what went wrong, on the first rank where something did."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(folder: Path, keep: int) -> None:
    newest = latest(folder)
    whole = sorted(path for path in folder.iterdir() if (path / PROGRESS).is_file())
    for path in whole[:-keep]:
        if path != newest:
            shutil.rmtree(path)
