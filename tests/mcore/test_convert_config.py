"""What config.json says of a model, what is compared with it, and what no reader can express."""

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe.convert.architectures import ARCHITECTURES, Stage, problems
from megamoe.convert.config import config_of, differences
from megamoe.convert.from_hf import from_hf
from megamoe.convert.to_hf import to_hf
from megamoe.errors import CheckpointError
from megamoe.recipe import Rope, Yarn
from tests.mcore.converted import MODELS
from tests.mcore.test_convert_audit import exported, quiet, random_tensors, write_run

A_X_K1 = Yarn(
    factor=4.0,
    original_seq_len=32_768,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.0,
)
DEEPSEEK_V3 = replace(A_X_K1, factor=40.0, original_seq_len=4_096, mscale_all_dim=1.0)
MODELING = Path(__file__).parents[2] / "megamoe/convert/modeling"
NORM = "model.layers.0.post_mlp_layernorm.weight"


def stage(yarn: Yarn, name: str = "deepseek_v3") -> Stage:
    rope = Rope(base=10_000.0, interleaved=True, yarn=yarn)
    return Stage(model=replace(MODELS[name], global_rope=rope), interpolation=1.0, seq_len=32_768)


def found(yarn: Yarn, **changes: object) -> list[str]:
    """Return what is different when the released form of a configuration is read."""
    config = config_of(ARCHITECTURES["deepseek_v3"], stage(yarn))
    scaling = {**config.pop("rope_parameters"), "type": "yarn"}
    del scaling["rope_type"]
    scaling = {k: v for k, v in {**scaling, **changes}.items() if v is not None}
    given = {**config, "rope_scaling": scaling}
    return list(differences(ARCHITECTURES["deepseek_v3"], stage(yarn), given))


def test_yarn_is_written_as_transformers_read_it():
    config = config_of(ARCHITECTURES["axk1"], stage(A_X_K1, "axk1"))
    assert config["max_position_embeddings"] == 131_072
    assert config["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32_768,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "factor"),
    [(1.0, 1.0, None), (0.7, 1.0, None), (1.0, 0.0, None), (0.5, 0.0, 1.0693), (0.0, 1.0, 0.8782)],
)
def test_a_scale_that_transformers_do_not_derive_is_written_out(mscale, mscale_all_dim, factor):
    yarn = replace(A_X_K1, mscale=mscale, mscale_all_dim=mscale_all_dim)
    written = config_of(ARCHITECTURES["axk1"], stage(yarn, "axk1"))["rope_parameters"]
    assert written.get("attention_factor") == (factor and pytest.approx(factor, abs=1e-4))


@pytest.mark.parametrize("yarn", [A_X_K1, DEEPSEEK_V3])
def test_the_released_form_of_yarn_is_the_same(yarn):
    assert found(yarn) == []
    assert found(yarn, factor=int(yarn.factor), beta_fast=None, beta_slow=None) == []


def test_a_factor_that_is_left_out_follows_from_the_lengths():
    assert found(DEEPSEEK_V3, factor=None) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 8.0}, "YaRN factor 8.0, not 40.0"),
        (
            {"original_max_position_embeddings": 8_192},
            "YaRN original_max_position_embeddings 8192, not 4096",
        ),
        ({"beta_fast": 16}, "YaRN beta_fast 16, not 32.0"),
        ({"beta_slow": 2}, "YaRN beta_slow 2, not 1.0"),
        ({"truncate": False}, "YaRN truncate False, not True"),
        ({"mscale_all_dim": None}, "YaRN mscale_all_dim 0.0, not 1.0"),
        (
            {"attention_factor": 1.5},
            "YaRN attention_factor 1.5, not 1 (of mscale 1 and mscale_all_dim 1)",
        ),
        ({"type": "linear"}, "rope_type 'linear', not 'yarn'"),
        ({"type": None}, "rope_type 'default', not 'yarn'"),
    ],
)
def test_other_positions_are_named(changes, message):
    assert message in found(DEEPSEEK_V3, **changes)


@pytest.mark.parametrize("name", ["exaone_moe", "mixtral, tied", "vaetki", "keural_moe"])
def test_yarn_of_other_architectures_is_refused(name):
    model = MODELS[name]
    rope = "local_rope" if model.local_rope else "global_rope"
    stretched = replace(getattr(model, rope), yarn=A_X_K1)
    given = Stage(model=replace(model, **{rope: stretched}), interpolation=8.0, seq_len=64)
    [reason] = list(problems(ARCHITECTURES[name.split(",")[0]], given))[:1]
    assert reason == f"{rope}.yarn, which is converted for deepseek_v3 and axk1 alone"


def test_a_norm_after_a_dense_mlp_that_nothing_applies_is_left_out_and_said_so(tmp_path):
    """The released weights of A.X-K1 have one; transformers drops it."""
    name = "axk1, dense layer"
    folder = exported(tmp_path, name)
    (folder / "audit.json").unlink()
    [file] = folder.glob("*.safetensors")
    save_file({**load_file(file), NORM: torch.ones(32)}, file)
    run, said = write_run(tmp_path / "again", name, None), []
    checkpoint = from_hf(folder, run, tokens_seen=0, say=said.append)
    assert f"left out: {NORM}; the plan's model has no such tensor" in said
    [left_out] = json.loads((checkpoint / "audit.json").read_text())["left_out"]
    assert (left_out["name"], left_out["shape"], left_out["dtype"]) == (NORM, [32], "float32")
    save_file({**load_file(file), NORM: torch.ones(31)}, file)
    with pytest.raises(CheckpointError, match=re.escape(f"{NORM} is [31], the plan's model has")):
        from_hf(folder, write_run(tmp_path / "third", name, None), tokens_seen=0, say=quiet)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("axk1, norm after a dense layer", "AXK1"),
        ("vaetki", "vaetki"),
        ("keural_moe", "keural_moe"),
        ("axk1, dense layer", None),
        ("axk1", None),
        ("deepseek_v3", None),
    ],
)
def test_code_is_beside_weights_that_no_class_of_transformers_computes(name, model_type, tmp_path):
    """Without the flag A.X K1 must not load: as axk1 it would, and give other logits."""
    run, said = write_run(tmp_path / "run", name, random_tensors(MODELS[name])), []
    to_hf(run, tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=said.append)
    config = json.loads((tmp_path / "out/config.json").read_text())
    code = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}
    assert any("trust_remote_code=True" in line for line in said) == (model_type is not None)
    assert ("auto_map" in config) == (model_type is not None)
    if model_type is None:
        assert code == {}
        return
    assert config["model_type"] == model_type
    assert code == {path.name: path.read_bytes() for path in MODELING.glob("*_megamoe.py")}
    for value in config["auto_map"].values():
        file, name = value.split(".")
        tree = ast.parse(code[f"{file}.py"])
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_an_import_runs_no_code_of_a_folder(tmp_path):
    name = "axk1, norm after a dense layer"
    folder = exported(tmp_path, name)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('was run')\n")
    run = write_run(tmp_path / "again", name, None)
    assert from_hf(folder, run, tokens_seen=0, say=quiet).is_dir()


def test_code_beside_weights_needs_torch_and_transformers_alone():
    found = set()
    for path in MODELING.glob("*_megamoe.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "transformers"}


def test_what_an_export_leaves_out_is_in_the_audit_with_its_checksum(tmp_path, monkeypatch):
    model = replace(MODELS["vaetki"], mtp=replace(MODELS["exaone_moe"].mtp, ffn="moe"))
    monkeypatch.setitem(MODELS, "vaetki", model)
    left_out = json.loads((exported(tmp_path, "vaetki") / "audit.json").read_text())["left_out"]
    experts = [r for r in left_out if r["name"].endswith("experts.experts.linear_fc1.weight")]
    assert [record["index"] for record in experts] == [*range(8)]
    assert {record["name"].split(".")[0] for record in left_out} == {"mtp"}
    assert all(len(record["sha256"]) == 64 for record in left_out)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (8.0, None, []),
        (
            8.0,
            {"rope_type": "default", "rope_theta": 10_000.0},
            [],
        ),  # null, as transformers save it
        (1.0, {"rope_type": "linear", "factor": 1.0}, []),
        (1.0, {"type": "linear", "factor": 1.0}, []),
        (1.0, None, ["rope_interpolation 8, not 1 (give --tokens-seen of a stage that has it"]),
        (8.0, {"rope_type": "linear", "factor": 4.0}, ["rope_interpolation 4, not 8 (give"]),
        (8.0, {"rope_type": "linear"}, ["rope_type 'linear' with factor None, not 8"]),
        (8.0, {"rope_type": "yarn", "factor": 8.0}, ["rope_type 'yarn', not 'linear' or none"]),
    ],
)
def test_the_interpolation_of_vaetki_is_that_of_the_stage(ours, theirs, expected):
    architecture = ARCHITECTURES["vaetki"]
    trained = Stage(model=MODELS["vaetki"], interpolation=ours, seq_len=32_768)
    given = {**config_of(architecture, trained), "rope_scaling": theirs}
    found = list(differences(architecture, trained, given))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_files_may_be_read_by_whom_other_new_files_may(tmp_path):
    folder = exported(tmp_path)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
