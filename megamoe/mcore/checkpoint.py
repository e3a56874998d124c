"""What a checkpoint holds, taken from a model and its optimizer and given back to them.

Megatron-core describes each weight by its global name, shape and place, so that another layout can
read it; megamoe/mcore/states.py does so with the optimizer's state. Nothing else is stored but a few
settings of the optimizer: all of it is tensors.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from megamoe.checkpoints.folder import remedy
from megamoe.checkpoints.manifest import check_file, read_manifest
from megamoe.errors import CheckpointError, MegamoeError
from megamoe.mcore import groups
from megamoe.mcore.compat import loading_checkpoint
from megamoe.mcore.model import unwrap
from megamoe.mcore.optim import separate_steps
from megamoe.mcore.shards import Box, careful_reading
from megamoe.mcore.states import read_masters, read_states, state_boxes
from megamoe.mcore.stored import ChunkReader, has_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A copy, on the CPU, of what this rank writes into a checkpoint."""

    boxes: list[Box]
    common: bytes  # settings of the optimizer, the same on all ranks
    validate: bool  # check that the boxes of all ranks are each tensor whole and once


def snapshot(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, validate: bool
) -> Snapshot:
    """Copy the state of this rank; training may go on when this returns.

    Args:
        chunks: model chunks of this rank.
        optimizer: the optimizer over them.
        validate: check that all ranks together write each tensor whole and once. What they write
            does not change while a process lives, so the first time is enough.
    """
    settings = optimizer.state_dict()
    state = _state(chunks)
    # Before Megatron-core takes the descriptions of weights apart.
    of_optimizer = [box for box, is_own in state_boxes(optimizer, _models(state)) if is_own]
    weights, common = save_preprocess({**state, "optimizer": settings}, validate)
    boxes = [
        replace(box, data=_copy(box.data))
        for box in [*map(_box, filter(_is_written, nested_values(weights))), *of_optimizer]
    ]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return Snapshot(boxes=boxes, common=buffer.getvalue(), validate=validate)


def load(
    folder: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    same_layout: bool,
) -> None:
    """Load a checkpoint into a model of any layout; random states only into the same one.

    One of weights alone (megamoe/convert) leaves random states as they are and begins the
    optimizer's: its float32 copies are the weights as they are stored, its moments zero.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no checkpoint of this model.
    """
    verify(folder)
    with _reading(folder):
        reader = ChunkReader(folder)
    is_whole = has_optimizer(reader.tensors)
    state = _state(chunks)
    if not (is_whole and same_layout):
        del state["random"]
    loaded = _read(folder, state)
    for index, chunk in enumerate(chunks):
        _set_weights(unwrap(chunk), loaded[f"model{index}"])
    if not is_whole:
        optimizer.reload_model_params()
        with _reading(folder):
            read_masters(reader, optimizer, _models(_state(chunks)))
        return
    optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(optimizer)
    with _reading(folder):
        read_states(reader, optimizer, _models(_state(chunks)))
    if same_layout:
        _set_random_state(loaded["random"])


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint, of whatever layout, into a whole model on one process.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no checkpoint of this model.
    """
    verify(folder)
    state = {"model0": _weights(model, groups.sharding())}
    _set_weights(model, _read(folder, state)["model0"])


def verify(folder: Path) -> None:
    """Compare every file with the manifest, the work shared among all ranks.

    Raises:
        CheckpointError: on every rank: the first file that is missing or damaged, and its writer.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem = None
    try:
        for entry in read_manifest(folder)[rank::world]:
            check_file(folder, entry)
    except CheckpointError as error:
        problem = str(error)
    if found := [problem for problem in groups.told_by_all(problem) if problem]:
        raise CheckpointError(f"{found[0]}{remedy(folder.parent)}")


def cause(error: BaseException) -> str:
    """Return in one line what went wrong, on the first rank where something did."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        where = f" (rank {rank})"
    else:
        where = ""
    kind = "" if isinstance(error, MegamoeError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0] + where


def _copy(data: Tensor) -> Tensor:
    """Return a copy on the CPU; from a GPU it is complete after the next synchronisation."""
    copied = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return copied.copy_(data.detach(), non_blocking=True)


def _state(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    metadata = groups.sharding()
    state: dict[str, Any] = {
        f"model{index}": _weights(unwrap(chunk), metadata) for index, chunk in enumerate(chunks)
    }
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    state["random"] = {
        name: ShardedTensor.from_rank_offsets(
            f"random.{name}", value, (0, rank, world), prepend_axis_num=1
        )
        for name, value in _random_state().items()
    }
    return state


def _models(state: dict[str, Any]) -> list[Any]:
    return [part for name, part in state.items() if name.startswith("model")]


def _is_written(tensor: Any) -> bool:
    assert isinstance(tensor, ShardedTensor), tensor
    return is_main_replica(tensor.replica_id)


def _box(tensor: ShardedTensor) -> Box:
    assert isinstance(tensor.data, Tensor), tensor.key
    return Box(
        name=tensor.key,
        shape=tuple(tensor.global_shape),
        offsets=tuple(tensor.global_offset),
        data=tensor.data.view(*[1] * tensor.prepend_axis_num, *tensor.local_shape),
    )


def _weights(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in model.sharded_state_dict(metadata=metadata).items()
        if not (isinstance(value, ShardedObject) and value.data is None)  # _extra_state
    }


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Say of whatever goes wrong that the folder cannot be loaded."""
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception in torch 2.13
        raise CheckpointError(f"{folder} cannot be loaded: {cause(error)}") from error


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    with _reading(folder), careful_reading(), loading_checkpoint():
        # Checked once by the ranks that wrote it; here each would gather what all others ask for.
        return dist_checkpointing.load(state, str(folder), validate_access_integrity=False)


def _set_weights(model: nn.Module, loaded: dict[str, Any]) -> None:
    missing, unknown = model.load_state_dict(loaded, strict=False)
    # Megatron-core's linear layers ask for a state that is empty without FP8.
    problems = [name for name in missing if not name.endswith("_extra_state")] + unknown
    assert not problems, problems


def _random_state() -> dict[str, Tensor]:
    return {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state.pop("torch"))
    get_cuda_rng_tracker().set_states(state)
