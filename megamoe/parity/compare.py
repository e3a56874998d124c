"""What two layouts left behind, compared in float64: measured steps, and checkpoints by tensor."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megamoe.checkpoints.folder import name_of
from megamoe.checkpoints.tensors import SHARES, kind_of
from megamoe.mcore.stored import TensorReader

GRADIENT, ADAM, WEIGHT = "gradient", "adam", "weight"
KINDS = (GRADIENT, ADAM, WEIGHT)
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|exp_avg|exp_avg_sq)\.(.+)")
_KINDS = {"param": WEIGHT, "exp_avg": GRADIENT, "exp_avg_sq": ADAM}
_ROUTER = (SHARES, "expert_bias")  # counted, not computed: equal or wrong
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
    beyond: tuple[str, ...]  # whatever exceeds the bound: what was measured, then tensors
    first_tensor: str | None  # of those, in the order of the forward pass
    idle_experts: int  # that had no token in a whole batch, over layers and steps

    @property
    def is_equal(self) -> bool:
        """Tell whether nothing exceeds the bound."""
        return not self.beyond


@dataclass(frozen=True, slots=True)
class Left:
    """What one layout left behind: what its steps measured, and the tensors stored after each."""

    results: list[dict[str, Any]]
    stored: list[dict[str, Tensor]]


def read(run_dir: Path, results: list[dict[str, Any]]) -> Left:
    """Return what a run left in its folder.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
    """
    folder = run_dir / "checkpoints"
    return Left(results, [_load(folder / name_of(result["tokens_seen"])) for result in results])


def compare(ours: Left, one: Left, bound: float) -> Comparison:
    """Compare a layout with one process.

    exp_avg is the gradient (megamoe/parity/small.py); of exp_avg_sq the root is compared, which errs as
    the gradients do.
    """
    measured, beyond = _measured(ours, one, bound)
    found = list(_differences(ours, one))
    differing = [each.name for kind, each in found if each.difference > (bound if kind else 0)]
    differing += [
        f"step {step}: {name} copies"
        for step, result in enumerate(ours.results, 1)
        for name in result["unequal_copies"]
    ]
    tensors = {
        kind: max((each for of, each in found if of == kind), key=lambda each: each.difference)
        for kind in KINDS
    }
    return Comparison(
        measured=measured,
        tensors=tensors,
        beyond=(*beyond, *differing),
        first_tensor=next(iter(differing), None),
        idle_experts=_idle_experts(one),
    )


def _differences(ours: Left, one: Left) -> Iterator[tuple[str | None, Worst]]:
    """Yield the kind and the difference of every tensor, in the order of the forward pass."""
    for step, (actual, expected) in enumerate(zip(ours.stored, one.stored, strict=True), 1):
        for name in _in_order(expected | actual):
            kind = _kind(name)
            label = "" if kind in (WEIGHT, None) else f" {kind}"
            difference = _difference(actual.get(name), expected.get(name), kind)
            yield kind, Worst(difference=difference, name=f"step {step}: {_plain(name)}{label}")


def _idle_experts(left: Left) -> int:
    shares = [each for stored in left.stored for each in stored.items() if each[0].endswith(SHARES)]
    return sum(int((tensor == 0).sum()) for _, tensor in shares)


def _measured(ours: Left, one: Left, bound: float) -> tuple[dict[str, float], list[str]]:
    measured: dict[str, float] = {}
    beyond = []
    for step, (actual, expected) in enumerate(zip(ours.results, one.results, strict=True), 1):
        beyond += [f"step {step}: {name}" for name in _EXACT if actual[name] != expected[name]]
        values, wanted = _values(actual), _values(expected)
        for name in wanted | values:
            difference = _ratio(
                abs(values.get(name, math.nan) - wanted.get(name, math.nan)),
                abs(wanted.get(name, 0)),
            )
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


def _difference(actual: Tensor | None, expected: Tensor | None, kind: str | None) -> float:
    """Return the largest difference, relative to the largest value; inf where one is missing."""
    if actual is None or expected is None or actual.shape != expected.shape:
        return math.inf
    actual_64, expected_64 = actual.double(), expected.double()
    if kind == ADAM:
        actual_64, expected_64 = actual_64.sqrt(), expected_64.sqrt()
    largest = float((actual_64 - expected_64).abs().max())
    return _ratio(largest, float(expected_64.abs().max()))


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    # Not finite is not equal, and compares with no bound.
    return difference / size if size and math.isfinite(difference / size) else math.inf


def _kind(name: str) -> str | None:
    """Return what a tensor is compared as; None: it must be equal."""
    if match := _STATE.fullmatch(name):
        return _KINDS[match[1]]
    return None if name.endswith(_ROUTER) else WEIGHT


def _plain(name: str) -> str:
    match = _STATE.fullmatch(name)
    return match[2] if match else name


def _load(folder: Path) -> dict[str, Tensor]:
    reader = TensorReader(folder)
    # Of random states each rank has its own.
    return {name: reader.read(name) for name in reader.tensors if kind_of(name) != "random state"}


def _in_order(stored: dict[str, Tensor]) -> list[str]:
    """Return names in the order of the forward pass, in which the model's own are stored."""
    places = {name: place for place, name in enumerate(stored)}
    return sorted(places, key=lambda name: (places.get(_plain(name), -1), places[name]))
