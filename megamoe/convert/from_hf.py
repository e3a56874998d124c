"""A Hugging Face folder becomes the first checkpoint of a run: weights alone, tensor by tensor."""

import bisect
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import megamoe
from megamoe.checkpoints import folder as files
from megamoe.checkpoints.folder import Progress
from megamoe.convert import audit
from megamoe.convert.architectures import (
    ARCHITECTURES,
    Architecture,
    Stage,
    problems,
    stage_of,
)
from megamoe.convert.config import differences, rotary_is_split
from megamoe.convert.entries import Entry, entries, useless_norms
from megamoe.convert.hf_folder import HfFolder, HfTensor, read
from megamoe.convert.memory import import_bytes, need
from megamoe.convert.ours import share_tensors
from megamoe.convert.tokenizer import compare_tokenizer
from megamoe.convert.weights_only import new_checkpoint
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import TensorWriter
from megamoe.plan.json import digest, read_plan
from megamoe.plan.plan import Plan
from megamoe.plan.schedule import position_at_step
from megamoe.recipe.model import Model

Say = Callable[[str], None]
# What a plan is given so that its model has no such part: the part, and what trains it.
WITHOUT_PREDICTION = "--set model.mtp=None --set '*.mtp_loss=None'"
WITHOUT_BIAS = "--set model.experts.expert_bias=False --set '*.router.bias_update_rate=0.0'"
_BIAS = ".e_score_correction_bias"
_SAY_EVERY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A folder whose tensors are those of the plan's model."""

    place: str
    tensors: dict[str, HfTensor]
    entries: list[Entry]  # without the copies that the folder does not hold
    left_out: list[audit.Record]  # of what the folder holds and the model does not
    hashes: dict[str, str] | None  # of its audit
    dtype: torch.dtype  # of the weights to write


def from_hf(
    folder: Path,
    run_dir: Path,
    *,
    tokens_seen: int,
    say: Say,
    ignored: Collection[str] = (),
) -> Path:
    """Write the first checkpoint of a run and return its folder.

    Args:
        folder: config.json and safetensors.
        run_dir: holds the plan of the run, and no checkpoint.
        tokens_seen: where the run begins in its plan, at the end of a step.
        say: takes lines on what happens.
        ignored: keys of config.json that say another model than the plan, which is right.

    Raises:
        CheckpointError: the folder is not of the plan's model; a tensor is missing, extra,
            misshaped, not finite, or not the one of the folder's audit.
    """
    plan = read_plan(run_dir / "plan.json")
    progress = _progress(plan, tokens_seen, run_dir)
    with new_checkpoint(run_dir, progress) as new:
        theirs = HfFolder(folder)
        stage = stage_of(plan.model, plan.segments, progress.segment)
        architecture = _architecture(theirs, stage)
        overruled = _overruled(theirs, architecture, stage, ignored)
        is_split = rotary_is_split(theirs.config)
        found = list(entries(architecture.table, plan.model, rotary_is_split=is_split))
        source = _source(theirs, architecture, plan.model, found)
        say(f"{folder} is {architecture.model_type}, {len(source.tensors):,} tensors")
        for difference in overruled:
            say(f"overruled by the plan: {difference}")
        if source.left_out:
            say(_what_is_left_out(source.left_out))
        if remark := compare_tokenizer(folder, plan.data):
            say(remark)
        say(need(_needed_bytes(source)))
        pairs = _write_weights(new.tensors, source, say)
        for ours, shape in share_tensors(plan.model).items():
            new.tensors.write(ours, torch.full(shape, 1 / shape[0]))  # even, as a router begins
        facts: dict[str, object] = {
            "megamoe": megamoe.__version__,
            "direction": "from-hf",
            "folder": str(folder.resolve()),
            "model_type": architecture.model_type,
            "overruled": overruled,
            "left_out": [asdict(record) for record in source.left_out],
        }
        new.notes[audit.AUDIT] = audit.audit_text(facts, pairs).encode()
    return run_dir / "checkpoints" / files.name_of(tokens_seen)


def _architecture(theirs: HfFolder, stage: Stage) -> Architecture:
    place = theirs.path / "config.json"
    model_type = str(theirs.config.get("model_type")).lower()  # A.X-K1 was AXK1 at first
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{place}: model_type {model_type!r} is not known; known: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[model_type]
    found = list(problems(architecture, stage))
    if stage.model.mtp is not None and not architecture.has_prediction:
        found.append(f"multi-token prediction (give the plan {WITHOUT_PREDICTION})")
    if found:
        raise CheckpointError(
            f"{place}: {model_type} does not express the plan's model: {found[0]}"
        )
    return architecture


def _overruled(
    theirs: HfFolder, architecture: Architecture, stage: Stage, ignored: Collection[str]
) -> list[str]:
    """Return where config.json says another model than the plan; all of it must be in ignored keys."""

    def without(*keys: str) -> list[str]:
        config = {key: value for key, value in theirs.config.items() if key not in keys}
        return list(differences(architecture, stage, config))

    place, found = theirs.path / "config.json", without()
    for key in ignored:
        if without(key) == found:
            raise CheckpointError(
                f"{place}: --ignore-config {key}: agrees with the plan, or is not compared"
            )
    if differing := without(*ignored):
        wrong = [key for key in theirs.config if not without(*ignored, key)]
        remedy = f" (if that is wrong, give --ignore-config {wrong[0]})" if wrong else ""
        raise CheckpointError(
            f"{place}: is of another model than the plan: {'; '.join(differing)}{remedy}"
        )
    return found


def _source(
    theirs: HfFolder, architecture: Architecture, model: Model, found: list[Entry]
) -> _Source:
    """Compare names and shapes of all tensors with the model's before one of them is read."""
    place = str(theirs.path)
    tensors = theirs.tensors(architecture.table)
    _check_prediction(place, tensors, found)
    found = [entry for entry in found if not entry.is_copy or entry.theirs[0][0] in tensors]
    wanted = {name: shape for entry in found for name, shape in entry.theirs}
    # transformers keeps a bias in any such model; without one it is 0, and moves no choice.
    useless = useless_norms(architecture.table, model)
    left_out = []
    for name in sorted(tensors.keys() - wanted.keys()):
        is_bias = name.endswith(_BIAS) and not read(tensors[name]).any()
        if name in useless or is_bias:
            audit.check_shape(
                place, name, tensors[name].shape, useless.get(name, tensors[name].shape)
            )
            values = read(tensors.pop(name))
            audit.check_finite(place, name, values)
            left_out.append(audit.record(name, values))
    remedy = _remedy(architecture, model, set(tensors), set(wanted))
    audit.check_names(place, set(tensors), set(wanted), remedy)
    for name, shape in wanted.items():
        audit.check_shape(place, name, tensors[name].shape, shape)
    # One type for all; where theirs differ, the one that holds them all.
    dtypes = {
        tensors[name].dtype for entry in found if not entry.is_float32 for name, _ in entry.theirs
    }
    return _Source(
        place=place,
        tensors=tensors,
        entries=found,
        left_out=left_out,
        hashes=audit.read_hashes(theirs.path),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )


def _check_prediction(place: str, tensors: dict[str, HfTensor], found: list[Entry]) -> None:
    """Raise CheckpointError if a folder holds nothing of a prediction that the model has."""
    theirs = [name for entry in found if entry.ours.startswith("mtp.") for name, _ in entry.theirs]
    if theirs and not any(name in tensors for name in theirs):
        raise CheckpointError(
            f"{place}: holds no multi-token prediction; give the plan {WITHOUT_PREDICTION}"
        )


def _remedy(architecture: Architecture, model: Model, names: set[str], wanted: set[str]) -> str:
    """Return what to do where folder and model differ by a whole part; else nothing."""
    missing, extra = wanted - names, names - wanted
    if missing and missing == {name for name in wanted if name.endswith(_BIAS)}:
        return f"; give the plan {WITHOUT_BIAS}"
    table = architecture.table
    of_prediction = ("mtp.", table.layer.format(model.num_layers))
    if extra and table.prediction and not model.mtp and min(extra).startswith(of_prediction):
        return "; the plan's model needs model.mtp, and its stages mtp_loss"
    return ""


def _what_is_left_out(records: list[audit.Record]) -> str:
    more = f" (and {len(records) - 1:,} more, in {audit.AUDIT})" if len(records) > 1 else ""
    return f"left out: {records[0].name}{more}; the plan's model has no such tensor"


def _needed_bytes(source: _Source) -> int:
    sizes = (
        math.prod(entry.shape) * (4 if entry.is_float32 else source.dtype.itemsize)
        for entry in source.entries
    )
    return import_bytes(len(source.tensors), max(sizes))


def _write_weights(writer: TensorWriter, source: _Source, say: Say) -> list[audit.Pair]:
    pairs: list[audit.Pair] = []
    done = said = 0
    for entry in source.entries:
        if entry.is_copy:
            original = next(pair for pair in pairs if pair.ours.name == entry.ours)
            pairs.append(_compare(source, entry, original))
            continue
        # In a function of its own, so that nothing of one tensor stays while the next is read.
        pair, num_bytes = _write(writer, source, entry)
        pairs.append(pair)
        done += num_bytes
        if done - said >= _SAY_EVERY_BYTES:
            say(f"{entry.ours}  {done:,} bytes so far")
            said = done
    return pairs


def _write(writer: TensorWriter, source: _Source, entry: Entry) -> tuple[audit.Pair, int]:
    """Write one tensor of ours, or one expert of it; return what it is, and its bytes."""
    parts = tuple(read(source.tensors[name]) for name, _ in entry.theirs)
    records = tuple(
        _record(source, name, part) for (name, _), part in zip(entry.theirs, parts, strict=True)
    )
    dtype = torch.float32 if entry.is_float32 else source.dtype
    ours = entry.rule.join(parts).to(dtype).contiguous()
    assert tuple(ours.shape) == entry.shape, (entry.ours, ours.shape)
    writer.write(entry.ours, ours, entry.index)
    expert = None if entry.index is None else entry.index[0]
    return audit.Pair(ours=audit.record(entry.ours, ours, expert), theirs=records), ours.nbytes


def _compare(source: _Source, entry: Entry, original: audit.Pair) -> audit.Pair:
    """Return a copy beside our tensor; its hash must be that of the original, which was read before."""
    [(name, _)] = entry.theirs
    copy, table = _record(source, name, read(source.tensors[name])), original.theirs[0]
    if (copy.dtype, copy.sha256) != (table.dtype, table.sha256):
        raise CheckpointError(
            f"{source.place}: {copy.name} is not equal to {table.name}; "
            "the plan's model has one table for both"
        )
    return audit.Pair(ours=original.ours, theirs=(copy,))


def _record(source: _Source, name: str, part: Tensor) -> audit.Record:
    audit.check_finite(source.place, name, part)
    record = audit.record(name, part)
    if source.hashes is not None and source.hashes.get(name) != record.sha256:
        raise CheckpointError(
            f"{source.place}: {name} is not the tensor of {audit.AUDIT}, its SHA-256 is another"
        )
    return record


def _progress(plan: Plan, tokens_seen: int, run_dir: Path) -> Progress:
    """Return the place in a plan; it must be the end of a step, or the beginning."""
    for segment in plan.segments:
        position = tokens_seen - segment.tokens_start
        if not 0 <= position < segment.tokens:
            continue
        ends = range(segment.num_steps + 1)
        step = bisect.bisect_left(
            ends,
            position,
            key=lambda step: position_at_step(segment.batch_ramp, segment.seq_len, step),
        )
        end = position_at_step(segment.batch_ramp, segment.seq_len, step)
        if end != position:
            raise CheckpointError(
                f"--tokens-seen {tokens_seen:,} is within a step of {segment.stage}; "
                f"give {segment.tokens_start + end:,}"
            )
        return Progress(
            plan_digest=digest(plan),
            segment=segment.index,
            step=segment.steps_start + step,
            tokens_seen=tokens_seen,
            segment_done=False,
            ledger=(),
        )
    total = plan.segments[-1].tokens_start + plan.segments[-1].tokens
    raise CheckpointError(
        f"--tokens-seen {tokens_seen:,} is not within the {total:,} tokens of {run_dir / 'plan.json'}"
    )
