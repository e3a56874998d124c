"""What would do instead of a layout that does not fit: each remedy passes every check."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from megamoe.recipe.layout import Layout
from megamoe.recipe.pipeline import EVEN
from megamoe.recipe.stage import Stage

_AXES = ("tp", "pp", "vpp", "cp", "ep", "etp")
_WORDS = {"cp_scheme": "auto", "dispatcher": "all_to_all"}  # values that are never refused
_MOST_VALUES = 7  # of an axis that are tried, the nearest
_MOST_LAYOUTS = 8_000  # that are looked at, and
_MOST_TRIED = 100  # that are checked, of each number of changes: tens of milliseconds in all
_MOST_WORLDS = 64  # larger and smaller ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A stage that does not fit, and how to tell what does."""

    stage: Stage
    world_size: int
    devices_per_node: int  # 1: a node may have any number
    num_routed: int  # experts, which ep divides
    fits: Callable[[Stage, int], bool]  # tells whether a stage passes every check on a world
    suits: Callable[[Stage], bool]  # tells the same of model and sequence alone


def remedies(asked: Asked) -> str:
    """Return what would do instead: '; use world size 16 or 32; nearest possible layout: dp4 tp2'."""
    worlds = list(_worlds(asked))
    found = [*worlds, *_sequences(asked), *_batches(asked)]
    layout, size = nearest_layout(asked), asked.world_size
    while layout is None and not worlds and size > 1:  # one rank is always possible
        size = 2 ** ((size - 1).bit_length() - 1)  # the next power of two below
        layout = nearest_layout(replace(asked, world_size=size))
    if layout is not None:
        place = "" if size == asked.world_size else f" on world size {size:,}"
        sizes = _words(layout, asked.stage.layout, size)
        found.append(f"nearest possible layout{place}: {sizes}")
    return "".join(f"; {each}" for each in found)


def nearest_layout(asked: Asked) -> Layout | None:
    """Return the layout for the same world that changes the fewest axes, and those the least.

    It is the nearest of those looked at: a few sizes of each axis, and of each number of changes the
    smallest `_MOST_TRIED`. None: none of them fits.
    """
    layout = asked.stage.layout
    for changes in _changes(asked):
        changes.sort(key=lambda change: _distance(layout, change))
        for change in changes[:_MOST_TRIED]:
            stage = replace(asked.stage, layout=_changed(layout, change))
            if asked.fits(stage, asked.world_size):
                return stage.layout
    return None


def axes_text(dp: int, layout: Layout) -> str:
    """Return the axes of the rank grid that are in use, and a written pipeline: 'dp64 pp4 ep8'."""
    sizes = [(axis, getattr(layout, axis)) for axis in _AXES]
    words = [f"dp{dp}", *(f"{axis}{size}" for axis, size in sizes if size > 1)]
    return " ".join(words if layout.pipeline == EVEN else [*words, layout.pipeline])


def _changed(layout: Layout, change: dict[str, Any]) -> Layout:
    """Return the layout with other sizes; a written pipeline is one for its own number of chunks."""
    pipeline = EVEN if change.keys() & {"pp", "vpp"} else layout.pipeline
    return replace(layout, pipeline=pipeline, **change)


def _words(layout: Layout, before: Layout, world_size: int) -> str:
    """Return a layout as its axes in use, and what else of it is another than before."""
    dp = world_size // (layout.tp * layout.pp * layout.cp)
    others = [
        f"{name} {getattr(layout, name)}"
        for name in ("micro_batch", "pipeline", *_WORDS)
        if getattr(layout, name) != getattr(before, name)
    ]
    return " ".join([axes_text(dp, layout), *others])


def _changes(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    """Yield the changes of one axis that fill the world, then those of two, and so on.

    When they become too many, only tp, pp and ep are looked for and the others are not used.
    """
    layout = asked.stage.layout
    values = {name: tuple(_values(asked, name)) for name in (*_AXES, "micro_batch", *_WORDS)}
    # An axis whose size is impossible whatever the others are has to change.
    wrong = {name for name in _AXES if getattr(layout, name) not in values[name]}
    others = {
        name: tuple(value for value in values[name] if value != getattr(layout, name))
        for name in values
    }
    looked_at = 0
    for count in range(max(1, len(wrong)), len(values) + 1):
        changed = [names for names in combinations(values, count) if wrong <= set(names)]
        looked_at += sum(math.prod(len(others[name]) for name in names) for names in changed)
        if looked_at > _MOST_LAYOUTS:
            break
        yield [change for names in changed for change in _choices(names, others, asked)]
    plain = _WORDS | {"vpp": 1, "cp": 1, "etp": 1, "micro_batch": 1}
    few = {name: (plain[name],) if name in plain else values[name] for name in values}
    yield list(_choices(tuple(values), few, asked))


def _choices(
    names: tuple[str, ...], values: dict[str, tuple[Any, ...]], asked: Asked
) -> Iterator[dict[str, Any]]:
    for choice in product(*(values[name] for name in names)):
        change = dict(zip(names, choice, strict=True))
        if _fills(change, asked):
            yield change


def _values(asked: Asked, name: str) -> Iterator[Any]:
    """Yield what a field may be by itself, nearest first."""
    layout = asked.stage.layout
    before = getattr(layout, name)
    if name in _WORDS:
        yield _WORDS[name]
        return
    if name == "micro_batch":
        yield from _nearest(before, _divisors(before))
        return
    whole = asked.num_routed if name == "ep" else asked.world_size
    sizes = range(1, 2 * layout.vpp + 1) if name == "vpp" else _divisors(whole)
    yield from _nearest(before, (size for size in sizes if _is_possible(asked, name, size)))


def _is_possible(asked: Asked, name: str, size: int) -> bool:
    """Tell whether a size does for the world, or for the model while all other axes are 1."""
    layout = asked.stage.layout
    if name == "vpp" or (name == "pp" and size == layout.pp and layout.pipeline != EVEN):
        return True
    if name == "ep":
        return asked.world_size % size == 0
    ones = replace(layout, tp=1, pp=1, vpp=1, pipeline=EVEN, cp=1, ep=1, etp=1)
    alone: dict[str, Any] = {name: size}
    return asked.suits(replace(asked.stage, layout=replace(ones, **alone)))


def _fills(change: dict[str, Any], asked: Asked) -> bool:
    """Tell whether sizes fill the world and share out its batches: most do not, and this is quick."""
    layout = asked.stage.layout
    tp, pp, vpp, cp, ep, etp = (change.get(axis) or getattr(layout, axis) for axis in _AXES)
    dp, rest = divmod(asked.world_size, tp * pp * cp)
    if rest or asked.world_size % (etp * ep * pp) or (vpp > 1 and pp == 1):
        return False
    unit = dp * (change.get("micro_batch") or layout.micro_batch) * (pp if vpp > 1 else 1)
    return all(size % unit == 0 for _, size in asked.stage.batch_ramp)


def _distance(layout: Layout, change: dict[str, Any]) -> float:
    return math.fsum(
        1.0 if name in _WORDS else abs(math.log2(value / getattr(layout, name)))
        for name, value in change.items()
    )


def _worlds(asked: Asked) -> Iterator[str]:
    layout, world = asked.stage.layout, asked.world_size
    dense, experts = layout.tp * layout.cp, layout.etp * layout.ep
    unit = math.lcm(layout.pp * math.lcm(dense, experts), asked.devices_per_node)
    first = world // unit * unit
    below = range(first - unit if first == world else first, 0, -unit)
    above = range(first + unit, first + unit * (_MOST_WORLDS + 1), unit)
    yield from _either(
        (below[:_MOST_WORLDS], above),
        lambda size: asked.fits(asked.stage, size),
        "world size",
    )


def _sequences(asked: Asked) -> Iterator[str]:
    layout, stage = asked.stage.layout, asked.stage
    unit = layout.tp * layout.cp
    first = stage.seq_len // unit * unit
    if first != stage.seq_len:
        yield from _either(
            ((first,) if first else (), (first + unit,)),
            lambda size: asked.fits(replace(stage, seq_len=size), asked.world_size),
            "seq_len",
        )


def _batches(asked: Asked) -> Iterator[str]:
    layout, stage = asked.stage.layout, asked.stage
    dp = max(1, asked.world_size // (layout.tp * layout.pp * layout.cp))
    unit = dp * layout.micro_batch * (layout.pp if layout.vpp > 1 else 1)
    ramp = tuple((start, max(1, round(size / unit)) * unit) for start, size in stage.batch_ramp)
    if ramp != stage.batch_ramp and asked.fits(replace(stage, batch_ramp=ramp), asked.world_size):
        entries = ", ".join(f"({start:_}, {size:_})" for start, size in ramp)
        yield f"use batch_ramp ({entries}{',' if len(ramp) == 1 else ''})"


def _either(
    sides: Iterable[Iterable[int]], fits: Callable[[int], bool], what: str
) -> Iterator[str]:
    """Yield the first that fits on each side of what does not, if any: 'use seq_len 60 or 64'."""
    sizes = [next((size for size in side if fits(size)), None) for side in sides]
    if found := " or ".join(f"{size:,}" for size in sizes if size is not None):
        yield f"use {what} {found}"


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)


def _nearest(before: int, sizes: Iterable[int]) -> list[int]:
    return sorted(sizes, key=lambda size: abs(math.log2(size / before)))[:_MOST_VALUES]
