"""A Hugging Face folder that is not as it should be ends an import in one line."""

import json

import pytest

from tests.mcore.test_convert_audit import NAME, exported, write_run
from tests.mcore.test_convert_refused import refused

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
