"""Plans as JSON: strict, canonical, with a digest.

A class becomes an object of its fields; where a field may hold one of several classes, the object
carries the class's name as "type". Reading refuses unknown keys, missing keys and wrong types.
"""

# ruff: noqa: ANN401  JSON data and declared types are of any type

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from megamoe.errors import PlanError
from megamoe.plan.plan import Plan
from megamoe.recipe.check import FieldError, field_types, nearest, type_name

T = TypeVar("T")


def to_json(value: object) -> dict[str, Any]:
    """Return a dataclass object as JSON data."""
    encoded = _encode(value, type(value))
    assert isinstance(encoded, dict), value
    return encoded


def from_json(data: object, cls: type[T], place: str) -> T:
    """Return the object that JSON data describes.

    Args:
        data: as `json.loads` returns it.
        cls: the class to make.
        place: where the data comes from, for messages.

    Raises:
        PlanError: a key is unknown or missing, a value has the wrong type or is out of range.
    """
    made = _decode(data, cls, f"{place}: {cls.__name__.lower()}")
    assert isinstance(made, cls), made
    return made


def digest(plan: Plan) -> str:
    """Return the SHA-256 of the plan's canonical JSON, as 64 hexadecimal digits."""
    text = json.dumps(to_json(plan), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        PlanError: the file is missing, is not JSON, or is not a plan of this version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise PlanError(
            f"{path}: {error.strerror}; make a plan with `megamoe plan NAME -o {path}`"
        ) from error
    except ValueError as error:
        raise PlanError(f"{path}: not JSON ({error}); make the plan again") from error
    return from_json(data, Plan, str(path))


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan; readers see the old file or the new one, never a part."""
    write_text_atomically(path, json.dumps(to_json(plan), indent=2, ensure_ascii=False) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file by a durable new one in a single step.

    Raises:
        OSError: it cannot be written; names the file, which is as it was.
    """
    try:
        _write_text_atomically(path, text)
    except OSError as error:  # of a file with a name of chance, or of none
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_text_atomically(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def differences(left: Plan, right: Plan) -> list[str]:
    """Return the places where two plans differ: 'segments[0].lr.peak: 0.0001, not 0.0002'."""
    return list(_differences("", to_json(left), to_json(right)))


def _encode(value: Any, declared: Any) -> Any:
    if value is None:
        return None
    origin, args = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return _encode(value, args[0])
    if origin in (Union, UnionType):
        option = _option_of(value, args)
        encoded = _encode(value, option)
        return {"type": option.__name__, **encoded} if _is_variant(args) else encoded
    if origin is tuple:
        items = (args[0],) * len(value) if args[-1] is Ellipsis else args
        return [_encode(item, kind) for item, kind in zip(value, items, strict=True)]
    if is_dataclass(value):
        types = field_types(type(value))
        return {name: _encode(getattr(value, name), kind) for name, kind in types.items()}
    # 1 and 1.0 are the same rate: one spelling, one digest
    return float(value) if declared is float else value


def _option_of(value: Any, options: tuple[Any, ...]) -> Any:
    """Return the option of a union that a (valid) value belongs to."""
    if is_dataclass(value):
        return type(value)
    return next(option for option in options if option is not NoneType)


def _is_variant(options: tuple[Any, ...]) -> bool:
    return len(_classes(options)) > 1


def _classes(options: tuple[Any, ...]) -> dict[str, type[Any]]:
    return {
        kind.__name__: kind for kind in options if isinstance(kind, type) and is_dataclass(kind)
    }


def _decode(data: Any, declared: Any, place: str) -> Any:
    origin, args = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return _decode(data, args[0], place)
    if origin in (Union, UnionType):
        return _decode_union(data, declared, place)
    if origin is tuple:
        return _decode_tuple(data, declared, place)
    if isinstance(declared, type) and is_dataclass(declared):
        return _decode_class(data, declared, place)
    if declared is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    return data  # checked by the class that holds it


def _decode_union(data: Any, declared: Any, place: str) -> Any:
    options = get_args(declared)
    if data is None and NoneType in options:
        return None
    classes = _classes(options)
    if not _is_variant(options):
        option = next(option for option in options if option is not NoneType)
        return _decode(data, option, place)
    if not isinstance(data, dict) or "type" not in data:
        raise PlanError(f"{place}: {_shown(data)} is not an object with a 'type'")
    name = data["type"]
    if name not in classes:
        raise PlanError(f"{place}: type {name!r} is not known{nearest(str(name), classes)}")
    rest = {key: value for key, value in data.items() if key != "type"}
    return _decode_class(rest, classes[name], place)


def _decode_tuple(data: Any, declared: Any, place: str) -> Any:
    args = get_args(declared)
    if not isinstance(data, list):
        raise PlanError(f"{place}: {_shown(data)} is not {type_name(declared)}")
    items = (args[0],) * len(data) if args[-1] is Ellipsis else args
    if len(items) != len(data):
        raise PlanError(f"{place}: {_shown(data)} is not {type_name(declared)}")
    pairs = enumerate(zip(data, items, strict=True))
    return tuple(_decode(item, kind, f"{place}[{index}]") for index, (item, kind) in pairs)


def _decode_class(data: Any, cls: type[Any], place: str) -> Any:
    if not isinstance(data, dict):
        raise PlanError(f"{place}: {_shown(data)} is not an object ({cls.__name__})")
    types = field_types(cls)
    for key in data:
        if key not in types:
            raise PlanError(f"{place}: unknown key {key!r}{nearest(key, types)}")
    for key in types:
        if key not in data:
            raise PlanError(f"{place}: key {key!r} is missing; make the plan again")
    values = {key: _decode(data[key], kind, f"{place}.{key}") for key, kind in types.items()}
    try:
        return cls(**values)
    except FieldError as error:
        field = f".{error.field}" if error.field else ""
        raise PlanError(f"{place}{field}: {error.problem}") from error


def _differences(place: str, left: Any, right: Any) -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            inner = f"{place}.{key}" if place else key
            yield from _differences(inner, left.get(key), right.get(key))
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from _differences(f"{place}[{index}]", one, other)
    elif left != right:
        yield f"{place}: {_shown(left)}, not {_shown(right)}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {max(names, key=names.count)!r} stands twice")
    return made


def _shown(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 60 else text[:57] + "..."
