"""`megamoe model params`: the figures of a recipe, by formula, without torch."""

import json

import pytest

from megamoe.__main__ import main
from megamoe.recipe.load import find_recipe, load_recipe, recipe_names
from tests.unit.test_recipe_published import TOTALS


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["model", "params", *arguments, "--formula"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names())
def test_the_parts_and_the_layers_add_up(name: str, capsys: pytest.CaptureFixture[str]):
    document = json.loads(printed(capsys, name, "--json"))
    parts = document["components"]
    assert sum(parts.values()) == document["total"]
    layers = sum(each["layers"] * each["params"] for each in document["layers"])
    model = load_recipe(name).recipe.model
    outside = parts["input_table"] + parts["output_table"] + parts["mtp"] + model.hidden_dim
    assert layers + outside == document["total"]
    assert sum(each["layers"] for each in document["layers"]) == model.num_layers
    published = document["published"]
    assert published["difference"] == 0
    assert published["total"] == published["counted"] == TOTALS.get(name, published["total"])
    assert document["modules"] is None


def test_a_table_says_what_is_not_released(capsys: pytest.CaptureFixture[str]):
    lines = printed(capsys, "ax_k1_519b_a33b").splitlines()
    assert lines[0] == "ax_k1_519b_a33b"
    assert f"{'1 layer global, dense':<24}{'497,507,328':>18}  each" in lines
    assert f"{'60 layers global, MoE':<24}{'8,602,279,104':>18}  each" in lines
    assert lines[-2] == f"{'modules':<24}{'-':>18}  not built"
    assert lines[-1] == (
        "published                  518,983,059,456  "
        "without token prediction and expert biases; difference 0"
    )


def test_a_tied_table_counts_once(capsys: pytest.CaptureFixture[str]):
    document = json.loads(printed(capsys, "keural_14b", "--json"))
    assert document["components"]["output_table"] == 0
    assert document["active"] == document["active_without_input_table"]


def test_a_changed_model_differs_from_what_is_published(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "vaetki_7b_a1b", "--set", "model.num_layers=23")
    assert text.splitlines()[-1] == (
        "published                    7,250,296,320  difference -295,410,944"
    )


def test_of_a_scaled_model_nothing_is_published(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "vaetki_7b_a1b", "--scale", "tiny")
    assert text.splitlines()[-1].endswith("  nothing of this model")
    assert json.loads(printed(capsys, "vaetki_7b_a1b", "--scale", "tiny", "--json"))["total"] > 0


def test_a_part_that_was_taken_out_is_not_named(capsys: pytest.CaptureFixture[str]):
    words = ["--set", "model.mtp=None", "--set", "*.mtp_loss=None"]
    last = printed(capsys, "ax_k1_519b_a33b", *words).splitlines()[-1]
    assert last == "published                  518,983,059,456  without expert biases; difference 0"
    words += ["--set", "model.experts.expert_bias=False", "--set", "*.router.bias_update_rate=0.0"]
    last = printed(capsys, "ax_k1_519b_a33b", *words).splitlines()[-1]
    assert last == "published                  518,983,059,456  difference 0"


def test_another_count_than_the_published_one_is_a_failure(capsys, tmp_path):
    text = find_recipe("vaetki_7b_a1b").read_text(encoding="utf-8")
    file = tmp_path / "vaetki_7b_a1b.py"
    file.write_text(text.replace("=7_250_296_320", "=7_250_296_321"), encoding="utf-8")
    assert main(["model", "params", str(file), "--formula"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("7,250,296,321  difference -1")
    printed(capsys, str(file), "--set", "model.init_std=0.01")
    printed(capsys, str(file), "--scale", "tiny")
