"""What two layouts left behind, compared in float64: measured steps, and checkpoints by tensor."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megamoe.checkpoints.folder import name_of
from megamoe.mcore.stored import TensorReader

GRADIENT, ADAM, WEIGHT = "gradient", "adam", "weight"
KINDS = (GRADIENT, ADAM, WEIGHT)
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|exp_avg|exp_avg_sq)\.(.+)")
_KINDS = {"param": WEIGHT, "exp_avg": GRADIENT, "exp_avg_sq": ADAM}
_ROUTER = ("previous_shares_E", "expert_bias")  # counted, not computed: equal or wrong
_EXACT = ("expert_load", "loss_tokens", "tokens_seen", "lr", "sequences")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The largest difference of one kind, relative to the largest value of its tensor."""

    difference: float
    name: str  # of the tensor, or of what was measured; with the step


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a layout is from one process."""

    measured: dict[
        str, float
    ]  # loss, mtp_loss, grad_norm and each balancing loss: worse of the steps
    tensors: dict[str, Worst]  # by KINDS
    beyond: tuple[str, ...]  # whatever exceeds the bound, in the order of the forward pass
    idle_experts: int  # that had no token in a whole batch, over layers and steps

    @property
    def is_equal(self) -> bool:
        """Tell whether nothing exceeds the bound."""
        return not self.beyond


@dataclass(frozen=True, slots=True)
class Left:
    """What one layout left behind: what its steps measured, and a checkpoint after each."""

    results: list[dict[str, Any]]
    readers: list[TensorReader]


def read(run_dir: Path, results: list[dict[str, Any]]) -> Left:
    """Return what a run left in its folder.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
    """
    folder = run_dir / "checkpoints"
    return Left(
        results, [TensorReader(folder / name_of(result["tokens_seen"])) for result in results]
    )


def compare(ours: Left, one: Left, bound: float) -> Comparison:
    """Compare a layout with one process.

    exp_avg is the gradient (megamoe/parity/small.py); of exp_avg_sq the root is compared, which errs as
    the gradients do.
    """
    measured, beyond = _measured(ours, one, bound)
    worst = {kind: Worst(difference=0.0, name="") for kind in KINDS}
    idle = 0
    for step, (reader, expected) in enumerate(zip(ours.readers, one.readers, strict=True), 1):
        beyond += [
            f"step {step}: {name} is there only once" for name in _unpaired(reader, expected)
        ]
        for name in _in_order(expected.tensors.keys() & reader.tensors.keys(), expected):
            kind = _kind(name)
            difference = _difference(reader.read(name), expected.read(name), kind)
            where = f"step {step}: {_plain(name)}" + ("" if kind == WEIGHT else f" {kind}")
            if kind is None:
                idle += int((expected.read(name) == 0).sum()) if "shares" in name else 0
                beyond += [where.removesuffix(" None")] if difference else []
                continue
            if difference > worst[kind].difference:
                worst[kind] = Worst(difference=difference, name=where)
            if difference > bound:
                beyond.append(where)
    return Comparison(measured=measured, tensors=worst, beyond=tuple(beyond), idle_experts=idle)


def _measured(ours: Left, one: Left, bound: float) -> tuple[dict[str, float], list[str]]:
    measured: dict[str, float] = {}
    beyond = []
    for step, (actual, expected) in enumerate(zip(ours.results, one.results, strict=True), 1):
        beyond += [f"step {step}: {name}" for name in _EXACT if actual[name] != expected[name]]
        values, wanted = _values(actual), _values(expected)
        for name in wanted | values:
            difference = _relative(values.get(name, math.inf), wanted.get(name, math.inf))
            measured[name] = max(measured.get(name, 0.0), difference)
            if difference > bound:
                beyond.append(f"step {step}: {name}")
    return measured, beyond


def _values(result: dict[str, Any]) -> dict[str, float]:
    values = {
        "loss": result["loss"],
        "grad_norm": result["grad_norm"],
        **dict(result["aux_losses"]),
    }
    return values if result["mtp_loss"] is None else {**values, "mtp_loss": result["mtp_loss"]}


def _relative(actual: float, expected: float) -> float:
    if actual == expected:
        return 0.0
    difference = abs(actual - expected) / abs(expected) if expected else math.inf
    return math.inf if math.isnan(difference) else difference


def _difference(actual: Tensor, expected: Tensor, kind: str | None) -> float:
    """Return the largest difference, relative to the largest value; of shares and biases, if any."""
    if actual.shape != expected.shape:
        return math.inf
    actual_64, expected_64 = actual.double(), expected.double()
    if kind == ADAM:
        actual_64, expected_64 = actual_64.sqrt(), expected_64.sqrt()
    difference = float((actual_64 - expected_64).abs().max())
    size = float(expected_64.abs().max())
    return _relative(size + difference, size) if difference == 0 or size == 0 else difference / size


def _kind(name: str) -> str | None:
    """Return what a tensor is compared as; None: it must be equal."""
    if match := _STATE.fullmatch(name):
        return _KINDS[match[1]]
    return None if name.endswith(_ROUTER) else WEIGHT


def _plain(name: str) -> str:
    match = _STATE.fullmatch(name)
    return match[2] if match else name


def _unpaired(ours: TensorReader, one: TensorReader) -> list[str]:
    return sorted(name for name in ours.tensors.keys() ^ one.tensors.keys() if _counts(name))


def _in_order(names: Iterable[str], one: TensorReader) -> list[str]:
    """Return names in the order of the forward pass, in which the model's own are stored."""
    places = {name: place for place, name in enumerate(one.tensors)}
    counted = [name for name in names if _counts(name)]
    return sorted(counted, key=lambda name: (places.get(_plain(name), -1), places[name]))


def _counts(name: str) -> bool:
    return not name.startswith("random.")  # of each rank its own
