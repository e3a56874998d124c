"""Values given with --set: `general.lr.peak=1e-4`, `*.precision=Bf16()`, `model.mtp=None`.

All overrides are put into the recipe before any is checked, so two that need each other
(`general.layout.pp=2`, `general.layout.vpp=2`) can be given in any order. `*` is every stage; what is
set for one stage wins over what is set for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import megamoe.recipe as schema
from megamoe.errors import RecipeError
from megamoe.recipe.check import field_types, nearest
from megamoe.recipe.evaluate import evaluate_expression
from megamoe.recipe.origin import Origin, is_covered, leaves
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.tree import (
    Many,
    Node,
    Part,
    PlacedError,
    build,
    find,
    from_object,
    join,
    path_of,
    stages_of,
)

EVERY_STAGE = "*"
EXAMPLE = "general.lr.peak=1e-4"


@dataclass(frozen=True, slots=True)
class _Override:
    """One --set: the path it names, its value, and the option as it was given."""

    keys: tuple[str, ...]
    value: Node
    option: str

    def paths(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the dotted paths it changes."""
        first, rest = self.keys[0], self.keys[1:]
        firsts = [s.name for s in recipe.stages] if first == EVERY_STAGE else [first]
        return tuple(".".join((name, *rest)) for name in firsts)


def override_values(
    recipe: Recipe, origins: dict[str, Origin], overrides: Sequence[str]
) -> tuple[Recipe, dict[str, Origin]]:
    """Return a recipe and its origins with some values changed.

    Raises:
        RecipeError: an override names no value, or the recipe is wrong with it.
    """
    parsed = [_parsed(text) for text in overrides]
    _check_once(parsed)
    parsed.sort(key=lambda override: override.keys[0] != EVERY_STAGE)
    root = from_object(recipe)
    for override in parsed:
        for path in override.paths(recipe):
            try:
                root = _put(root, tuple(path.split(".")), override.value, "")
            except PlacedError as error:
                raise RecipeError(_message(override, error)) from error
    try:
        changed = build(root, "")
    except PlacedError as error:
        shared = [_overlap(override, error.path, recipe) for override in parsed]
        raise RecipeError(_message(parsed[shared.index(max(shared))], error)) from error
    assert isinstance(changed, Recipe), changed
    return changed, _origins(changed, origins, parsed)


def _parsed(text: str) -> _Override:
    option = " ".join(f"--set {text}".split())
    path, sign, expression = (part.strip() for part in text.partition("="))
    if not sign or not path or not expression:
        raise RecipeError(f"{option}: not PATH=VALUE; give for example --set {EXAMPLE}")
    keys = tuple(path.split("."))
    if not all(key.isidentifier() for key in keys[1:]) or not (
        keys[0].isidentifier() or keys[0] == EVERY_STAGE
    ):
        raise RecipeError(f"{option}: {path!r} is not a dotted path; give for example {EXAMPLE}")
    if expression.isidentifier() and expression not in {*schema.__all__, "True", "False", "None"}:
        raise RecipeError(
            f"{option}: {expression!r} is not a value; a text keeps its quotes: "
            f"--set \"{path}='{expression}'\""
        )
    try:
        return _Override(keys, evaluate_expression(expression, path), option)
    except PlacedError as error:
        raise RecipeError(f"{option}: {error.problem}") from error


def _check_once(overrides: Sequence[_Override]) -> None:
    seen = set()
    for override in overrides:
        if override.keys in seen:
            path = ".".join(override.keys)
            raise RecipeError(f"{override.option}: {path} is set twice; give it once")
        seen.add(override.keys)


def _put(node: Node, keys: tuple[str, ...], value: Node, path: str) -> Node:
    """Return a tree with the value at `keys` exchanged."""
    if not keys:
        return value
    if not isinstance(node, Part):
        raise PlacedError(0, path, f"has no field {keys[0]!r}; set {path} as a whole")
    name, rest = keys[0], keys[1:]
    if node.cls is Recipe:
        return _put_in_recipe(node, keys, value)
    if name not in (known := field_types(node.cls)):
        problem = f"no such field in {node.cls.__name__}{nearest(name, known)}"
        raise PlacedError(0, join(path, name), problem)
    child = node.values[name]
    return Part(
        node.cls, node.values | {name: _put(child, rest, value, join(path, name))}, node.site
    )


def _put_in_recipe(root: Part, keys: tuple[str, ...], value: Node) -> Part:
    name, rest = keys[0], keys[1:]
    names = [path_of(stage, "") for stage in stages_of(root)]
    parts = [part for part in field_types(Recipe) if part not in ("stages", "assumed")]
    if name not in (*names, *parts):
        raise PlacedError(0, name, f"no such stage or part{nearest(name, [*names, *parts])}")
    child = find(root, name)
    assert child is not None, name
    if name in names and (not rest or rest == ("name",)):
        problem = f"a stage is set field by field and keeps its name; give {name}.FIELD=VALUE"
        raise PlacedError(0, name, problem)
    changed = _put(child, rest, value, name)
    if name in parts:
        return Part(Recipe, root.values | {name: changed}, root.site)
    stages = tuple(changed if stage is child else stage for stage in stages_of(root))
    return Part(Recipe, root.values | {"stages": Many(stages, root.site)}, root.site)


def _message(override: _Override, error: PlacedError) -> str:
    if error.path == ".".join(override.keys):
        return f"{override.option}: {error.problem}"
    return f"{override.option}: {error}"


def _overlap(override: _Override, path: str, recipe: Recipe) -> int:
    """Return how many leading names an override's path shares with the path of an error."""
    wrong = path.split(".")
    shared = []
    for changed in override.paths(recipe):
        names = changed.split(".")
        differs = [i for i, (a, b) in enumerate(zip(names, wrong, strict=False)) if a != b]
        shared.append(differs[0] if differs else min(len(names), len(wrong)))
    return max(shared)


def _origins(
    recipe: Recipe, origins: dict[str, Origin], overrides: Sequence[_Override]
) -> dict[str, Origin]:
    changed = {
        path: Origin(kind="command line", text=override.option)
        for override in overrides
        for path in override.paths(recipe)
    }
    result = {}
    for path, _ in leaves(recipe):
        covering = [prefix for prefix in changed if is_covered(path, (prefix,))]
        result[path] = changed[max(covering, key=len)] if covering else origins[path]
    return result
