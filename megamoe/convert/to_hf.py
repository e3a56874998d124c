"""A checkpoint of ours becomes a Hugging Face folder, tensor by tensor."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import megamoe
from megamoe.checkpoints.manifest import MANIFEST, file_sha256
from megamoe.checkpoints.place import find_checkpoint
from megamoe.convert import audit
from megamoe.convert.architectures import (
    Architecture,
    Stage,
    architecture_for,
    remarks,
    stage_of,
    without_prediction,
)
from megamoe.convert.config import config_of
from megamoe.convert.entries import Entry, entries
from megamoe.convert.memory import export_bytes, need
from megamoe.convert.ours import EXPERTS, our_tensors
from megamoe.convert.remote_code import copy_code, needs_code
from megamoe.convert.tokenizer import copy_tokenizer, tokenizer_of
from megamoe.convert.weights import weight_sources
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import TensorReader
from megamoe.plan.plan import Plan
from megamoe.recipe.model import Model

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A verified checkpoint and what of it is written."""

    reader: TensorReader
    names: dict[str, str]  # of a weight: the tensor to read it from
    dtype: torch.dtype | None  # None: as it is stored
    place: str


def to_hf(path: Path, out: Path, *, dtype: str | None, shard_bytes: int, say: Say) -> None:
    """Write a Hugging Face folder.

    Args:
        path: a run folder (its latest checkpoint is taken) or one checkpoint.
        out: the folder to make; until it is whole it has a hidden name.
        dtype: 'bfloat16' or 'float32'; None: as the weights are stored.
        shard_bytes: most bytes of tensors in a file, but for a tensor that is larger.
        say: takes lines on what happens.

    Raises:
        CheckpointError: a tensor is missing, extra, misshaped or not finite; no architecture fits.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists already; give another folder, or remove it")
    place = find_checkpoint(path)
    checkpoint, plan, progress = place.checkpoint, place.plan, place.progress
    tokenizer_of(plan.data)  # now, since what follows may take hours
    stage = stage_of(plan.model, plan.segments, progress.segment)
    architecture = architecture_for(stage, plan.recipe)
    say(f"{checkpoint} as {architecture.model_type}; compares it with its manifest")
    reader = TensorReader(checkpoint)
    names = weight_sources(place, reader, exact=dtype == "float32")
    kept = without_prediction(architecture, plan.model)
    source = _Source(
        reader=reader,
        names=names,
        dtype=None if dtype is None else getattr(torch, dtype),
        place=str(checkpoint),
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        say(copy_tokenizer(plan.data, partial))
        found = list(entries(architecture.table, kept))
        say(need(_needed_bytes(source, found, shard_bytes)))
        pairs = _write_shards(partial, source, found, (shard_bytes, say))
        left_out = list(_left_out(source, plan.model, kept))
        if left_out:
            say(
                f"left out: multi-token prediction, {len(left_out)} tensors; {architecture.model_type} has none"
            )
        facts: dict[str, object] = {
            "megamoe": megamoe.__version__,
            "direction": "to-hf",
            "checkpoint": str(checkpoint),
            "manifest_sha256": file_sha256(checkpoint / MANIFEST),
            "tokens_seen": progress.tokens_seen,
            "model_type": architecture.model_type,
            "left_out": [asdict(record) for record in left_out],
        }
        _write_configs(partial, architecture, stage, plan, pairs)
        if needs_code(architecture, plan.model):
            say(copy_code(partial))
        for remark in remarks(architecture, plan.model):
            say(remark)
        (partial / audit.AUDIT).write_text(audit.audit_text(facts, pairs), encoding="utf-8")
        _publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _needed_bytes(source: _Source, found: list[Entry], shard_bytes: int) -> int:
    theirs = [
        math.prod(shape) * _dtype_of(source, entry).itemsize
        for entry in found
        for _, shape in entry.theirs
    ]
    ours = max(math.prod(entry.shape) * _stored_dtype(source, entry).itemsize for entry in found)
    if source.dtype is torch.bfloat16 and any(_is_exact(source, entry) for entry in found):
        ours += ours // 2  # what is rounded is there twice
    return export_bytes(theirs, ours, shard_bytes)


def _is_exact(source: _Source, entry: Entry) -> bool:
    return not entry.is_float32 and _stored_dtype(source, entry) is torch.float32


def _write_shards(
    folder: Path, source: _Source, found: list[Entry], options: tuple[int, Say]
) -> list[audit.Pair]:
    """Write all tensors in files of at most so many bytes, and the index; return the audit."""
    shard_bytes, say = options
    shards = list(_shards(source, found, shard_bytes))
    pairs: list[audit.Pair] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for entry in shard:
            pair, parts = _convert(source, entry)
            pairs.append(pair)
            tensors |= parts
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
        try:
            save_file(tensors, str(folder / name), metadata={"format": "pt"})
        except SafetensorError as error:  # how it says that the system refuses
            raise OSError(f"{name} cannot be written ({error})") from error
        (folder / name).chmod(_mode())  # safetensors lets its owner alone read it
        tensors.clear()
        _check_written(folder / name, pairs[-len(shard) :])
        say(f"{name}  {total:,} bytes so far")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return pairs


def _shards(source: _Source, found: list[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in found:
        num_bytes = torch.Size(entry.shape).numel() * _dtype_of(source, entry).itemsize
        if shard and size + num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += num_bytes
    yield shard


def _dtype_of(source: _Source, entry: Entry) -> torch.dtype:
    if entry.is_float32:
        return torch.float32
    return source.dtype or _stored_dtype(source, entry)


def _stored_dtype(source: _Source, entry: Entry) -> torch.dtype:
    return source.reader.tensors[source.names[entry.ours]].dtype


def _convert(source: _Source, entry: Entry) -> tuple[audit.Pair, dict[str, Tensor]]:
    expert = None if entry.index is None else entry.index[0]
    name = source.names[entry.ours]
    ours = source.reader.read(name, expert)
    dtype = _dtype_of(source, entry)
    parts: dict[str, Tensor] = {}
    for (their_name, shape), part in zip(entry.theirs, entry.rule.split(ours), strict=True):
        assert tuple(part.shape) == shape, (their_name, part.shape, shape)
        parts[their_name] = _on_its_own(part.to(dtype))
        where = f"{_place_in(name, expert)} ({their_name})"
        audit.check_finite(source.place, where, parts[their_name])
    theirs = tuple(audit.record(part_name, part) for part_name, part in parts.items())
    return audit.Pair(ours=audit.record(name, ours, expert), theirs=theirs), parts


def _on_its_own(part: Tensor) -> Tensor:
    """Return a tensor that shares no memory: parts of one tensor do, which safetensors refuse."""
    part = part.contiguous()
    is_whole = part.untyped_storage().nbytes() == part.nbytes
    return part if is_whole else part.clone()


def _left_out(source: _Source, model: Model, kept: Model) -> Iterator[audit.Record]:
    """Yield what the files do not hold, experts one by one."""
    written = our_tensors(kept)
    for name, shape in our_tensors(model).items():
        if name in written:
            continue
        for expert in range(shape[0]) if EXPERTS in name else (None,):
            tensor = source.reader.read(source.names[name], expert)
            audit.check_finite(source.place, _place_in(name, expert), tensor)
            yield audit.record(source.names[name], tensor, expert)


def _place_in(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}[{expert}]"


def _check_written(path: Path, pairs: list[audit.Pair]) -> None:
    """Read a file back and compare it with the audit."""
    with safe_open(path, framework="pt") as file:
        for record in (record for pair in pairs for record in pair.theirs):
            if audit.record(record.name, file.get_tensor(record.name)) != record:
                raise CheckpointError(f"{path}: {record.name} was not written as it was meant")


def _write_configs(
    folder: Path, architecture: Architecture, stage: Stage, plan: Plan, pairs: list[audit.Pair]
) -> None:
    special: dict[str, object] = {
        "bos_token_id": None,
        "eos_token_id": plan.data.eod_id if plan.data else None,
        "pad_token_id": plan.data.pad_id if plan.data else None,
    }
    dtype = pairs[0].theirs[0].dtype
    config = {**config_of(architecture, stage), **special, "dtype": dtype}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(partial: Path, out: Path) -> None:
    """Give the folder its name when every byte of it is on disk."""
    for path in (*partial.iterdir(), partial):
        _flush(path)
    partial.rename(out)
    _flush(out.parent)


def _mode() -> int:
    """Return the permissions that a new file has here."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
