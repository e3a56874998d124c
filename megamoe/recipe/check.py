"""Checks that every recipe class shares: each field has its declared type and lies in its range.

A field is declared with a plain type (`int`, `float`, `bool`, `str`, another recipe class, a union
of recipe classes, `None`), a `tuple[...]`, a `Literal[...]`, or `Annotated[type, Range(...)]`.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megamoe.errors import RecipeError


class FieldError(RecipeError):
    """One field of one object is wrong; the loader adds the file, the line and the stage.

    Args:
        field: name of the field, empty when the whole object is at fault.
        problem: what was given and what would do.
    """

    def __init__(self, field: str, problem: str) -> None:
        """Keep the two parts apart so that the loader can put the place between them."""
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, both included; `above` excludes its bound."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def describe(self) -> str:
        """Return the range as words: 'above 0 and at most 1'."""
        parts = []
        if self.above != -math.inf:
            parts.append(f"above {self.above:g}")
        if self.low != -math.inf:
            parts.append(f"at least {self.low:g}")
        if self.high != math.inf:
            parts.append(f"at most {self.high:g}")
        return " and ".join(parts)

    def holds(self, value: float) -> bool:
        """Tell whether a finite number lies in the range."""
        return math.isfinite(value) and self.low <= value <= self.high and value > self.above


PositiveInt = Annotated[int, Range(low=1)]
NaturalInt = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(low=0, high=1)]


class Checked:
    """Base of every recipe class: its fields are checked as soon as an object is made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Check types and ranges, then the rules of the class."""
        for name, declared in field_types(type(self)).items():
            _check_value(name, getattr(self, name), declared)
        self.check()

    def check(self) -> None:
        """Raise FieldError when two fields of the object contradict each other."""


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Return the declared types of a recipe class, `Annotated` kept."""
    key: Any = cls  # mypy takes a class for the hash of its instances
    return _field_types(key)


@cache
def _field_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in fields(cls)}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for the nearest known name, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def type_name(declared: Any) -> str:
    """Return a declared type as a person would write it."""
    origin, args = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return f"{type_name(args[0])} {args[1].describe()}"
    if origin in (Union, UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a tuple of ({type_name(args[0])}), such as (x, ...)"
        return f"a tuple ({', '.join(type_name(arg) for arg in args)})"
    return "None" if declared is NoneType else str(declared.__name__)


def _check_value(where: str, value: Any, declared: Any) -> None:
    origin, args = get_origin(declared), get_args(declared)
    if origin is Annotated:
        _check_value(where, value, args[0])
        if not args[1].holds(value):
            raise FieldError(where, f"{value!r} is out of range; give {type_name(declared)}")
    elif origin in (Union, UnionType):
        _check_union(where, value, declared)
    elif origin is Literal:
        if value not in args or isinstance(value, bool) != isinstance(args[0], bool):
            hint = nearest(value, args) if isinstance(value, str) else ""
            raise FieldError(where, f"{value!r} is not one of {type_name(declared)}{hint}")
    elif origin is tuple:
        _check_tuple(where, value, declared)
    elif not _is_instance(value, declared):
        whole = declared is int and isinstance(value, float) and value.is_integer()
        hint = f"; give {int(value):_}" if whole else ""
        raise FieldError(where, f"{_shown(value)} is not of type {type_name(declared)}{hint}")


def _check_union(where: str, value: Any, declared: Any) -> None:
    for option in get_args(declared):
        plain = get_args(option)[0] if get_origin(option) is Annotated else option
        if (get_origin(plain) or plain) is tuple and isinstance(value, tuple):
            return _check_value(where, value, option)
        if get_origin(plain) is None and _is_instance(value, plain):
            return _check_value(where, value, option)
    raise FieldError(where, f"{_shown(value)} is not of type {type_name(declared)}")


def _check_tuple(where: str, value: Any, declared: Any) -> None:
    args = get_args(declared)
    if not isinstance(value, tuple):
        raise FieldError(where, f"{_shown(value)} is not {type_name(declared)}")
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise FieldError(where, f"{_shown(value)} is not {type_name(declared)}")
    for index, (item, item_type) in enumerate(zip(value, args, strict=True)):
        _check_value(f"{where}[{index}]", item, item_type)


def _is_instance(value: Any, declared: Any) -> bool:
    if declared is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, declared)


def _shown(value: Any) -> str:
    if is_dataclass(value):
        return f"{type(value).__name__}(...)"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
