"""Finds a recipe by name or file and loads it, every value with its origin.

A recipe file is never run: its syntax tree is evaluated (`evaluate`), checked (`tree.build`), and its
comments become the origins of its values (`origin`). Each error is one line:
`FILE:LINE: general.lr.peak: what was given; what would do`.
"""

import difflib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.errors import RecipeError
from megamoe.recipe.check import FieldError, nearest
from megamoe.recipe.evaluate import evaluate_file
from megamoe.recipe.origin import Origin, known_paths, origins_of
from megamoe.recipe.override import override_values
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.tree import Many, Node, Part, PlacedError, build, line_of, path_of

RECIPES = "model_configs"
MAX_FILE_BYTES = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRecipe:
    """A recipe and where each of its values comes from.

    Args:
        recipe: the values.
        origins: origin of each value, by dotted path.
        file: the file it was read from.
        scale: 'tiny' when scaled down by rule, else None.
    """

    recipe: Recipe
    origins: dict[str, Origin]
    file: str
    scale: str | None = None


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return a recipe by its name in model_configs, or from a file.

    Args:
        name_or_file: a name such as 'vaetki_7b_a1b'; a text with a slash or ending in .py is a file.
        overrides: values to change, each 'PATH=EXPRESSION'.

    Raises:
        RecipeError: the recipe is missing or wrong, in one line.
    """
    return override_recipe(_from_file(name_or_file, _loaded), overrides)


def check_recipe(name_or_file: str) -> LoadedRecipe:
    """Return a recipe as `load_recipe` does, having checked what a plan would refuse on any cluster.

    Raises:
        RecipeError: the recipe is missing or wrong, in one line.
    """
    return _from_file(name_or_file, _checked)


def override_recipe(loaded: LoadedRecipe, overrides: Sequence[str]) -> LoadedRecipe:
    """Return a recipe with some values changed, checked after all of them.

    Raises:
        RecipeError: an override names no value, or the recipe is wrong with it.
    """
    if not overrides:
        return loaded
    recipe, origins = override_values(loaded.recipe, loaded.origins, overrides)
    return LoadedRecipe(recipe=recipe, origins=origins, file=loaded.file, scale=loaded.scale)


def find_recipe(name_or_file: str) -> Path:
    """Return the path of a recipe's file.

    Raises:
        RecipeError: there is no such recipe; names the nearest.
    """
    if "/" in name_or_file or name_or_file.endswith(".py"):
        return Path(name_or_file)
    known = recipe_names()
    if not known:
        raise RecipeError(f"the folder {RECIPES} is not installed; give the path of a recipe file")
    if name_or_file not in known:
        hint = nearest(name_or_file, known)
        raise RecipeError(
            f"{name_or_file!r} is not a recipe of {RECIPES}{hint} (a file needs a '/' or '.py')"
        )
    return known[name_or_file]


def recipe_names() -> dict[str, Path]:
    """Return the recipes of model_configs by name, sorted; none where the folder is missing."""
    spec = importlib.util.find_spec(RECIPES)
    if spec is None or not spec.submodule_search_locations:
        return {}
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = [path for folder in folders for path in folder.glob("[!_]*.py")]
    return {path.stem: path for path in sorted(files)}


def _from_file(name_or_file: str, load: Callable[[str, str], LoadedRecipe]) -> LoadedRecipe:
    path = find_recipe(name_or_file)
    file = _shown_path(path)
    source = _read(path, file)
    try:
        return load(source, file)
    except PlacedError as error:
        raise RecipeError(f"{file}:{max(error.line, 1)}: {error}") from error


def _shown_path(path: Path) -> str:
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return " ".join(str(shown).split())


def _read(path: Path, file: str) -> str:
    try:
        if path.is_dir():
            raise RecipeError(f"{file}: is a folder; give a recipe file")
        if not path.is_file():
            close = difflib.get_close_matches(path.stem, recipe_names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; see `megamoe recipe list`"
            raise RecipeError(f"{file}: no such file{hint}")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise RecipeError(f"{file}: {size:,} bytes; a recipe has at most {MAX_FILE_BYTES:,}")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: cannot be read: {error}; give a recipe file") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from error


def _loaded(source: str, file: str) -> LoadedRecipe:
    names = evaluate_file(source)
    root = _root(names)
    recipe = build(root, "")
    assert isinstance(recipe, Recipe), recipe
    for name, node in names.items():  # a value the recipe does not use is checked all the same
        build(node, path_of(node, name))
    _check_assumed(recipe, root)
    return LoadedRecipe(recipe=recipe, origins=origins_of(root, source, recipe.assumed), file=file)


def _checked(source: str, file: str) -> LoadedRecipe:
    loaded = _loaded(source, file)
    try:
        loaded.recipe.check_layouts()
    except FieldError as error:
        line = line_of(_root(evaluate_file(source)), error.field)
        raise PlacedError(line, error.field, error.problem) from error
    return loaded


def _root(names: dict[str, Node]) -> Part:
    if "RECIPE" not in names:
        close = difflib.get_close_matches("RECIPE", names, n=1)
        hint = f" (did you mean it by {close[0]!r}?)" if close else ""
        line = names[close[0]].site.line if close else 1
        raise PlacedError(line, "", f"no RECIPE; give RECIPE = Recipe(...){hint}")
    root = names["RECIPE"]
    if not isinstance(root, Part) or root.cls is not Recipe:
        given = f"{root.cls.__name__}(...)" if isinstance(root, Part) else "a plain value"
        problem = f"{given} is not a Recipe; give RECIPE = Recipe(...)"
        raise PlacedError(root.site.line, "RECIPE", problem)
    return root


def _check_assumed(recipe: Recipe, root: Part) -> None:
    known = known_paths(recipe)
    for index, path in enumerate(recipe.assumed):
        if path not in known:
            node = root.values["assumed"]
            line = node.items[index].site.line if isinstance(node, Many) else node.site.line
            close = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PlacedError(line, "assumed", f"{path!r} names no value of the recipe{hint}")
