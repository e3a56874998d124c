"""Reads the Python of a recipe without running it.

A recipe file is Python that holds only data. Its syntax tree is evaluated here: constants, tuples,
names defined above, fields of recipe objects, calls of recipe classes and of `replace` with
keywords, arithmetic on numbers, joined strings. Everything else is refused with its line.
"""

import ast
import difflib
import operator
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import megamoe.recipe as schema
from megamoe.recipe.check import Checked, field_types, nearest
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.stage import Stage
from megamoe.recipe.syntax import MAX_DEPTH, parse, refusal
from megamoe.recipe.tree import (
    PART_PATHS,
    Leaf,
    Many,
    Node,
    Part,
    PlacedError,
    Scalar,
    Site,
    extent_of,
    inherit,
    join,
    path_of,
)

MAX_VALUES = 5_000  # in one assignment
MAX_TEXT = 10_000  # characters of one string
MAX_EXPONENT = 64
MAX_NUMBER = 10**24  # above every count in a recipe, far below what would slow Python down

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True, slots=True)
class Replace:
    """The name `replace`, once imported."""


Names = dict[str, Node | type[Checked] | Replace]


@dataclass(frozen=True, slots=True)
class _At:
    """Where the evaluation stands: the dotted path so far and the nesting."""

    path: str
    depth: int = 0

    def inside(self, path: str) -> "_At":
        """Return one level deeper, at another path."""
        return _At(path, self.depth + 1)


def evaluate_file(source: str) -> dict[str, Node]:
    """Return what the assignments of a recipe file bind, by name, in order.

    Raises:
        PlacedError: the file holds something else than data.
    """
    module = parse(source, "exec")
    assert isinstance(module, ast.Module)
    names: Names = {}
    for index, statement in enumerate(module.body):
        if isinstance(statement, ast.ImportFrom):
            _import(statement, names)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            _assign(statement, names)
        elif index > 0 or not _is_docstring(statement):
            raise PlacedError(statement.lineno, "", refusal(statement))
    return {name: item for name, item in names.items() if not isinstance(item, (type, Replace))}


def evaluate_expression(text: str, path: str) -> Node:
    """Return the value of one expression, with the recipe classes in scope.

    Raises:
        PlacedError: the expression is not data.
    """
    expression = parse(text.strip(), "eval")
    assert isinstance(expression, ast.Expression)
    names: Names = dict(_classes())
    return _whole(expression.body, names, path)


def _classes() -> dict[str, type[Checked]]:
    return {
        name: item
        for name in schema.__all__
        if isinstance(item := getattr(schema, name), type) and issubclass(item, Checked)
    }


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _import(statement: ast.ImportFrom, names: Names) -> None:
    known: dict[str, type[Checked] | Replace] = {"replace": Replace()}
    module = "." * statement.level + (statement.module or "")
    if module == "megamoe.recipe":
        known |= _classes()
    elif module != "dataclasses":
        problem = (
            f"imports from {module!r}; only megamoe.recipe, and replace of dataclasses, are read"
        )
        raise PlacedError(statement.lineno, "", problem)
    for alias in statement.names:
        if alias.asname is not None:
            problem = f"renames {alias.name!r} with 'as'; import it under its own name"
            raise PlacedError(alias.lineno, "", problem)
        if alias.name == "*":
            raise PlacedError(alias.lineno, "", "imports '*'; import the names one by one")
        if alias.name not in known:
            problem = f"{module} has no {alias.name!r} for recipes{nearest(alias.name, known)}"
            raise PlacedError(alias.lineno, "", problem)
        names[alias.name] = known[alias.name]


def _assign(statement: ast.Assign | ast.AnnAssign, names: Names) -> None:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    target = targets[0]
    if len(targets) != 1 or not isinstance(target, ast.Name) or statement.value is None:
        raise PlacedError(
            statement.lineno, "", "assigns to something else than one name; give NAME = ..."
        )
    names[target.id] = _whole(statement.value, names, target.id)


def _whole(expression: ast.expr, names: Names, path: str) -> Node:
    """Return the value of a whole expression, of bounded size."""
    node = _value(expression, names, _At(path))
    count, depth = extent_of(node, MAX_VALUES)
    if count > MAX_VALUES or depth > MAX_DEPTH:
        problem = f"over {MAX_VALUES:,} values or {MAX_DEPTH} levels; give fewer"
        raise PlacedError(expression.lineno, path, problem)
    return node


def _site(node: ast.expr | ast.keyword) -> Site:
    return Site(line=node.lineno, spans=((node.lineno, node.end_lineno or node.lineno),))


def _value(node: ast.expr, names: Names, at: _At) -> Node:
    if at.depth > MAX_DEPTH:
        problem = f"nested deeper than {MAX_DEPTH} levels; write it flatter"
        raise PlacedError(node.lineno, at.path, problem)
    match node:
        case ast.Constant():
            value: Node = _constant(node, at)
        case ast.Name():
            value = _name(node, names, at)
        case ast.Tuple():
            value = _tuple(node, names, at)
        case ast.Call():
            value = _call(node, names, at)
        case ast.Attribute():
            value = _attribute(node, names, at)
        case ast.UnaryOp(op=ast.USub()):
            value = _negation(node, names, at)
        case ast.BinOp():
            value = _operation(node, names, at)
        case _:
            raise PlacedError(node.lineno, at.path, refusal(node))
    return value


def _tuple(node: ast.Tuple, names: Names, at: _At) -> Many:
    items = tuple(_value(item, names, at.inside(at.path)) for item in node.elts)
    return Many(items, _site(node))


def _negation(node: ast.UnaryOp, names: Names, at: _At) -> Leaf:
    return _leaf(-_number(_value(node.operand, names, at.inside(at.path)), node, at), node, at)


def _constant(node: ast.Constant, at: _At) -> Leaf:
    value = node.value
    if not isinstance(value, (type(None), bool, int, float, str)):
        problem = f"{type(value).__name__} constant; give a number, a text, True, False or None"
        raise PlacedError(node.lineno, at.path, problem)
    return _leaf(value, node, at)


def _leaf(value: Scalar, node: ast.expr, at: _At) -> Leaf:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        problem = f"a text of {len(value):,} characters; give at most {MAX_TEXT:,}"
        raise PlacedError(node.lineno, at.path, problem)
    if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
        problem = f"a number beyond {MAX_NUMBER:.0e}; give a smaller one"
        raise PlacedError(node.lineno, at.path, problem)
    return Leaf(value, _site(node))


def _name(node: ast.Name, names: Names, at: _At) -> Node:
    if node.id not in names:
        problem = f"{node.id!r} is not defined above{nearest(node.id, names)}"
        raise PlacedError(node.lineno, at.path, problem)
    found = names[node.id]
    if isinstance(found, (type, Replace)):
        problem = f"{node.id!r} is a class or function, not a value; give {node.id}(...)"
        raise PlacedError(node.lineno, at.path, problem)
    return found


def _attribute(node: ast.Attribute, names: Names, at: _At) -> Node:
    owner = _value(node.value, names, at.inside(at.path))
    if not isinstance(owner, Part):
        problem = f"'.{node.attr}' of something that is not a recipe object; name one of its fields"
        raise PlacedError(node.lineno, at.path, problem)
    if node.attr in owner.values:
        return inherit(owner.values[node.attr], _label(node, names), node.lineno)
    known = field_types(owner.cls)
    if node.attr in (defaults := _defaults(owner.cls)):
        return Leaf(defaults[node.attr], _site(node))
    problem = f"no field {node.attr!r} in {owner.cls.__name__}{nearest(node.attr, known)}"
    raise PlacedError(node.lineno, at.path, problem)


def _label(node: ast.expr, names: Names) -> str:
    """Return the dotted path in the recipe of what an expression names, as far as it can be told."""
    if isinstance(node, ast.Attribute):
        return join(_label(node.value, names), node.attr)
    if isinstance(node, ast.Name):
        found = names.get(node.id)
        return path_of(found, node.id) if isinstance(found, (Leaf, Many, Part)) else node.id
    return "an object"


def _call(node: ast.Call, names: Names, at: _At) -> Node:
    called = names.get(node.func.id) if isinstance(node.func, ast.Name) else None
    if isinstance(called, Replace):
        return _replace(node, names, at)
    if not isinstance(called, type):
        raise PlacedError(node.lineno, at.path, _call_refusal(node, names))
    if node.args:
        problem = f"{called.__name__}(...) has a value without a name; give name=value"
        raise PlacedError(node.args[0].lineno, at.path, problem)
    at = at.inside(_path_under(called, node, at.path))
    return Part(called, _keywords(node, names, at), _site(node))


def _call_refusal(node: ast.Call, names: Names) -> str:
    problem = refusal(node)
    if isinstance(node.func, ast.Name):
        classes = [name for name, item in names.items() if isinstance(item, (type, Replace))]
        close = difflib.get_close_matches(node.func.id, classes, n=1)
        problem += f"; did you mean {close[0]!r}?" if close else ""
        if node.func.id in schema.__all__:
            problem += f"; import it with 'from megamoe.recipe import {node.func.id}'"
    return problem


def _path_under(cls: type[Checked], node: ast.Call, path: str) -> str:
    if cls is Recipe:
        return ""
    if cls is Stage:
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "name" and isinstance(value, ast.Constant):
                text = value.value
                return text if isinstance(text, str) and text.isidentifier() else path
    return PART_PATHS.get(cls, path)


def _replace(node: ast.Call, names: Names, at: _At) -> Node:
    if len(node.args) != 1:
        problem = f"replace has {len(node.args)} objects; give replace(OBJECT, field=value)"
        raise PlacedError(node.lineno, at.path, problem)
    base = _value(node.args[0], names, at.inside(at.path))
    if not isinstance(base, Part):
        problem = (
            "replace of something that is not a recipe object; give replace(OBJECT, field=value)"
        )
        raise PlacedError(node.lineno, at.path, problem)
    label = _label(node.args[0], names)
    at = at.inside(_path_under(base.cls, node, at.path))
    values = {
        name: inherit(item, join(label, name), node.lineno) for name, item in base.values.items()
    }
    return Part(base.cls, values | _keywords(node, names, at), _site(node))


def _keywords(node: ast.Call, names: Names, at: _At) -> dict[str, Node]:
    values: dict[str, Node] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PlacedError(keyword.lineno, at.path, "** is not read; give name=value")
        path = join(at.path, keyword.arg)
        if keyword.arg in values:
            raise PlacedError(keyword.lineno, path, "given twice; give it once")
        value = _value(keyword.value, names, at.inside(path))
        values[keyword.arg] = _written_at(value, _site(keyword))
    return values


def _written_at(node: Node, site: Site) -> Node:
    """Return a node that also knows the keyword it was given by."""
    spans = tuple(dict.fromkeys(node.site.spans + site.spans))
    return replace(node, site=replace(node.site, spans=spans))


def _operation(node: ast.BinOp, names: Names, at: _At) -> Leaf:
    if type(node.op) not in OPERATORS:
        raise PlacedError(node.lineno, at.path, refusal(node))
    left = _value(node.left, names, at.inside(at.path))
    right = _value(node.right, names, at.inside(at.path))
    if isinstance(node.op, ast.Add) and isinstance(left, Leaf) and isinstance(left.value, str):
        if not isinstance(right, Leaf) or not isinstance(right.value, str):
            raise PlacedError(node.lineno, at.path, "a text + something else; give two texts")
        return _leaf(left.value + right.value, node, at)
    first, second = _number(left, node, at), _number(right, node, at)
    if isinstance(node.op, ast.Pow) and not abs(second) <= MAX_EXPONENT:
        raise PlacedError(
            node.lineno, at.path, f"an exponent beyond {MAX_EXPONENT}; write the number out"
        )
    try:
        result = OPERATORS[type(node.op)](first, second)
    except (ArithmeticError, ValueError) as error:
        raise PlacedError(node.lineno, at.path, f"{error}; write the number out") from error
    if isinstance(result, complex):
        raise PlacedError(node.lineno, at.path, "a complex number; give a real one")
    return _leaf(result, node, at)


def _number(node: Node, written: ast.expr, at: _At) -> int | float:
    value = node.value if isinstance(node, Leaf) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlacedError(written.lineno, at.path, "arithmetic on something that is not a number")
    return value


def _defaults(cls: type[Checked]) -> dict[str, Any]:
    return {
        item.name: item.default
        for item in fields(cls)  # type: ignore[arg-type]  # every recipe class is a dataclass
        if item.default is not MISSING
    }
