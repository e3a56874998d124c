"""A recipe file read as data: what it may hold, and where its values come from."""

import random
from pathlib import Path

import pytest

from megamoe.errors import RecipeError
from megamoe.recipe import Layout
from megamoe.recipe.evaluate import evaluate_expression
from megamoe.recipe.load import LoadedRecipe, load_recipe, recipe_names
from megamoe.recipe.origin import Origin, comments_of
from megamoe.recipe.tree import PlacedError, build

SOURCE = recipe_names()["vaetki_7b_a1b"].read_text(encoding="utf-8")


def loaded_from(tmp_path: Path, source: str) -> LoadedRecipe:
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    return load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", 1_000),
        ("-5", -5),
        ("2e-4", 2e-4),
        ("2 * 3 + 4 - 1", 9),
        ("7 // 2", 3),
        ("1 / 8", 0.125),
        ("2**10", 1_024),
        ("-(2**3)", -8),
        ("None", None),
        ("True", True),
        ("'a' + 'b'", "ab"),
        ("()", ()),
        ("(1, (2, 'x'))", (1, (2, "x"))),
        (
            "Layout(tp=1, pp=1, vpp=1, pipeline='even', cp=1, cp_scheme='auto', ep=1, etp=1, dispatcher='all_to_all', micro_batch=2 * 2, recompute=())",
            Layout(
                tp=1,
                pp=1,
                vpp=1,
                pipeline="even",
                cp=1,
                cp_scheme="auto",
                ep=1,
                etp=1,
                dispatcher="all_to_all",
                micro_batch=4,
                recompute=(),
            ),
        ),
    ],
)
def test_an_expression_has_the_value_that_python_gives_it(text: str, value: object):
    assert build(evaluate_expression(text, "x"), "x") == value


def test_names_fields_and_annotations_are_read(tmp_path: Path):
    source = SOURCE.replace(
        "GENERAL = Stage(", "PEAK: float = 2e-4  # my note\nGENERAL: Stage = Stage(", 1
    ).replace("peak=2e-4,", "peak=PEAK,")
    source = source.replace("final=1e-4,", "final=GENERAL.lr.peak / 2,")
    loaded = loaded_from(tmp_path, source)
    assert loaded.recipe == load_recipe("vaetki_7b_a1b").recipe


def test_the_comment_at_the_definition_of_a_name_is_its_origin(tmp_path: Path):
    source = SOURCE.replace("GENERAL = Stage(", "PEAK = 2e-4  # my note\nGENERAL = Stage(", 1)
    source = source.replace("peak=2e-4,  # report 3.2, card", "peak=PEAK,", 1)
    assert loaded_from(tmp_path, source).origins["general.lr.peak"].words() == "my note"


def test_a_value_without_comment_is_unstated(tmp_path: Path):
    source = SOURCE.replace("seq_len=4_096,  # report 3.2", "seq_len=4_096,", 1)
    origins = loaded_from(tmp_path, source).origins
    assert origins["general.seq_len"].kind == "unstated"
    assert origins["reasoning.seq_len"].root().kind == "unstated"


def test_what_is_assumed_as_a_whole_spares_a_value_with_a_source_of_its_own(tmp_path: Path):
    source = SOURCE.replace("beta1=0.9,", "beta1=0.9,  # report 3")
    origins = loaded_from(tmp_path, source).origins
    assert origins["optimizer.beta1"] == Origin(kind="stated", text="report 3")
    assert origins["optimizer.beta2"].kind == "assumed"


def test_replace_of_a_part_inherits_the_rest_of_it(tmp_path: Path):
    source = SOURCE.replace('    name="reasoning",', '    name="reasoning",', 1)
    start = source.index("    lr=LearningRate(", source.index("REASONING = "))
    end = source.index("    batch_ramp", start)
    source = (
        source[:start] + "    lr=replace(GENERAL.lr, warmup_tokens=7),  # mine\n" + source[end:]
    )
    origins = loaded_from(tmp_path, source).origins
    assert origins["reasoning.lr.warmup_tokens"].words() == "mine"
    assert origins["reasoning.lr.peak"].source == "general.lr.peak"


def test_a_default_that_is_left_out_has_the_place_of_its_object(tmp_path: Path):
    source = SOURCE.replace("            yarn=None,  # config: rope_scaling null\n", "")
    source = source.replace("local_rope=Rope(", "local_rope=Rope(  # here")
    loaded = loaded_from(tmp_path, source)
    assert loaded.recipe == load_recipe("vaetki_7b_a1b").recipe
    assert loaded.origins["model.local_rope.yarn"].words() == "here"


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path):
    path = tmp_path / "windows.py"
    path.write_bytes(b"\xef\xbb\xbf" + SOURCE.replace("\n", "\r\n").encode())
    loaded = load_recipe(str(path))
    published = load_recipe("vaetki_7b_a1b")
    assert (loaded.recipe, loaded.origins) == (published.recipe, published.origins)


def test_a_recipe_is_never_run(tmp_path: Path):
    trace = tmp_path / "trace"
    with pytest.raises(RecipeError, match="calls 'open'"):
        loaded_from(tmp_path, SOURCE + f"X = open({str(trace)!r}, 'w')\n")
    assert not trace.exists()


def test_comments_are_those_behind_code_only():
    assert comments_of("# alone\nX = 1  # behind\nY = '# text'\n") == {2: "behind"}


def knocked(seed: int, knocks: int) -> str:
    """Return the recipe with a few characters knocked out or in."""
    rng, text = random.Random(seed), SOURCE
    for _ in range(knocks):
        at, length = rng.randrange(len(text)), rng.choice((0, 1, 1, 5, 40))
        new = "".join(rng.choice("()[],=.'\"#\\\n 019eax*-") for _ in range(rng.choice((0, 1, 2))))
        text = text[:at] + new + text[at + length :]
    return text


def outcome(path: Path) -> LoadedRecipe | str:
    try:
        return load_recipe(str(path))
    except RecipeError as error:
        return str(error)


def test_a_file_with_letters_knocked_out_or_in_loads_or_is_told_in_one_line(tmp_path: Path):
    path = tmp_path / "knocked.py"
    results = []
    for seed in range(150):
        path.write_text(knocked(seed, knocks=1 + seed % 4), encoding="utf-8")
        results.append(outcome(path))
    told = [result for result in results if isinstance(result, str)]
    assert len(told) > 100
    assert all(text.startswith(f"{path}:") and "\n" not in text for text in told)


def test_an_expression_never_escapes_its_bounds():
    for text in ("10**25", "'x' * 3", "1e300 * 1e300", "2**65", "().__class__", "(1).real"):
        with pytest.raises(PlacedError):
            evaluate_expression(text, "x")
