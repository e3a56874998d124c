"""How two checkpoints differ, tensor by tensor."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.checkpoints.tensors import kind_of
from megamoe.convert.audit import dtype_name
from megamoe.convert.ours import EXPERTS
from megamoe.mcore.stored import StoredTensor, TensorReader

_BLOCK = 1 << 22  # values compared at once, in float64
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What of one tensor differs between checkpoints A and B."""

    name: str
    problem: str | None  # 'only in A', another shape or dtype; then there are no figures
    num_different: int  # values whose bits differ
    largest: float  # |A - B|; infinite where one of the two is NaN or infinite
    squares: tuple[float, float]  # sums of (A - B)^2 and of A^2

    @property
    def relative(self) -> float:
        """Return |A - B| / |A|, of the whole tensor; infinite where A is zero and B is not."""
        return relative(self.squares)

    @property
    def is_equal(self) -> bool:
        """Tell whether it is the same tensor, bit for bit."""
        return self.problem is None and self.num_different == 0


def differences(a: TensorReader, b: TensorReader) -> Iterator[Difference]:
    """Yield every tensor of two checkpoints, in the order of names."""
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        if problem := _problem(name, a, b):
            yield Difference(
                name=name, problem=problem, num_different=0, largest=0.0, squares=(0.0, 0.0)
            )
        else:
            yield _compared(name, a, b)


def relative(squares: tuple[float, float]) -> float:
    """Return the root of the quotient of two sums of squares; 0 / 0 is 0."""
    difference, size = squares
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / size)


def table(found: list[Difference], *, every: bool) -> Iterator[str]:
    """Yield the lines of a report: a row for each kind of tensor, then the most different ones.

    Args:
        found: all tensors.
        every: name all that differ, not the first of them.
    """
    by_kind: dict[str, list[Difference]] = {}
    for difference in found:
        by_kind.setdefault(kind_of(difference.name), []).append(difference)
    width = max(len(kind) for kind in by_kind)
    yield f"{'':<{width}}  {'tensors':>8}  {'equal':>8}  {'max |A-B|':>10}  {'|A-B| / |A|':>11}"
    for kind, members in sorted(by_kind.items()):
        equal = sum(member.is_equal for member in members)
        largest = max(member.largest for member in members)
        squares = [math.fsum(member.squares[i] for member in members) for i in range(2)]
        yield (
            f"{kind:<{width}}  {len(members):>8,}  {equal:>8,}  {largest:>10.3g}  "
            f"{relative((squares[0], squares[1])):>11.3g}"
        )
    unequal = [difference for difference in found if not difference.is_equal]
    unequal.sort(key=_interest)
    shown = unequal if every else unequal[:_SHOWN]
    for one in shown:
        if one.problem:
            yield f"{one.name}  {one.problem}"
        else:
            yield (
                f"{one.name}  {one.num_different:,} values, max |A-B| {one.largest:.3g}, "
                f"|A-B| / |A| {one.relative:.3g}"
            )
    if len(unequal) > len(shown):
        yield f"and {len(unequal) - len(shown):,} more; --tensors names all"


def _interest(one: Difference) -> tuple[bool, bool, float, str]:
    """Order: what cannot be compared, then weights, then the rest; of each the most different."""
    return one.problem is None, kind_of(one.name) != "weights", -one.relative, one.name


def _problem(name: str, a: TensorReader, b: TensorReader) -> str | None:
    ours, theirs = a.tensors.get(name), b.tensors.get(name)
    if ours is None:
        return "only in B"
    if theirs is None:
        return "only in A"
    if ours != theirs:
        return f"{_described(ours)} in A, {_described(theirs)} in B"
    return None


def _described(stored: StoredTensor) -> str:
    return f"{dtype_name(stored.dtype)} {list(stored.shape)}"


def _compared(name: str, a: TensorReader, b: TensorReader) -> Difference:
    shape = a.tensors[name].shape
    # One expert at a time: a weight of all experts of a layer is the largest there is.
    indices = range(shape[0]) if EXPERTS in name and len(shape) > 1 else [None]
    count, largest, squares, size = 0, 0.0, 0.0, 0.0
    for index in indices:
        ours, theirs = a.read(name, index), b.read(name, index)
        for x, y in zip(_blocks(ours), _blocks(theirs), strict=True):
            different = (x.view(torch.uint8) != y.view(torch.uint8)).view(len(x), -1).any(dim=1)
            count += int(different.sum())
            wide = x.double()
            gap = (wide - y.double()).masked_fill(~different, 0)  # equal infinities are no gap
            largest = max(largest, float(gap.abs().nan_to_num(math.inf).max()))
            squares += float(gap.square().sum())
            size += float(wide.square().sum())
    return Difference(
        name=name, problem=None, num_different=count, largest=largest, squares=(squares, size)
    )


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.contiguous().flatten()
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK]
