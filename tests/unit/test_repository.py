"""The repository keeps its own rules: sizes, pages that are true, commands that explain themselves."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe
from megamoe import __main__ as command
from megamoe.plan.params import count_params
from megamoe.recipe import MLA, Model, Recipe
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.report.plot import short_count

ROOT = Path(__file__).parents[2]
PRODUCT = ("megamoe", "launch", "data_prep", "model_configs", "kernels")
NOT_PACKAGES = (ROOT / "data_prep" / "sample", ROOT / "kernels")
MAX_FILE_LINES = 400
MAX_ARCHITECTURE_LINES = 150

TABLE = re.compile(r"(<!-- recipes -->\n).*?(<!-- /recipes -->\n)", re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
FOLDERS = "|".join([*PRODUCT, "docs", "tests"])
NAMED = re.compile(rf"`((?:{FOLDERS})/[^`\s:]*)[^`]*`")
MAKE = re.compile(r"\bmake ([a-z-]+)`|^(?:\$ )?make ([a-z-]+)$", re.MULTILINE)
TARGET = re.compile(r"^([a-z-]+):.*?(## .+)?$", re.MULTILINE)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# The table of recipes.


def recipe_table() -> str:
    rows = [
        ("model", "parameters", "active", "attention", "experts", "stages (tokens)", "source"),
        ("---", "---:", "---:", "---", "---", "---", "---"),
    ]
    rows += [recipe_row(load_recipe(name).recipe) for name in recipe_names()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def recipe_row(recipe: Recipe) -> tuple[str, ...]:
    params, experts = count_params(recipe.model), recipe.model.experts
    shared = f", {experts.num_shared} shared" if experts.num_shared else ""
    return (
        f"[`{recipe.name}`](model_configs/{recipe.name}.py)",
        short_count(params.released(recipe.published.unreleased)),
        short_count(params.active),
        attention(recipe.model),
        f"{experts.num_routed}, top-{experts.top_k}{shared}",
        ", ".join(f"{stage.name} {short_count(stage.tokens)}" for stage in recipe.stages),
        recipe.source,
    )


def attention(model: Model) -> str:
    kind = model.attention
    heads = f"{kind.num_heads} heads"
    name = f"MLA, {heads}" if isinstance(kind, MLA) else f"GQA, {heads}, {kind.num_kv_heads} KV"
    if model.window is None:
        return name
    num_local, num_global = (model.window_pattern.count(letter) for letter in "LG")
    return f"{name}; {num_local} local ({model.window:,}) to {num_global} global"


def renew():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(TABLE.sub(rf"\1{recipe_table()}\2", text), encoding="utf-8")


def test_the_table_of_recipes_in_the_readme_is_that_of_the_recipes():
    parts = TABLE.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert parts is not None
    assert parts.group(0) == parts.group(1) + recipe_table() + parts.group(2), "renew: make plans"


# Code.


def test_no_file_is_longer_than_a_person_reads():
    lines = {
        shown(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in [*python_files(*PRODUCT, "tests"), ROOT / "setup.py"]
    }
    assert {file: count for file, count in lines.items() if count > MAX_FILE_LINES} == {}


@pytest.mark.parametrize("path", python_files(*PRODUCT), ids=shown)
def test_nothing_prints(path: Path):
    calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    assert "print" not in names


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in python_files(*PRODUCT)} - set(NOT_PACKAGES)
    assert [shown(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_file_that_is_not_code_is_installed_too():
    patterns = setup_value("PACKAGE_DATA")
    for package in ("megamoe", "launch", "data_prep", "model_configs"):
        folder = ROOT / package
        installed = {path for glob in patterns.get(package, []) for path in folder.glob(glob)}
        kinds = (".py", ".pyc")
        files = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in kinds}
        assert sorted(shown(path) for path in files - installed) == []


def test_code_that_is_copied_beside_weights_is_installed(tmp_path):
    build = ["egg_info", "-e", tmp_path, "build", "-b", tmp_path / "build"]
    command = [sys.executable, "setup.py", "-q", *build]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [installed] = tmp_path.glob("build/lib*/megamoe/convert/modeling")
    names = {path.name for path in installed.iterdir()}
    assert {"configuration_megamoe.py", "modeling_megamoe.py"} <= names


def test_the_core_needs_nothing_and_dev_has_all_that_the_rest_needs():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "install_requires" not in text
    assert {"*TRAIN,", "*DATA,", "*TRACK,", "*CONVERT,"} <= set(text.split())


def setup_value(name: str):
    tree = ast.parse((ROOT / "setup.py").read_bytes())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


# Commands.


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for child in action.choices.values() for inner in parsers(child)]
    return found


def subcommands() -> list[str]:
    installed = [item.name for item in command.COMMANDS]
    found = {item.prog for name in installed for item in parsers(command._parser([name]))}
    return sorted(prog.removeprefix("megamoe").strip() for prog in found)


@pytest.mark.parametrize("name", subcommands())
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    assert command.main([*name.split(), "--help"]) == 0
    assert re.search(r"^examples?\b.*:\n  (megamoe|torchrun) ", capsys.readouterr().out, re.M)


def commands_of(page: str) -> list[str]:
    """Return the commands of a page's shell blocks that need no torch and write nothing."""
    blocks = FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    commands = [line.split("  #")[0].strip() for line in lines]
    return [line for line in commands if re.match(r"megamoe (recipe|plan) (?!.* -o )", line)]


@pytest.mark.parametrize("line", commands_of("README.md"))
def test_the_commands_of_the_readme_work(line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert command.main(shlex.split(line)[1:]) == 0


def test_the_readme_shows_recipes_and_plans():
    assert len(commands_of("README.md")) >= 4


# Pages.


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_every_link_leads_somewhere(page: Path):
    targets = [link for link in LINK.findall(prose(page)) if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_every_file_that_a_page_names_is_there(page: Path):
    missing = [name for name in NAMED.findall(prose(page)) if not named_files(name)]
    assert missing == []


def named_files(name: str) -> list[Path]:
    if "my_" in name:  # the reader's own
        return [ROOT]
    return [path for part in braces(name) for path in ROOT.glob(part.rstrip("/"))]


def braces(name: str) -> list[str]:
    """Return 'a/{b,c}.py' as 'a/b.py' and 'a/c.py'."""
    inside = re.search(r"\{(.*?)\}", name)
    if inside is None:
        return [name]
    return [name.replace(inside.group(0), part) for part in inside.group(1).split(",")]


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_every_make_target_that_a_page_names_is_there(page: Path):
    targets = {name for name, _ in TARGET.findall((ROOT / "Makefile").read_text())}
    named = {first or second for first, second in MAKE.findall(page.read_text(encoding="utf-8"))}
    assert named - targets == set()


def test_every_make_target_says_what_it_does():
    found = TARGET.findall((ROOT / "Makefile").read_text())
    assert [name for name, text in found if not text] == []
    assert {"train", "test", "check"} <= {name for name, _ in found}


def test_the_page_on_architecture_stays_short():
    lines = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_ARCHITECTURE_LINES


def test_decisions_are_numbered_and_say_context_choice_and_cost():
    notes = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(note.name[:4]) for note in notes] == list(range(1, len(notes) + 1))
    for note in notes:
        headings = re.findall(r"^## (.+)$", note.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == ["Context", "Choice", "Cost"], note.name


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{megamoe.__version__}]" in text


if __name__ == "__main__":
    renew()
