"""`megamoe recipe show | check | list`: what they print."""

import json
import re

import pytest

from megamoe.__main__ import main
from megamoe.recipe.load import recipe_names
from megamoe.recipe.show import shown

NAMES = tuple(recipe_names())


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (20_000_000_000, "20,000,000,000"),
        (10_000.0, "10,000"),
        (2e-4, "0.0002"),
        (0.0, "0.0"),
        (None, "None"),
        (True, "True"),
        ("cosine", "cosine"),
        (((0, 1_984), (100_000_000_000, 3_968)), "0: 1,984 | 100,000,000,000: 3,968"),
        ((("korean", 0.2), ("code", 0.8)), "korean: 0.2 | code: 0.8"),
    ],
)
def test_values_read_as_people_say_them(value: object, text: str):
    assert shown(value) == text


@pytest.mark.parametrize(
    "line",
    [
        ("model.num_layers", "24", "report table 1"),
        ("model.attention", "MLA", "report 2.1"),
        ("optimizer.beta1", "0.9", "assumed: not published: usual values of models of this kind"),
        ("general.lr.peak", "0.0002", "report 3.2, card"),
        ("reasoning.fim_rate", "0.6", "report 3.2"),
        ("reasoning.seq_len", "4,096", "as general.seq_len: report 3.2"),
        ("long_context.precision", "Fp8Block", "as reasoning.precision: report 2.1"),
    ],
)
def test_show_has_path_value_and_origin(line: tuple[str, str, str], capsys):
    lines = printed(capsys, "recipe", "show", "vaetki_7b_a1b").splitlines()
    path, value, origin = line
    found = next(text for text in lines if text.split()[:1] == [path])
    assert found.split(maxsplit=2)[1] == value
    assert found.split(maxsplit=2)[2].startswith(origin)


def test_show_is_aligned_and_grouped(capsys):
    text = printed(capsys, "recipe", "show", "vaetki_7b_a1b")
    groups = [group.splitlines() for group in text.split("\n\n")]
    firsts = [group[-1].partition(".")[0].split()[0] for group in groups]
    assert firsts == [
        "source", "published", "model", "tokenizer", "optimizer",
        "general", "reasoning", "long_context",
    ]  # fmt: skip
    starts = (re.match(r"\S+ +", line) for group in groups for line in group)
    columns = {start.end() for start in starts if start}
    assert len(columns) == 1


def test_show_tells_the_rule_and_the_option(capsys):
    text = printed(
        capsys,
        "recipe",
        "show",
        "vaetki_7b_a1b",
        "--scale",
        "tiny",
        "--set",
        "model.hidden_dim=256",
    )
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["model.hidden_dim"].split(maxsplit=2)[1:] == [
        "256",
        "command line: --set model.hidden_dim=256",
    ]
    assert "scale rule: the fewest layers" in lines["model.num_layers"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [(), ("--scale", "tiny")])
def test_show_as_json_is_every_value(name: str, scale: tuple[str, ...], capsys):
    document = json.loads(printed(capsys, "recipe", "show", name, "--json", *scale))
    table = printed(capsys, "recipe", "show", name, *scale)
    assert document["recipe"] == name
    assert document["scale"] == ("tiny" if scale else None)
    assert [row["path"] for row in document["values"]] == [
        line.split()[0] for line in table.splitlines() if line
    ]
    assert {row["origin"] for row in document["values"]} <= {
        "stated", "assumed", "inherited", "scale rule",
    }  # fmt: skip


def test_json_tells_where_an_inherited_value_comes_from(capsys):
    document = json.loads(printed(capsys, "recipe", "show", "vaetki_7b_a1b", "--json"))
    row = next(row for row in document["values"] if row["path"] == "reasoning.layout.pp")
    assert row["value"] == 4
    assert (row["origin"], row["source"], row["source_origin"]) == (
        "inherited",
        "general.layout.pp",
        "assumed",
    )


def test_check_prints_one_line_a_recipe(capsys):
    lines = printed(capsys, "recipe", "check", *NAMES).splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.startswith("OK ") for line in lines)
    vaetki = next(line for line in lines if "vaetki_7b" in line)
    assert "7,250,296,320 parameters, 24 layers, 64 experts top-5 + 1 shared" in vaetki
    assert "general 1.3T tokens" in vaetki


def test_check_takes_a_file(capsys):
    path = str(recipe_names()["keural_14b"])
    assert printed(capsys, "recipe", "check", path).startswith("OK keural_14b: ")


def test_list_names_every_recipe(capsys):
    lines = printed(capsys, "recipe", "list").splitlines()
    assert [line.partition(":")[0] for line in lines] == list(NAMES)
