"""A tensor that is missing, extra, misshaped, not finite or another one ends a conversion, by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe import __main__ as command
from megamoe.checkpoints import folder as files
from megamoe.checkpoints.folder import Progress
from megamoe.checkpoints.manifest import write_manifest
from megamoe.convert.from_hf import from_hf
from megamoe.convert.ours import our_tensors, share_tensors
from megamoe.convert.to_hf import to_hf
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import TensorReader, TensorWriter
from megamoe.plan.json import digest, write_plan
from tests.mcore import tiny
from tests.mcore.converted import MODELS

NAME = "exaone_moe"
ABSENT = object()
BIAS = "model.layers.1.mlp.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def quiet(_: str) -> None:
    pass


def random_tensors(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {**our_tensors(model), **share_tensors(model)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_run(folder: Path, name: str, tensors: dict[str, torch.Tensor] | None) -> Path:
    """Write a run folder without an engine: a plan, and a checkpoint of tensors if there are any."""
    plan = tiny.tiny_plan(folder / "data", MODELS[name])
    write_plan(folder / "plan.json", plan)
    if tensors is None:
        return folder
    partial = files.begin(folder / "checkpoints", files.name_of(0))
    writer = TensorWriter(partial)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    entries, _ = writer.finish()
    progress = Progress(
        plan_digest=digest(plan),
        segment=0,
        step=0,
        tokens_seen=0,
        segment_done=False,
        ledger=(),
    )
    write_manifest(partial, [*entries, files.write_progress(partial, progress)])
    files.publish(partial, folder / "checkpoints" / files.name_of(0), keep=9)
    return folder


def exported(folder: Path, name: str = NAME) -> Path:
    run = write_run(folder / "run", name, random_tensors(MODELS[name]))
    to_hf(run, folder / "out", dtype=None, shard_bytes=1 << 30, say=quiet)
    return folder / "out"


def change(folder: Path, **changes: object) -> None:
    """Take tensors away (None), or put others in their place, and forget the audit."""
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_what_went_out_bit_for_bit(name, tmp_path):
    tensors = random_tensors(MODELS[name])
    folder = exported(tmp_path, name)
    run = write_run(tmp_path / "again", name, None)
    reader = TensorReader(from_hf(folder, run, tokens_seen=128, say=quiet))
    wanted = our_tensors(MODELS[name])
    for ours in wanted:
        assert torch.equal(reader.read(ours), tensors[ours]), ours
    assert reader.tensors.keys() == wanted.keys() | share_tensors(MODELS[name]).keys()


MUTATIONS = {
    "missing": ({EXPERT: None}, rf"{EXPERT} is missing"),
    "extra": ({"model.layers.9.x": torch.ones(3)}, "model.layers.9.x is not of the model"),
    "misshaped": ({BIAS: torch.ones(7)}, rf"{BIAS} is \[7\], the plan's model has \[8\]"),
    "nan": ({BIAS: torch.full((8,), torch.nan)}, f"{BIAS} holds 8 values that are NaN or inf"),
    "infinite": (
        {BIAS: torch.full((8,), -torch.inf)},
        f"{BIAS} holds 8 values that are NaN or inf",
    ),
}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_an_import_names_the_tensor_that_is_wrong_and_leaves_nothing(kind, tmp_path):
    changes, message = MUTATIONS[kind]
    folder = exported(tmp_path)
    (folder / "audit.json").unlink()
    change(folder, **changes)
    run = write_run(tmp_path / "again", NAME, None)
    with pytest.raises(CheckpointError, match=message):
        from_hf(folder, run, tokens_seen=0, say=quiet)
    assert files.all_checkpoints(run / "checkpoints") == []
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("kind", ["missing", "extra", "misshaped", "nan"])
def test_an_export_names_the_tensor_that_is_wrong_and_leaves_nothing(kind, tmp_path):
    tensors = random_tensors(MODELS[NAME])
    name = "decoder.layers.2.mlp.experts.experts.linear_fc2.weight"
    if kind == "missing":
        del tensors[name]
        message = f"{name} is missing"
    elif kind == "extra":
        tensors["decoder.layers.2.mlp.extra"] = torch.ones(2)
        message = "decoder.layers.2.mlp.extra is not of the model"
    elif kind == "misshaped":
        tensors[name] = tensors[name][:, :-1].clone()
        message = re.escape(f"{name} is [8, 31, 16], the plan's model has [8, 32, 16]")
    else:
        tensors[name][5, 1, 2] = torch.nan
        message = re.escape(
            f"{name}[5] (model.layers.2.mlp.experts.5.down_proj.weight) holds 1 val"
        )
    run = write_run(tmp_path / "run", NAME, tensors)
    with pytest.raises(CheckpointError, match=message):
        to_hf(run, tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_with_an_audit_must_be_what_the_audit_says(tmp_path):
    folder = exported(tmp_path)
    change(folder, **{BIAS: torch.ones(8)})
    run = write_run(tmp_path / "again", NAME, None)
    with pytest.raises(CheckpointError, match=rf"{BIAS} is not the tensor of audit.json"):
        from_hf(folder, run, tokens_seen=0, say=quiet)


def test_the_audit_has_every_tensor_of_both_sides(tmp_path):
    folder = exported(tmp_path)
    pairs = json.loads((folder / "audit.json").read_text())["tensors"]
    [file] = folder.glob("*.safetensors")
    assert {part["name"] for pair in pairs for part in pair["theirs"]} == load_file(file).keys()
    assert {pair["ours"]["name"] for pair in pairs} == our_tensors(MODELS[NAME]).keys()


def test_a_damaged_checkpoint_is_not_converted(tmp_path):
    run = write_run(tmp_path / "run", NAME, random_tensors(MODELS[NAME]))
    shard = run / "checkpoints" / files.name_of(0) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged, its SHA-256 is another"):
        to_hf(run, tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=quiet)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 64, "hidden_size 64, not 32"),
        ("model_type", "gpt2", "model_type 'gpt2' is not known; known: exaone_moe, "),
        (
            "model_type",
            "mixtral",
            "mixtral does not express the plan's model: window_pattern",
        ),
        ("quantization_config", {}, "quantization_config, whose weights are not read"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type 'yarn', not 'default'"),
        ("sliding_window", 6, "sliding_window 6, not 5"),
        ("sliding_window", None, "sliding_window None, not 5"),
        ("sliding_window", ABSENT, "sliding_window None, not 5"),
    ],
)
def test_a_folder_of_another_model_is_refused(key, value, message, tmp_path):
    folder = exported(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config = {**config, key: value}
    given = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(given))
    run = write_run(tmp_path / "again", NAME, None)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        from_hf(folder, run, tokens_seen=0, say=quiet)


def test_fused_experts_and_old_names_are_read(tmp_path):
    folder = exported(tmp_path, "axk1")
    (folder / "audit.json").unlink()
    [file] = folder.glob("*.safetensors")
    tensors, fused = load_file(file), {}
    for i in range(4):
        name = f"model.layers.{i}.mlp.experts"
        parts = {
            p: [tensors.pop(f"{name}.{e}.{p}_proj.weight") for e in range(8)]
            for p in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        fused[f"{name}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        fused[f"{name}.down_proj"] = torch.stack(parts["down"])
        old = f"model.layers.{i}.post_mlp_layernorm.weight"
        fused[f"model.layers.{i}.mlp.post_mlp_layernorm.weight"] = tensors.pop(old)
    save_file({**tensors, **fused}, file)
    run = write_run(tmp_path / "again", "axk1", None)
    reader = TensorReader(from_hf(folder, run, tokens_seen=0, say=quiet))
    wanted = random_tensors(MODELS["axk1"])
    assert all(torch.equal(reader.read(name), wanted[name]) for name in our_tensors(MODELS["axk1"]))


def test_rotary_rows_in_halves_are_put_in_pairs(tmp_path):
    folder = exported(tmp_path, "axk1")
    (folder / "audit.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_interleave": False}))
    run = write_run(tmp_path / "again", "axk1", None)
    reader = TensorReader(from_hf(folder, run, tokens_seen=0, say=quiet))
    name = "decoder.layers.0.self_attention.linear_kv_down_proj.weight"
    before, after = random_tensors(MODELS["axk1"])[name], reader.read(name)
    assert torch.equal(after, before[[*range(12), 12, 14, 13, 15]])


def test_float32_takes_the_exact_copies_of_rounded_weights_and_bfloat16_rounds(tmp_path):
    model = MODELS[NAME]
    exact = random_tensors(model)
    tensors = {
        name: value if "router.e" in name or "shares" in name else value.bfloat16()
        for name, value in exact.items()
    }
    for name in our_tensors(model):
        if not name.endswith("expert_bias"):
            tensors[f"chained_0.optimizer.state.param.{name}"] = exact[name]
    run = write_run(tmp_path / "run", NAME, tensors)
    for dtype, out in (("float32", "exact"), ("bfloat16", "rounded")):
        to_hf(run, tmp_path / out, dtype=dtype, shard_bytes=1 << 30, say=quiet)
    [exact_file] = (tmp_path / "exact").glob("*.safetensors")
    [rounded_file] = (tmp_path / "rounded").glob("*.safetensors")
    whole, rounded = load_file(exact_file), load_file(rounded_file)
    table = exact["embedding.word_embeddings.weight"]
    assert torch.equal(whole["model.embed_tokens.weight"], table)
    assert torch.equal(rounded["model.embed_tokens.weight"], table.bfloat16())
    assert rounded[BIAS].dtype == torch.float32


def test_a_model_that_no_architecture_expresses_is_refused_with_the_nearest_reason(
    tmp_path, monkeypatch
):
    model = replace(MODELS[NAME], norm=replace(MODELS[NAME].norm, zero_centered=True))
    monkeypatch.setitem(MODELS, NAME, model)
    run = write_run(tmp_path / "run", NAME, random_tensors(model))
    with pytest.raises(CheckpointError, match=r"\(exaone_moe: norm PreNorm, zero-centred; "):
        to_hf(run, tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=quiet)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    run = write_run(tmp_path / "run", NAME, random_tensors(MODELS[NAME]))
    plan = tiny.tiny_plan(run / "data", MODELS[NAME])
    write_plan(run / "plan.json", replace(plan, seed=plan.seed + 1))
    with pytest.raises(CheckpointError, match="belongs to another plan than"):
        to_hf(run, tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=quiet)


def test_a_place_within_a_step_is_refused_and_a_run_with_checkpoints_too(tmp_path):
    folder = exported(tmp_path)
    run = write_run(tmp_path / "again", NAME, None)
    for tokens, message in (
        (100, "is within a step of general; give 128"),
        (512, "is not within the 512"),
    ):
        with pytest.raises(CheckpointError, match=message):
            from_hf(folder, run, tokens_seen=tokens, say=quiet)
    from_hf(folder, run, tokens_seen=0, say=quiet)
    with pytest.raises(CheckpointError, match="is there already; give a run folder without"):
        from_hf(folder, run, tokens_seen=0, say=quiet)


def test_the_command_converts_there_and_back_and_says_mistakes_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", NAME, random_tensors(MODELS[NAME]))
    out, again = tmp_path / "out", write_run(tmp_path / "again", NAME, None)
    assert command.main(["convert", "to-hf", str(run), str(out), "--shard-size", "50KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert command.main(["convert", "to-hf", str(run), str(out)]) == 2
    assert "exists already; give another folder" in capsys.readouterr().err
    assert command.main(["convert", "to-hf", str(run), str(out), "--shard-size", "0"]) == 2
    assert "is no size; give for example 2GB" in capsys.readouterr().err
    assert command.main(["convert", "from-hf", str(out), str(again)]) == 0
    assert capsys.readouterr().out == f"{again}/checkpoints/{files.name_of(0)}\n"
