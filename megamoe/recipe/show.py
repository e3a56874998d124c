"""A recipe as text: a table of every value and its origin, JSON, or one line."""

import json
from typing import Any

from megamoe.recipe.load import LoadedRecipe
from megamoe.recipe.origin import leaves

MAX_VALUE_WIDTH = 40  # of the value column; a longer value pushes its own origin only


def as_table(loaded: LoadedRecipe) -> str:
    """Return every value of a recipe as aligned lines `path  value  origin`, grouped by part."""
    recipe = loaded.recipe
    rows = [(path, shown(value), loaded.origins[path].words()) for path, value in leaves(recipe)]
    path_width = max(len(path) for path, _, _ in rows)
    value_width = min(max(len(value) for _, value, _ in rows), MAX_VALUE_WIDTH)
    lines = []
    part = ""
    for path, value, words in rows:
        first = path.partition(".")[0]
        if first not in (part, "name", "source"):
            lines.append("")
        part = first
        lines.append(f"{path:<{path_width}}  {value:<{value_width}}  {words}".rstrip())
    return "\n".join(lines) + "\n"


def as_json(loaded: LoadedRecipe) -> str:
    """Return a recipe as JSON: name, file, scale, and each value with its origin."""
    values = []
    for path, value in leaves(loaded.recipe):
        origin = loaded.origins[path]
        entry = {"path": path, "value": value, "origin": origin.kind, "text": origin.root().text}
        if origin.source is not None and origin.of is not None:
            entry |= {"source": origin.source, "source_origin": origin.of.kind}
        values.append(entry)
    document = {
        "recipe": loaded.recipe.name,
        "file": loaded.file,
        "scale": loaded.scale,
        "values": values,
    }
    return json.dumps(document, indent=1) + "\n"


def summary(loaded: LoadedRecipe) -> str:
    """Return the main figures of a recipe in one line."""
    recipe = loaded.recipe
    model, experts = recipe.model, recipe.model.experts
    total = recipe.published.total_params
    parameters = f"{total:,} parameters" if total else "parameters not published"
    stages = ", ".join(f"{stage.name} {_in_words(stage.tokens)} tokens" for stage in recipe.stages)
    assumed = sum(origin.root().kind == "assumed" for origin in loaded.origins.values())
    return (
        f"{recipe.name}: {parameters}, {model.num_layers} layers, "
        f"{experts.num_routed} experts top-{experts.top_k} + {experts.num_shared} shared; "
        f"{stages}; {assumed} of {len(loaded.origins)} values assumed"
    )


def _in_words(count: int) -> str:
    """Return a count with three digits and its thousands as a letter: 1.3T, 550B, 773K."""
    for letter, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


def shown(value: Any) -> str:  # noqa: ANN401  # a value of any field
    """Return a value as a person reads it: 20,000,000,000, 0.0002, a: 0.5 | b: 0.5."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1e4 else repr(value)
    if isinstance(value, tuple) and value:
        return " | ".join(
            ": ".join(shown(item) for item in pair) if isinstance(pair, tuple) else shown(pair)
            for pair in value
        )
    return str(value)
