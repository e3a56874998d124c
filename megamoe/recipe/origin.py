"""Where each value of a recipe comes from: a source, an assumption, another stage, a rule, an option."""

import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args

from megamoe.recipe.check import Checked, field_types
from megamoe.recipe.model import Model
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.stage import Stage
from megamoe.recipe.tree import Leaf, Node, Part, Site, join, path_of, stages_of

NOT_PUBLISHED = "not published"  # how the comment on a value begins that no source states
Kind = Literal["stated", "assumed", "inherited", "command line", "scale rule", "unstated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where one value comes from.

    Args:
        kind: what sort of origin it is.
        text: the comment on the value's line, the option, or the words of the rule.
        source: dotted path of the value an inherited one was copied from.
        of: that value's own origin.
    """

    kind: Kind
    text: str
    source: str | None = None
    of: "Origin | None" = None

    def words(self) -> str:
        """Return the origin as one short line."""
        if self.kind == "stated":
            return self.text
        if self.kind == "inherited":
            own = f": {self.of.words()}" if self.of else ""
            return f"as {self.source}{own}"
        return f"{self.kind}: {self.text}" if self.text else self.kind

    def root(self) -> "Origin":
        """Return the origin itself, or that of the value it was copied from."""
        return self.of.root() if self.of else self


@dataclass(frozen=True, slots=True)
class _Written:
    """A value of the tree: its site, and the lines of the calls around it."""

    site: Site
    around: tuple[tuple[int, int], ...]


def leaves(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every value of a recipe, stages under their names.

    A choice between recipe classes (`model.attention`, `general.precision`) is a value too: the
    name of the class.
    """
    yield from _leaves_below(recipe, "")
    for stage in recipe.stages:
        yield from _leaves_below(stage, stage.name)


def _leaves_below(part: Checked, path: str) -> Iterator[tuple[str, Any]]:
    for name, declared in field_types(type(part)).items():
        value = getattr(part, name)
        if isinstance(part, Recipe) and name in ("stages", "assumed"):
            continue
        if isinstance(value, Checked):
            if is_choice(declared):
                yield join(path, name), type(value).__name__
            yield from _leaves_below(value, join(path, name))
        else:
            yield join(path, name), value


def is_choice(declared: object) -> bool:
    """Tell whether a declared type offers several recipe classes."""
    classes = [item for item in get_args(declared) if isinstance(item, type)]
    return sum(issubclass(item, Checked) for item in classes if item is not NoneType) > 1


def comments_of(source: str) -> dict[int, str]:
    """Return the trailing comments of a Python text by line, without the '#'."""
    comments = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
                comments[token.start[0]] = token.string.lstrip("# ").rstrip()
    except (tokenize.TokenError, SyntaxError):  # the parser takes a few texts this one does not
        return comments
    return comments


def origins_of(root: Part, source: str, assumed: tuple[str, ...]) -> dict[str, Origin]:
    """Return the origin of every value of a recipe's tree.

    Args:
        root: the tree of the Recipe.
        source: text of the recipe file, for its comments.
        assumed: dotted paths of the values no source states; each covers all below it that names no
            source of its own.
    """
    comments = comments_of(source)
    origins: dict[str, Origin] = {}
    copied: list[tuple[str, _Written]] = []
    for path, written in _written_values(root):
        text = _comment_on(written, comments)
        if _is_assumed(path, written, comments, assumed):
            origins[path] = Origin(kind="assumed", text=text)
        elif written.site.inherited is not None:
            copied.append((path, written))
        else:
            origins[path] = _own(path, text)
    for path, written in copied:
        label = written.site.inherited
        assert label is not None
        of = origins.get(label) or _own(label, _comment_on(written, comments))
        origins[path] = Origin(kind="inherited", text="", source=label, of=of)
    return {path: origins[path] for path, _ in _written_values(root)}


def _is_assumed(
    path: str, written: _Written, comments: dict[int, str], assumed: tuple[str, ...]
) -> bool:
    if path in assumed:
        return True
    own = _comment_on(_Written(written.site, ()), comments)
    return is_covered(path, assumed) and (not own or own.startswith(NOT_PUBLISHED))


def _own(path: str, text: str) -> Origin:
    if path.rpartition(".")[2] in ("name", "source") and not text:
        text = "this recipe"
    return Origin(kind="stated" if text else "unstated", text=text)


def is_covered(path: str, prefixes: tuple[str, ...]) -> bool:
    """Tell whether a dotted path is one of `prefixes` or lies below one."""
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def _written_values(root: Part) -> Iterator[tuple[str, _Written]]:
    yield from _written_below(root, "", ())
    for stage in stages_of(root):
        yield from _written_below(stage, path_of(stage, ""), ())


def _written_below(
    part: Part, path: str, around: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, _Written]]:
    for name, declared in field_types(part.cls).items():
        if part.cls is Recipe and name in ("stages", "assumed"):
            continue
        child: Node = part.values.get(name, Leaf(None, part.site))  # a default has its part's place
        written = _Written(child.site, around)
        if not isinstance(child, Part):
            yield join(path, name), written
            continue
        if is_choice(declared):
            yield join(path, name), written
        inner = () if child.cls in (Model, Stage) else (*child.site.spans, *around)
        yield from _written_below(child, join(path, name), inner)


def _comment_on(written: _Written, comments: dict[int, str]) -> str:
    for span in (*written.site.spans, *written.around):
        for line in span:
            if line in comments:
                return comments[line]
    return ""


def known_paths(recipe: Recipe) -> set[str]:
    """Return every dotted path of a recipe, of its values and of what holds them."""
    paths = set()
    for path, _ in leaves(recipe):
        names = path.split(".")
        paths |= {".".join(names[: i + 1]) for i in range(len(names))}
    parts = {item.name for item in fields(recipe)} - {"stages", "assumed"}
    return paths | parts
