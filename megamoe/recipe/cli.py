"""`megamoe recipe`: show, check and list recipes; and the arguments by which any command takes one."""

import argparse
import sys

from megamoe.recipe.load import (
    LoadedRecipe,
    check_recipe,
    load_recipe,
    override_recipe,
    recipe_names,
)
from megamoe.recipe.scale import scale_tiny
from megamoe.recipe.show import as_json, as_table, summary

EPILOG = """examples:
  megamoe recipe list
  megamoe recipe show vaetki_7b_a1b
  megamoe recipe show vaetki_7b_a1b --scale tiny --set general.lr.peak=1e-4
  megamoe recipe check my_recipe.py
"""
SHOW_EPILOG = """examples:
  megamoe recipe show vaetki_7b_a1b
  megamoe recipe show ./my_recipe.py --json
  megamoe recipe show keural_14b --set "*.precision=Bf16()" --set stage_1.lr.peak=2e-4
"""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a recipe: RECIPE, --scale and --set."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="name of a recipe, or a file (with a '/' or '.py')"
    )
    parser.add_argument(
        "--scale", choices=("tiny",), help="scale the model and its curriculum down by rule"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="change one value, such as general.lr.peak=1e-4; '*' for every stage; repeatable",
    )


def recipe_from_args(args: argparse.Namespace) -> LoadedRecipe:
    """Return the recipe that the arguments of `add_recipe_arguments` name; --set comes last.

    Raises:
        RecipeError: the recipe, its name or an override is wrong.
    """
    loaded = load_recipe(args.recipe)
    if args.scale == "tiny":
        loaded = scale_tiny(loaded)
    return override_recipe(loaded, args.overrides)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `megamoe recipe`."""
    parser.epilog = EPILOG
    subparsers = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    show = subparsers.add_parser(
        "show",
        help="print every value and where it comes from",
        description="Print every value of a recipe and where it comes from.",
        epilog=SHOW_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(show)
    show.add_argument("--json", action="store_true", help="print JSON instead of a table")
    show.set_defaults(run=_show)
    check = subparsers.add_parser(
        "check",
        help="load recipes and say whether they are sound",
        description="Load recipes; print one line for each, or the first mistake.",
        epilog="example:\n  megamoe recipe check vaetki_7b_a1b ./my_recipe.py\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("recipes", metavar="RECIPE", nargs="+", help="names or files of recipes")
    check.set_defaults(run=_check)
    listing = subparsers.add_parser(
        "list",
        help="list the published recipes",
        description="List the published recipes.",
        epilog="example:\n  megamoe recipe list\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listing.set_defaults(run=_list)


def _show(args: argparse.Namespace) -> int:
    loaded = recipe_from_args(args)
    sys.stdout.write(as_json(loaded) if args.json else as_table(loaded))
    return 0


def _check(args: argparse.Namespace) -> int:
    for name in args.recipes:
        sys.stdout.write(f"OK {summary(check_recipe(name))}\n")
    return 0


def _list(_args: argparse.Namespace) -> int:
    for name in recipe_names():
        sys.stdout.write(f"{summary(load_recipe(name))}\n")
    return 0
