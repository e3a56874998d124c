"""audit.json: name, shape, dtype and SHA-256 of each tensor of a conversion, on both sides."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.errors import CheckpointError

AUDIT = "audit.json"
FORMAT = 1
_CHECKED_AT_ONCE = 1 << 24  # numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One tensor, or one expert of it."""

    name: str
    index: int | None  # the expert
    dtype: str
    shape: tuple[int, ...]
    sha256: str  # of its values, row by row, lowest byte first


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One tensor of ours and what it is on the other side."""

    ours: Record
    theirs: tuple[Record, ...]


def record(name: str, tensor: Tensor, index: int | None = None) -> Record:
    """Return what a tensor is."""
    return Record(
        name=name,
        index=index,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        sha256=sha256(tensor),
    )


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values."""
    values: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_finite(place: str, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor holds NaN or an infinity."""
    # in parts: isfinite needs three times the memory of what it is given
    parts = torch.split(tensor.reshape(-1), _CHECKED_AT_ONCE)
    if count := sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts):
        raise CheckpointError(f"{place}: {name} holds {count:,} values that are NaN or infinite")


def check_shape(place: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise CheckpointError unless a tensor has the shape that the plan's model gives it."""
    if shape != wanted:
        raise CheckpointError(
            f"{place}: {name} is {list(shape)}, the plan's model has {list(wanted)}"
        )


def check_names(place: str, names: set[str], wanted: set[str], remedy: str = "") -> None:
    """Raise CheckpointError, with one name, unless there are exactly the wanted tensors."""
    for problem, found in (("is missing", wanted - names), ("is not of the model", names - wanted)):
        if found:
            more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
            raise CheckpointError(f"{place}: {min(found)} {problem}{more}{remedy}")


def audit_text(facts: dict[str, object], pairs: list[Pair]) -> str:
    """Return the text of audit.json."""
    content = {"format": FORMAT, **facts, "tensors": [asdict(pair) for pair in pairs]}
    return json.dumps(content, indent=1) + "\n"


def read_hashes(folder: Path) -> dict[str, str] | None:
    """Return the hash of each of their tensors as a folder's audit has it; None without one.

    Raises:
        CheckpointError: it is no audit.
    """
    path = folder / AUDIT
    if not path.is_file():
        return None
    try:
        pairs = json.loads(path.read_bytes())["tensors"]
        return {part["name"]: part["sha256"] for pair in pairs for part in pair["theirs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is damaged; remove it to import without an audit"
        ) from error
