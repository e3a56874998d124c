"""A Hugging Face folder: its configuration, and its tensors one at a time."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamoe.convert.entries import usual_name
from megamoe.convert.tables import Table
from megamoe.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Experts in one tensor: its ending, and what its rows of one expert are.
_FUSED = {
    ".experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".experts.down_proj": ("down_proj",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTensor:
    """Where a tensor is, or one part of one that holds all experts."""

    file: Path
    name: str  # in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0  # of the expert's


class HfFolder:
    """What a Hugging Face folder holds."""

    def __init__(self, path: Path) -> None:
        """Read config.json.

        Raises:
            CheckpointError: there is none, or it is not JSON.
        """
        self.path = path
        self.config = _read_json(path / "config.json")

    def tensors(self, table: Table) -> dict[str, HfTensor]:
        """Return all tensors by the names of a table, experts one by one.

        Raises:
            CheckpointError: a file is missing or damaged, the index names none beside it, or a tensor
                is quantised or there twice.
        """
        found: dict[str, HfTensor] = {}
        for file in self._files():
            for tensor in _tensors_of(file):
                for name, part in _unfused(usual_name(table, tensor.name), tensor):
                    if name in found:
                        raise CheckpointError(f"{self.path}: {name} is there twice")
                    found[name] = part
        return found

    def _files(self) -> list[Path]:
        index = self.path / _INDEX
        if index.is_file():
            files = [self.path / name for name in _files_of(index)]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path}: holds no safetensors; no other form is read")
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing, {_INDEX} names it")
        return files


def read(tensor: HfTensor) -> Tensor:
    """Return the values of a tensor, or of its part.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(tensor.file, framework="pt") as file:
            if tensor.expert is None:
                values: Tensor = file.get_tensor(tensor.name)
            else:
                rows = slice(tensor.first_row, tensor.first_row + tensor.shape[0])
                values = file.get_slice(tensor.name)[tensor.expert, rows]
            return values
    except SafetensorError as error:
        raise CheckpointError(f"{tensor.file}: is damaged ({error})") from error


def _tensors_of(file: Path) -> list[HfTensor]:
    tensors = []
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                stored = opened.get_slice(name)
                if stored.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: {name} is {stored.get_dtype()}; give weights that are not quantised"
                    )
                dtype, shape = _DTYPES[stored.get_dtype()], tuple(stored.get_shape())
                tensors.append(HfTensor(file=file, name=name, dtype=dtype, shape=shape))
    except SafetensorError as error:
        raise CheckpointError(f"{file}: is damaged ({error})") from error
    return tensors


def _unfused(name: str, tensor: HfTensor) -> list[tuple[str, HfTensor]]:
    """Return a tensor, or where it holds all experts, its parts by their usual names."""
    for ending, parts in _FUSED.items():
        if name.endswith(ending) and len(tensor.shape) == 3:
            prefix = name.removesuffix(ending.rpartition(".")[2])
            rows, rest = divmod(tensor.shape[1], len(parts))
            if rest:
                raise CheckpointError(
                    f"{tensor.file}: {name} has {tensor.shape[1]} rows, an odd number"
                )
            return [
                (
                    f"{prefix}{expert}.{part}.weight",
                    HfTensor(
                        file=tensor.file,
                        name=tensor.name,
                        dtype=tensor.dtype,
                        shape=(rows, tensor.shape[2]),
                        expert=expert,
                        first_row=rows * number,
                    ),
                )
                for expert in range(tensor.shape[0])
                for number, part in enumerate(parts)
            ]
    return [(name, tensor)]


def _files_of(index: Path) -> list[str]:
    """Return the files that an index names, each once; all are beside it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is not an object of tensors and their files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{index}: {tensor} is in {name!r}, which is no file beside it")
    return sorted(set(weight_map.values()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a Hugging Face folder") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not an object")
    return data
