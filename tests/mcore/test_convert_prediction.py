"""Layers of multi-token prediction in a folder: what is there, what may be missing, what is wrong."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megamoe.convert.from_hf import WITHOUT_BIAS, WITHOUT_PREDICTION, from_hf
from megamoe.convert.ours import our_tensors
from megamoe.convert.to_hf import to_hf
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import TensorReader
from megamoe.recipe import Mtp
from tests.mcore.converted import MODELS
from tests.mcore.test_convert_audit import change, exported, quiet, random_tensors, write_run

NAME = "axk1, prediction"
LAYER = "model.layers.4"  # after the last of four
TABLE = f"{LAYER}.embed_tokens.weight"
HEAD = f"{LAYER}.shared_head.head.weight"


def contents(folder):
    [file] = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", [NAME, "deepseek_v3, prediction"])
def test_prediction_has_the_names_and_shapes_of_deepseek(name, tmp_path):
    folder = exported(tmp_path, name)
    shapes = {name: tuple(x.shape) for name, x in contents(folder).items()}
    last, added = (
        {k.removeprefix(f"{n}."): v for k, v in shapes.items() if k.startswith(f"{n}.")}
        for n in ("model.layers.3", LAYER)
    )
    assert {name: added.pop(name) for name in added.keys() - last.keys()} == {
        "enorm.weight": (32,),
        "hnorm.weight": (32,),
        "eh_proj.weight": (32, 64),
        "shared_head.norm.weight": (32,),
        "shared_head.head.weight": (96, 32),
        "embed_tokens.weight": (96, 32),
    }
    assert added == last
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (4, 1)


def test_the_audit_has_the_copies_with_the_checksum_of_their_table(tmp_path):
    folder = exported(tmp_path, NAME)
    checkpoint = from_hf(
        folder, write_run(tmp_path / "again", NAME, None), tokens_seen=0, say=quiet
    )
    for place in (folder, checkpoint):
        audit = json.loads((place / "audit.json").read_text())
        assert audit["left_out"] == []
        theirs = {part["name"]: part["sha256"] for x in audit["tensors"] for part in x["theirs"]}
        assert theirs.keys() == contents(folder).keys()
        assert theirs[TABLE] == theirs["model.embed_tokens.weight"]
        assert theirs[HEAD] == theirs["lm_head.weight"] != theirs[TABLE]


@pytest.mark.parametrize("missing", [(TABLE,), (HEAD,), (TABLE, HEAD)])
def test_a_folder_may_hold_a_table_once(missing, tmp_path):
    folder = exported(tmp_path, NAME)
    change(folder, **dict.fromkeys(missing))
    run = write_run(tmp_path / "again", NAME, None)
    reader = TensorReader(from_hf(folder, run, tokens_seen=0, say=quiet))
    wanted = random_tensors(MODELS[NAME])
    assert all(torch.equal(reader.read(name), wanted[name]) for name in our_tensors(MODELS[NAME]))


MUTATIONS = {
    "another copy": (
        {HEAD: torch.ones(96, 32)},
        f"{HEAD} is not equal to lm_head.weight; the plan's model has one table for both",
    ),
    "a copy of another type": (
        {TABLE: torch.ones(96, 32, dtype=torch.bfloat16)},
        f"{TABLE} is not equal to model.embed_tokens.weight; the plan's model has one",
    ),
    "a copy of another shape": (
        {TABLE: torch.ones(95, 32)},
        f"{TABLE} is [95, 32], the plan's model has [96, 32]",
    ),
    "missing": ({f"{LAYER}.hnorm.weight": None}, f"{LAYER}.hnorm.weight is missing"),
    "misshaped": (
        {f"{LAYER}.eh_proj.weight": torch.ones(32, 32)},
        f"{LAYER}.eh_proj.weight is [32, 32], the plan's model has [32, 64]",
    ),
    "extra": (
        {"model.layers.5.enorm.weight": torch.ones(32)},
        "model.layers.5.enorm.weight is not of the model",
    ),
    "nan": (
        {f"{LAYER}.enorm.weight": torch.full((32,), torch.nan)},
        f"{LAYER}.enorm.weight holds 32 values that are NaN or infinite",
    ),
}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_an_import_names_the_tensor_of_prediction_that_is_wrong(kind, tmp_path):
    changes, message = MUTATIONS[kind]
    folder = exported(tmp_path, NAME)
    (folder / "audit.json").unlink()
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        from_hf(folder, write_run(tmp_path / "again", NAME, None), tokens_seen=0, say=quiet)


def test_a_tensor_of_prediction_must_be_that_of_the_audit(tmp_path):
    folder = exported(tmp_path, NAME)
    change(folder, **{f"{LAYER}.enorm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=rf"{LAYER}.enorm.weight is not the tensor of audit"):
        from_hf(folder, write_run(tmp_path / "again", NAME, None), tokens_seen=0, say=quiet)


@pytest.mark.parametrize("name", [NAME, "deepseek_v3, prediction", "exaone_moe"])
@pytest.mark.parametrize("said", [0, 1])
def test_a_folder_without_prediction_is_refused_with_the_remedy(name, said, tmp_path, monkeypatch):
    """Released folders say 1 in their configuration and hold no such layer."""
    model = MODELS[name]
    monkeypatch.setitem(MODELS, name, replace(model, mtp=None))
    folder = exported(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": said}))
    from_hf(folder, write_run(tmp_path / "without", name, None), tokens_seen=0, say=quiet)
    monkeypatch.setitem(MODELS, name, model)
    message = f"out: holds no multi-token prediction; give the plan {WITHOUT_PREDICTION}"
    with pytest.raises(CheckpointError, match=f"{re.escape(message)}$"):
        from_hf(folder, write_run(tmp_path / "again", name, None), tokens_seen=0, say=quiet)


@pytest.mark.parametrize("name", [NAME, "exaone_moe"])
def test_a_folder_without_biases_is_refused_with_the_remedy(name, tmp_path, monkeypatch):
    model = MODELS[name]
    plain = replace(model, experts=replace(model.experts, expert_bias=False))
    monkeypatch.setitem(MODELS, name, plain)
    folder = exported(tmp_path, name)
    from_hf(folder, write_run(tmp_path / "without", name, None), tokens_seen=0, say=quiet)
    monkeypatch.setitem(MODELS, name, model)
    message = r"_bias is missing \(and \d more\)" + re.escape(f"; give the plan {WITHOUT_BIAS}")
    with pytest.raises(CheckpointError, match=f"{message}$"):
        from_hf(folder, write_run(tmp_path / "again", name, None), tokens_seen=0, say=quiet)


def test_one_bias_that_is_missing_is_no_folder_without(tmp_path):
    folder, name = exported(tmp_path, NAME), "model.layers.2.mlp.gate.e_score_correction_bias"
    change(folder, **{name: None})
    with pytest.raises(CheckpointError, match=f"{name} is missing$"):
        from_hf(folder, write_run(tmp_path / "again", NAME, None), tokens_seen=0, say=quiet)


@pytest.mark.parametrize(("name", "extra"), [(NAME, LAYER), ("exaone_moe", "mtp")])
def test_a_folder_with_prediction_is_refused_by_a_plan_without(name, extra, tmp_path, monkeypatch):
    folder = exported(tmp_path, name)
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], mtp=None))
    message = (
        rf"{extra}\.\S+ is not of the model \(and \d+ more\); "
        "the plan's model needs model.mtp, and its stages mtp_loss$"
    )
    with pytest.raises(CheckpointError, match=message):
        from_hf(folder, write_run(tmp_path / "again", name, None), tokens_seen=0, say=quiet)


def test_prediction_of_an_architecture_without_is_refused_with_the_remedy(tmp_path, monkeypatch):
    folder = exported(tmp_path, "vaetki")
    model = replace(MODELS["vaetki"], mtp=Mtp(num_layers=1, ffn="moe"))
    monkeypatch.setitem(MODELS, "vaetki", model)
    message = re.escape(f"multi-token prediction (give the plan {WITHOUT_PREDICTION})")
    with pytest.raises(CheckpointError, match=f"{message}$"):
        from_hf(folder, write_run(tmp_path / "again", "vaetki", None), tokens_seen=0, say=quiet)


@pytest.mark.parametrize(
    ("mtp", "told"),
    [
        (None, 0),
        (Mtp(num_layers=1, ffn="moe"), 0),
        (Mtp(num_layers=1, ffn="dense"), 1),
        (Mtp(num_layers=2, ffn="moe"), 1),
    ],
)
def test_an_export_tells_what_readers_of_predictions_do_not_know(mtp, told, tmp_path, monkeypatch):
    model = replace(MODELS["deepseek_v3"], mtp=mtp)
    monkeypatch.setitem(MODELS, "deepseek_v3", model)
    run, said = write_run(tmp_path / "run", "deepseek_v3", random_tensors(model)), []
    to_hf(run, tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=said.append)
    assert sum("know one layer of multi-token prediction, with experts" in x for x in said) == told
