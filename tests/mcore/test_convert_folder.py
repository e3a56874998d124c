"""A Hugging Face folder that is not as it should be ends an import in one line; a plan may overrule it."""

import json
from pathlib import Path

import pytest

from megamoe import __main__ as command
from tests.mcore.test_convert_audit import NAME, exported, write_run
from tests.mcore.test_convert_refused import refused

AXK1 = "axk1"
TENSOR = "lm_head.weight"
NO_OBJECT = "weight_map is not an object of tensors and their files"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, NO_OBJECT),
        ({"weight_map": ["a.safetensors"]}, NO_OBJECT),
        ({"weight_map": "a.safetensors"}, NO_OBJECT),
        ({"weight_map": None}, NO_OBJECT),
        ({"weight_map": {TENSOR: 1}}, f"{TENSOR} is in 1, which is no file beside it"),
        ({"weight_map": {TENSOR: ["a"]}}, f"{TENSOR} is in ['a'], which is no file beside it"),
        ({"weight_map": {TENSOR: ""}}, f"{TENSOR} is in '', which is no file beside it"),
        (["a.safetensors"], "not an object"),
    ],
)
def test_an_index_that_is_none_is_said_to_be(index, message, tmp_path, capsys):
    folder = exported(tmp_path)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    run = write_run(tmp_path / "again", NAME, None)
    mistake = refused(capsys, "convert", "from-hf", folder, run)
    assert mistake == f"megamoe: error: {path}: {message}"


@pytest.mark.parametrize("name", ["../other.safetensors", "{tmp_path}/other.safetensors", ".."])
def test_an_index_names_no_file_outside_its_folder(name, tmp_path, capsys):
    folder, name = exported(tmp_path), name.format(tmp_path=tmp_path)
    [file] = folder.glob("*.safetensors")
    file.rename(tmp_path / "other.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {TENSOR: name}}))
    run = write_run(tmp_path / "again", NAME, None)
    mistake = refused(capsys, "convert", "from-hf", folder, run)
    assert mistake == (
        f"megamoe: error: {path}: {TENSOR} is in {name!r}, which is no file beside it"
    )


def with_softmax(tmp_path, **changes: object):
    """Return a folder whose config.json says softmax, as that of A.X K1 was read; its place; a run."""
    folder = exported(tmp_path, AXK1)
    place = folder / "config.json"
    config = json.loads(place.read_text())
    assert config["scoring_func"] == "sigmoid"
    place.write_text(json.dumps({**config, "scoring_func": "softmax", **changes}))
    return folder, f"megamoe: error: {place}", write_run(tmp_path / "again", AXK1, None)


def test_another_scoring_function_is_refused_unless_a_person_says_that_the_plan_is_right(
    tmp_path, capsys
):
    folder, place, run = with_softmax(tmp_path)
    words = "convert", "from-hf", folder, run
    assert refused(capsys, *words) == (
        f"{place}: is of another model than the plan: scoring_func softmax, not sigmoid "
        "(if that is wrong, give --ignore-config scoring_func)"
    )
    assert command.main([*map(str, words), "--ignore-config", "scoring_func"]) == 0
    said = capsys.readouterr()
    assert "overruled by the plan: scoring_func softmax, not sigmoid" in said.err.splitlines()
    audit = json.loads((Path(said.out.strip()) / "audit.json").read_text())
    assert audit["overruled"] == ["scoring_func softmax, not sigmoid"]


def test_what_is_not_ignored_is_still_compared_and_what_agrees_cannot_be_ignored(tmp_path, capsys):
    folder, place, run = with_softmax(tmp_path, norm_topk_prob=False)
    words = "convert", "from-hf", folder, run, "--ignore-config"
    assert refused(capsys, *words, "scoring_func") == (
        f"{place}: is of another model than the plan: norm_topk_prob False, not True "
        "(if that is wrong, give --ignore-config norm_topk_prob)"
    )
    for key in ("routed_scaling_factor", "scoring_func_", "architectures"):
        assert refused(capsys, *words, key) == (
            f"{place}: --ignore-config {key}: agrees with the plan, or is not compared"
        )
    words = *words, "scoring_func", "--ignore-config", "norm_topk_prob"
    assert command.main([*map(str, words)]) == 0
    path = Path(capsys.readouterr().out.strip()) / "audit.json"
    assert len(json.loads(path.read_text())["overruled"]) == 2
