"""The commands of the recipe's pages print what the pages say."""

import re
import shlex
from pathlib import Path

import pytest

import megamoe
from megamoe.__main__ import main

DOCS = Path(megamoe.__file__).parent.parent / "docs"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
PAGES = ("adding-a-model.md", "curriculum.md")


def examples() -> list[tuple[str, str, str]]:
    """Return (page, command, output) of every console block."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
            command, _, output = block.partition("\n")
            found.append((page, command, output))
    return found


def test_the_pages_have_examples():
    assert len(examples()) >= 4


@pytest.mark.parametrize(("page", "command", "output"), examples())
def test_an_example_prints_what_the_page_says(page: str, command: str, output: str, capsys):
    given, _, grep = command.removeprefix("$ megamoe ").partition(" | ")
    assert main(shlex.split(given)) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    if grep:
        pattern = shlex.split(grep)[-1]
        lines = [line for line in lines if re.search(pattern, line)]
    assert "".join(lines) == output
