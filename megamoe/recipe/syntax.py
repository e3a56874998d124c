"""The Python a recipe may hold: parsed under limits, and refused in words a person understands."""

import ast
import warnings

from megamoe.recipe.tree import PlacedError

MAX_SOURCE = 1_000_000  # characters; the longest published recipe has under 20,000
MAX_DEPTH = 40  # nested brackets and operators

ALLOWED = (
    "a recipe holds constants, tuples, names defined above, recipe classes with keywords, "
    "replace(...) and arithmetic"
)
# What a recipe may not hold, as a person would say it, and what would do instead.
WORDS: dict[type[ast.AST], str] = {
    ast.List: "a list; give a tuple (x, ...)",
    ast.Set: "a set; give a tuple (x, ...)",
    ast.Dict: "a dict; give a tuple of pairs ((key, value), ...)",
    ast.JoinedStr: "an f-string; write the text out",
    ast.Lambda: f"a lambda; {ALLOWED}",
    ast.ListComp: "a comprehension; write the values out in a tuple",
    ast.SetComp: "a comprehension; write the values out in a tuple",
    ast.DictComp: "a comprehension; write the values out in a tuple",
    ast.GeneratorExp: "a comprehension; write the values out in a tuple",
    ast.Subscript: "a subscript x[...]; give the value a name of its own",
    ast.Starred: "a star *x; write the values out",
    ast.NamedExpr: "an assignment :=; put it on a line of its own with =",
    ast.IfExp: "a condition; write the value out",
    ast.UnaryOp: "an operator before a value other than minus; write the value out",
    ast.BinOp: "an operator other than + - * / // **; write the number out",
    ast.Compare: "a comparison; write the value out",
    ast.BoolOp: "and/or; write the value out",
    ast.FunctionDef: f"a function; {ALLOWED}",
    ast.AsyncFunctionDef: f"a function; {ALLOWED}",
    ast.ClassDef: f"a class; {ALLOWED}",
    ast.AugAssign: "an assignment in place; give the new value a name of its own with =",
    ast.Expr: f"an expression that is not assigned; {ALLOWED}",
}


def parse(source: str, mode: str) -> ast.AST:
    """Return the syntax tree of a text; `mode` is 'exec' for a file, 'eval' for an expression.

    Raises:
        PlacedError: the text is not Python, or too long or too deep to be a recipe.
    """
    if "\0" in source:
        raise PlacedError(
            source[: source.index("\0")].count("\n") + 1, "", "a null byte; give text"
        )
    if len(source) > MAX_SOURCE:
        raise PlacedError(1, "", f"{len(source):,} characters; give at most {MAX_SOURCE:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's taste in escapes is not our subject
            return ast.parse(source, mode=mode)
    except SyntaxError as error:
        line = error.lineno or 1
        raise PlacedError(
            line, "", f"not valid Python: {error.msg}; write it as Python would read it"
        ) from error
    except (RecursionError, MemoryError, ValueError) as error:
        problem = f"nested too deep or a number too long; at most {MAX_DEPTH} levels are read"
        raise PlacedError(1, "", problem) from error


def refusal(node: ast.AST) -> str:
    """Return what a piece of Python is and what would do, for a piece no recipe may hold."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        imported = ", ".join(alias.name for alias in node.names)
        return f"imports {imported!r}; only 'from megamoe.recipe import ...' is read"
    if isinstance(node, ast.Expr):
        kind = type(node.value)
        if kind in WORDS or kind is ast.Call:
            return refusal(node.value)
    if isinstance(node, ast.Call):
        return f"calls {_name_of(node.func)}; only recipe classes and replace(...) are called"
    words = WORDS.get(type(node), f"Python's '{type(node).__name__.lower()}'; {ALLOWED}")
    return f"holds {words}"


def _name_of(expression: ast.expr) -> str:
    if isinstance(expression, ast.Name):
        return repr(expression.id)
    if isinstance(expression, ast.Attribute):
        return repr(f"....{expression.attr}")
    return "an expression"
