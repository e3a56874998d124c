"""A recipe before it is checked: a tree of values that remember where they were written.

Overrides and `replace` work on the tree; `build` turns it into recipe objects, and only then are the
values checked. So several overrides that need each other never meet a half-changed object.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from megamoe.errors import RecipeError
from megamoe.recipe.check import Checked, FieldError, field_types, nearest
from megamoe.recipe.model import Model
from megamoe.recipe.optim import AdamW, Muon
from megamoe.recipe.recipe import Published, Recipe, Tokenizer
from megamoe.recipe.stage import Stage

Scalar = None | bool | int | float | str

# Where an object of a class stands in a recipe, so that an error can say so before it is put there.
PART_PATHS: dict[type[Any], str] = {
    Model: "model",
    AdamW: "optimizer",
    Muon: "optimizer",
    Tokenizer: "tokenizer",
    Published: "published",
}


class PlacedError(RecipeError):
    """Something in a recipe or an override is wrong; the caller adds the file or the option.

    Args:
        line: line of the recipe file, 0 where there is none.
        path: dotted path of the value, empty where there is none.
        problem: what was given and what would do.
    """

    def __init__(self, line: int, path: str, problem: str) -> None:
        """Keep the parts apart so that the caller can put the file before them."""
        super().__init__(f"{path}: {problem}" if path else problem)
        self.line = line
        self.path = path
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Site:
    """Where a value stands in the recipe file.

    `line` is where an error about it points, `spans` are the (first, last) lines whose comments
    speak of it, and `inherited` is the dotted path of the value it was copied from by `replace`.
    """

    line: int
    spans: tuple[tuple[int, int], ...]
    inherited: str | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A constant."""

    value: Scalar
    site: Site


@dataclass(frozen=True, slots=True)
class Many:
    """A tuple."""

    items: "tuple[Node, ...]"
    site: Site


@dataclass(frozen=True, slots=True)
class Part:
    """An object of a recipe class; `values` may hold names the class does not know."""

    cls: type[Checked]
    values: "dict[str, Node]"
    site: Site


Node = Leaf | Many | Part
NO_SITE = Site(line=0, spans=())


def build(node: Node, path: str) -> object:
    """Return the value that a node stands for, checked.

    Raises:
        PlacedError: a field is unknown, missing or wrong; says which by its dotted path.
    """
    if isinstance(node, Leaf):
        return node.value
    if isinstance(node, Many):
        return tuple(
            build(item, path_of(item, f"{path}[{i}]")) for i, item in enumerate(node.items)
        )
    known = field_types(node.cls)
    _check_names(node, path, known)
    values = {
        name: build(node.values[name], join(path, name)) for name in known if name in node.values
    }
    try:
        return node.cls(**values)
    except FieldError as error:
        field_path = join(path, error.field) if error.field else path
        raise PlacedError(line_of(node, error.field), field_path, error.problem) from error


def _check_names(node: Part, path: str, known: dict[str, Any]) -> None:
    for name in node.values:
        if name not in known:
            line = node.values[name].site.line
            problem = f"no such field in {node.cls.__name__}{nearest(name, known)}"
            raise PlacedError(line, join(path, name), problem)
    missing = [
        item.name
        for item in fields(node.cls)  # type: ignore[arg-type]  # every recipe class is a dataclass
        if item.name not in node.values and item.default is MISSING
    ]
    if missing:
        given = ", ".join(f"{name}=..." for name in missing)
        problem = f"{node.cls.__name__} lacks {', '.join(missing)}; give {given}"
        raise PlacedError(node.site.line, path, problem)


def path_of(node: Node, otherwise: str) -> str:
    """Return the path of an object that has a place of its own in a recipe."""
    if isinstance(node, Part):
        if node.cls is Recipe:
            return ""
        if node.cls is Stage:
            name = node.values.get("name")
            if isinstance(name, Leaf) and isinstance(name.value, str) and name.value.isidentifier():
                return name.value
        return PART_PATHS.get(node.cls, otherwise)
    return otherwise


def join(path: str, name: str) -> str:
    """Return `path.name`; stages stand at the top under their own names."""
    return f"{path}.{name}" if path else name


def line_of(node: Node, field: str) -> int:
    """Return the line of the nearest known value on a dotted path below a node."""
    line = node.site.line
    for name in field.split("."):
        child = find(node, name.partition("[")[0])
        if child is None:
            break
        node, line = child, child.site.line or line
    return line


def find(node: Node, name: str) -> Node | None:
    """Return the field of a node, or the stage of that name of a recipe."""
    if not isinstance(node, Part):
        return None
    if name in node.values:
        return node.values[name]
    return next((stage for stage in stages_of(node) if path_of(stage, "") == name), None)


def stages_of(node: Node) -> Iterator[Part]:
    """Yield the stages of a recipe's tree."""
    stages = node.values.get("stages") if isinstance(node, Part) else None
    if isinstance(stages, Many):
        yield from (item for item in stages.items if isinstance(item, Part))


def from_object(value: object) -> Node:
    """Return the tree of a finished recipe object, or of one of its values."""
    if isinstance(value, Checked):
        values = {name: from_object(getattr(value, name)) for name in field_types(type(value))}
        return Part(type(value), values, NO_SITE)
    if isinstance(value, tuple):
        return Many(tuple(from_object(item) for item in value), NO_SITE)
    assert value is None or isinstance(value, (bool, int, float, str)), value
    return Leaf(value, NO_SITE)


def inherit(node: Node, source: str, line: int) -> Node:
    """Return a copy of a node that says it was copied from the path `source` at `line`."""
    site = replace(node.site, line=line, inherited=node.site.inherited or source)
    if isinstance(node, Part):
        values = {
            name: inherit(item, join(source, name), line) for name, item in node.values.items()
        }
        return Part(node.cls, values, site)
    return replace(node, site=site)


def extent_of(node: Node, limit: int) -> tuple[int, int]:
    """Return how many values a tree has, counted up to a limit, and how deep it is nested."""
    count, depth = 0, 0
    waiting: list[tuple[Node, int]] = [(node, 1)]
    while waiting and count <= limit:
        item, level = waiting.pop()
        count, depth = count + 1, max(depth, level)
        if isinstance(item, Many):
            waiting += [(child, level + 1) for child in item.items]
        elif isinstance(item, Part):
            waiting += [(child, level + 1) for child in item.values.values()]
    return count, depth
