"""Layouts as words: 'dp2xpp2xep2' is a rank grid, and the number of processes it takes.

Beside its axes a layout may have a scheme of context parallelism, 'cp2xring', and what the chunks of
its pipeline hold, 'pp2xEt|tttL' (megamoe/recipe/pipeline.py, without commas).
"""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from megamoe.errors import PlanError
from megamoe.recipe.check import nearest
from megamoe.recipe.layout import Layout, one_rank

# What `megamoe parity` compares where no layouts are named: every axis, and what meets in pairs.
DEFAULT = "dp2,tp2,pp2,pp2xvpp2,ep4,cp2,cp4,tp2xpp2,ep2xpp2,cp2xep2,tp2xcp2xep2,dp2xpp2xep2,tp2xpp2xcp2xep2"
_AXES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
# Fields of a layout that are words: a word of a layout is the value of one of them.
_FIELDS = {item.name: item.type for item in fields(Layout)}
_WORDS = dict.fromkeys(get_args(_FIELDS["cp_scheme"]), "cp_scheme")
_WORDS |= dict.fromkeys(("all_gather", "all_to_all"), "dispatcher")  # the others need a GPU
_WORD = re.compile(r"([a-z]+)([1-9][0-9]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A layout, what it is called, and the processes it is run on."""

    name: str
    layout: Layout
    world_size: int


def parse_layouts(text: str, micro_batch: int) -> tuple[Grid, ...]:
    """Return the layouts of a list such as 'tp2,cp2xring,dp2xpp2xep2'.

    An axis that is not named is 1. dp is what is named, or the least that fills the grids of both
    the dense layers and the experts; so 'ep4' takes four processes.

    Raises:
        PlanError: a word is no axis with a size, contradicts another, or has no effect.
        FieldError: the axes contradict each other.
    """
    names = [name.strip() for name in text.split(",")]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise PlanError(f"--layouts: {doubled[0]!r} is there twice; give it once")
    return tuple(_parse(name, micro_batch) for name in names)


def one_process(micro_batch: int) -> Grid:
    """Return the layout that the others are compared with."""
    return Grid(name="one", layout=one_rank(micro_batch), world_size=1)


def _parse(name: str, micro_batch: int) -> Grid:
    given: dict[str, Any] = {}
    for word in name.split("x"):
        field, value = _read(word, name)
        if field in given:
            words = "" if field in _AXES else f", {given[field]} and {value}"
            raise PlanError(f"--layouts: {name!r} has {field} twice{words}; give it once")
        given[field] = value
    dp = given.pop("dp", None)
    layout = replace(one_rank(micro_batch), **given)
    _check_used(name, given, layout)
    dense = layout.tp * layout.pp * layout.cp
    least = math.lcm(dense, layout.etp * layout.ep * layout.pp) // dense
    return Grid(name=name, layout=layout, world_size=dense * (dp or least))


def _read(word: str, name: str) -> tuple[str, Any]:
    """Return the field of a layout that a word gives, and its value."""
    if word in _WORDS:
        return _WORDS[word], word
    if word.startswith("E"):
        return "pipeline", word
    match = _WORD.fullmatch(word)
    if match is None or match[1] not in _AXES:
        axis = match[1] if match else word
        raise PlanError(
            f"--layouts: {word!r} in {name!r} is no axis with a size, such as tp2"
            + nearest(axis, [*_AXES, *_WORDS])
        )
    return match[1], int(match[2])


def _check_used(name: str, given: dict[str, Any], layout: Layout) -> None:
    """Refuse a word without effect: the layout would be another than its name says."""
    for field, axis, size in (
        ("cp_scheme", "cp", layout.cp),
        ("dispatcher", "ep", layout.ep * layout.etp),
    ):
        if field in given and size == 1:
            word = given[field]
            raise PlanError(
                f"--layouts: {word!r} in {name!r} has no effect without {axis}; "
                f"add {axis}2, or leave {word} out"
            )
