"""`megamoe model`: how many parameters a recipe's model has, by formula and as it is built."""

import argparse
import importlib
import importlib.util
import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from typing import Any

from megamoe.plan.params import ParamCount, count_params, layer_params
from megamoe.recipe.cli import add_recipe_arguments, recipe_from_args
from megamoe.recipe.model import Model
from megamoe.recipe.recipe import Recipe

_EXIT_DIFFERENT = 1
_NEEDED = ("torch", "megatron")
_COMPONENTS = {
    "input_table": "input table",
    "output_table": "output table",
    "attention": "attention",
    "attention_norms": "norms of attention",
    "norms": "norms of layers",
    "dense_mlp": "dense MLPs",
    "router": "routers",
    "expert_bias": "expert biases",
    "shared_experts": "shared experts",
    "routed_experts": "routed experts",
    "mtp": "token prediction",
}
_EPILOG = """examples:
  megamoe model params ax_k1_519b_a33b
  megamoe model params ./my_recipe.py --set model.num_layers=12 --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `megamoe model`."""
    parser.epilog = _EPILOG
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    params = subparsers.add_parser(
        "params",
        help="count the parameters, by component",
        description="Count the parameters by formula, and of the real modules, built without memory. "
        "Exit 1 if the two differ, or if the published count of the recipe as it stands is another.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(params)
    params.add_argument("--formula", action="store_true", help="do not build the modules")
    params.add_argument("--json", action="store_true", help="print JSON instead of a table")
    params.set_defaults(run=_params)


def _params(args: argparse.Namespace) -> int:
    recipe = recipe_from_args(args).recipe
    count = count_params(recipe.model)
    layers = tuple(layer_params(recipe.model, i) for i in range(recipe.model.num_layers))
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    built = None
    if not args.formula and not missing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron-Core warns of packages that nobody asked for
            importlib.import_module("megamoe.mcore.cpu").enable()
            built = importlib.import_module("megamoe.mcore.meta").count_modules(recipe)
    same = built is None or (built.params, built.layers) == (count, layers)
    document = _document(recipe, count, built.params if built else None)
    sys.stdout.write(json.dumps(document, indent=1) + "\n" if args.json else _table(document))
    published = document["published"]
    if published and not args.overrides:  # a changed model may differ from the published one
        same = same and published["difference"] == 0
    return 0 if same else _EXIT_DIFFERENT


def _document(recipe: Recipe, count: ParamCount, built: ParamCount | None) -> dict[str, Any]:
    """Return all figures; `modules` and `published` are None where there is nothing to tell."""
    published = recipe.published
    released = count.released(published.unreleased)
    total = published.total_params
    return {
        "recipe": recipe.name,
        "total": count.total,
        "active": count.active,
        "active_without_input_table": count.active_without_input_table,
        "components": {name: getattr(count, name) for name in _COMPONENTS},
        "layers": [
            {"kind": kind, "layers": number, "params": size}
            for (kind, size), number in _kinds(recipe.model).items()
        ],
        "modules": None
        if built is None
        else {**asdict(built), "total": built.total, "difference": built.total - count.total},
        "published": None
        if total is None
        else {
            "total": total,
            "unreleased": [part for part in published.unreleased if getattr(count, part)],
            "counted": released,
            "difference": released - total,
        },
    }


def _kinds(model: Model) -> Counter[tuple[str, int]]:
    """Return how many decoder layers there are of each kind and size."""
    return Counter(
        (
            f"{'local' if model.is_local(layer) else 'global'}, "
            f"{'dense' if model.is_dense(layer) else 'MoE'}",
            layer_params(model, layer),
        )
        for layer in range(model.num_layers)
    )


def _layers(number: int, kind: str) -> str:
    return f"{number} layer{'' if number == 1 else 's'} {kind}"


def _table(document: dict[str, Any]) -> str:
    """Return the figures as aligned lines."""
    modules, published = document["modules"], document["published"]
    rows = [(words, document["components"][name], "") for name, words in _COMPONENTS.items()]
    rows = [row for row in rows if row[1]]
    rows += [("total", document["total"], "")]
    rows += [("active for a token", document["active"], "both tables counted")]
    rows += [("", document["active_without_input_table"], "without the input table")]
    rows += [
        (_layers(each["layers"], each["kind"]), each["params"], "each")
        for each in document["layers"]
    ]
    if modules is None:
        rows.append(("modules", None, "not built"))
    else:
        rows.append(("modules", modules["total"], f"built; difference {modules['difference']:,}"))
    if published is None:
        rows.append(("published", None, "nothing of this model"))
    else:
        without = " and ".join(_COMPONENTS[part] for part in published["unreleased"])
        words = f"{f'without {without}; ' if without else ''}difference {published['difference']:,}"
        rows.append(("published", published["total"], words))
    lines = [f"{document['recipe']}"]
    lines += [
        f"{name:<24}{'-' if size is None else f'{size:,}':>18}  {words}".rstrip()
        for name, size, words in rows
    ]
    return "\n".join(lines) + "\n"
