"""Exported folders give transformers our logits, and its folders give us theirs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_prep.tokenizer import load_tokenizer
from megamoe.convert.from_hf import from_hf
from megamoe.convert.to_hf import to_hf
from megamoe.convert.tokenizer import copy_tokenizer
from megamoe.mcore import checkpoint
from megamoe.mcore.engine import Engine
from megamoe.mcore.model import unwrap
from megamoe.mcore.router import BalancedRouter
from megamoe.plan.json import write_plan
from megamoe.plan.plan import Plan
from megamoe.recipe import Bf16, Fp32
from tests.mcore.converted import MODELS, all_logits, logits, plan_of, saved, tokens
from tests.mcore.test_convert_tokenizer import data_with
from tests.mcore.test_model import reference_weights
from tests.mcore.world import adam_states, everything, world_of_one
from tests.reference import deepseek
from tests.reference.model import Reference

# Logits are of the size 1 to 5: sums of some 100 float32 products in other orders, over 4 layers.
TOLERANCE = 1e-5
SHARD_BYTES = 20_000  # many files
INTERPOLATED = "vaetki, interpolated"
IN_TRANSFORMERS = [*MODELS, INTERPOLATED]
# No class makes multi-token prediction.
MADE = [n for n in IN_TRANSFORMERS if n == INTERPOLATED or MODELS[n].mtp is None]
# What no class of transformers computes, with a tokenizer of each form.
CODE = {
    "axk1, norm after a dense layer": None,
    "axk1, yarn, norm after a dense layer": None,
    "vaetki": "byte-level-bpe",
    INTERPOLATED: None,
    "keural_moe": "sentencepiece-unigram",
}
PROMPT = "동해물과 백두산이  마르고 닳도록, def add(left, right):"
CHILD = Path(__file__).with_name("in_transformers.py")


def quiet(_: str) -> None:
    pass


def export(path: Path, out: Path, dtype: str | None = None) -> None:
    to_hf(path, out, dtype=dtype, shard_bytes=SHARD_BYTES, say=quiet)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def plan_in(folder: Path, name: str) -> Plan:
    """Return the plan of a run of a name of IN_TRANSFORMERS."""
    if name == INTERPOLATED:
        return plan_of(folder, "vaetki", rope_interpolation=8.0)
    return plan_of(folder, name)


@pytest.fixture(scope="module")
def transformed(tmp_path_factory):
    """Export all models, and have transformers run and make its own; return folder and logits."""
    for package in ("transformers", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    root = tmp_path_factory.mktemp("transformed")
    ours = {}
    for number, name in enumerate(IN_TRANSFORMERS):
        plan = plan_in(root / str(number) / "run", name)
        with world_of_one(plan):
            ours[name] = logits(saved(plan, root / str(number) / "run"))
        out = root / str(number) / "out"
        export(root / str(number) / "run", out)
        if CODE.get(name) is not None:
            copy_tokenizer(data_with(root / name, CODE[name]), out)
            (out / "text.txt").write_text(PROMPT)
    save_file({"tokens": tokens()}, root / "tokens.safetensors")
    # Code beside weights is copied before it is run, by default into the home folder.
    home = f"HF_HOME={root / 'home'}"
    child = subprocess.run(
        ["env", home, sys.executable, CHILD, root],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,  # asks nobody whether to trust the code
    )
    assert child.returncode == 0, child.stderr[-3_000:]
    return root, ours


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_computes_our_logits_from_an_exported_folder(name, transformed):
    root, ours = transformed
    theirs = load_file(root / str(IN_TRANSFORMERS.index(name)) / "logits.safetensors")["exported"]
    assert ours[name].std() > 0.3
    assert (ours[name] - theirs).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_we_compute_the_logits_of_a_model_that_transformers_has_made(name, transformed, tmp_path):
    folder = transformed[0] / str(IN_TRANSFORMERS.index(name))
    plan = plan_in(tmp_path / "run", name)
    from_hf(folder / "theirs", tmp_path / "run", tokens_seen=0, say=quiet)
    with world_of_one(plan):
        ours = logits(Engine(plan, plan.segments[0], tmp_path / "run"))
    theirs = load_file(folder / "logits.safetensors")["made"]
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CODE)
def test_a_folder_with_its_own_code_is_used_as_any_other(name, transformed):
    root, ours = transformed
    found = json.loads((root / str(IN_TRANSFORMERS.index(name)) / "uses.json").read_text())
    loss = cross_entropy(ours[name][:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert abs(found["loss"] - loss) < TOLERANCE
    assert found["without cache"] < TOLERANCE
    assert found["padded"] < TOLERANCE
    assert found["hidden"] == [MODELS["vaetki"].hidden_dim] * 5
    # Losses of 5, some 1e-4 apart, each off by 2e-6 at most; in longer steps other experts are chosen.
    assert found["slope"] == pytest.approx(1, rel=0.04)
    assert all(".experts." in weight for weight in found["without gradient"])
    assert found["finite in bfloat16"]
    assert all(weight.endswith("bias") for weight in found["float32 in bfloat16"])
    assert bool(found["float32 in bfloat16"]) == ("yarn" in name)
    assert found["loss of a sum"] == pytest.approx(found["loss"], abs=TOLERANCE)
    assert found["whole cache"] == "a StaticCache is not supported; give a DynamicCache"
    assert found["attentions"] == "attention weights are not returned by this model"
    assert found["no attentions"] == "none"
    assert found["renamed"].endswith("got an unexpected keyword argument 'kv_cache'")
    assert "trust_remote_code=True" in found["not trusted"]
    if CODE[name] is not None:
        ids = load_tokenizer(root / name / "tokenizer").encode(PROMPT)
        assert found["ids"] == [ids, ids]
        assert found["inputs"] == ["attention_mask", "input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_after_export_and_import_as_if_it_had_never_left(name, tmp_path):
    plan = plan_of(tmp_path / "run", name)
    with world_of_one(plan):
        stayed = Engine(plan, plan.segments[0], tmp_path / "run")
        for _ in range(2):
            stayed.train_step()
        stayed.save(wait=True)
        before, expected = logits(stayed), stayed.train_step()
    export(tmp_path / "run", tmp_path / "out")
    again = plan_of(tmp_path / "again", name)
    from_hf(tmp_path / "out", tmp_path / "again", tokens_seen=256, say=quiet)
    with world_of_one(again):
        engine = Engine(again, again.segments[0], tmp_path / "again")
        assert (engine.step, engine.tokens_seen) == (2, 256)
        assert torch.equal(logits(engine), before)
        result = engine.train_step()
        assert abs(result.loss - expected.loss) < 1e-6
        assert (result.mtp_loss is None) == (plan.model.mtp is None)
        if result.mtp_loss is not None:
            assert abs(result.mtp_loss - expected.mtp_loss) < 1e-6


@pytest.mark.parametrize("name", ["vaetki", "keural_moe", "exaone_moe", "axk1, prediction"])
def test_an_imported_model_is_that_of_the_reference(name, tmp_path):
    """Written from the papers, in float64: VAETKI and Keural have no class in transformers."""
    plan = plan_of(tmp_path / "run", name)
    with world_of_one(plan):
        before = reference_weights(saved(plan, tmp_path / "run").chunks[0])
    export(tmp_path / "run", tmp_path / "out")
    again = plan_of(tmp_path / "again", name)
    from_hf(tmp_path / "out", tmp_path / "again", tokens_seen=0, say=quiet)
    with world_of_one(again):
        ours = all_logits(Engine(again, again.segments[0], tmp_path / "again"))
    outputs = Reference(plan.model, before).run(tokens())
    check_all(ours, outputs)


@pytest.mark.parametrize("name", ["axk1, prediction", "deepseek_v3, two predictions, tied"])
def test_files_with_the_names_of_deepseek_give_the_reference_our_predictions(name, tmp_path):
    plan = plan_of(tmp_path / "run", name)
    with world_of_one(plan):
        ours = all_logits(saved(plan, tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "out")
    files = tensors_in(tmp_path / "out")
    outputs = Reference(plan.model, deepseek.reference_weights(files, plan.model)).run(tokens())
    check_all(ours, outputs)
    first = f"model.layers.{plan.model.num_layers}"
    table = files["model.embed_tokens.weight"]
    assert torch.equal(files[f"{first}.embed_tokens.weight"], table)
    assert torch.equal(
        files[f"{first}.shared_head.head.weight"], files.get("lm_head.weight", table)
    )
    # The hidden state's columns before the embedding's, as eq. 21 of the report has them.
    files[f"{first}.eh_proj.weight"] = files[f"{first}.eh_proj.weight"].roll(table.shape[1], dims=1)
    swapped = Reference(plan.model, deepseek.reference_weights(files, plan.model)).run(tokens())
    assert (ours[1] - swapped.mtp_logits[0]).abs().max() > 1_000 * TOLERANCE


@pytest.mark.parametrize("precision", [Fp32(), Bf16()], ids=["float32", "bfloat16"])
def test_an_imported_run_is_trained_and_saved_as_a_new_one_with_these_weights(precision, tmp_path):
    plan = plan_of(tmp_path / "new", "exaone_moe", precision=precision)
    with world_of_one(plan):
        new = saved(plan, tmp_path / "new")
        even_shares(new)
        before = everything(new)
        for _ in range(2):
            new.train_step()
        expected = everything(new)
    export(tmp_path / "new", tmp_path / "out")
    again = plan_of(tmp_path / "again", "exaone_moe", precision=precision)
    from_hf(tmp_path / "out", tmp_path / "again", tokens_seen=0, say=quiet)
    with world_of_one(again):
        imported = Engine(again, again.segments[0], tmp_path / "again")
        begun = everything(imported)
        for _ in range(2):
            imported.train_step()
        found = everything(imported)
        imported.save(wait=True)
        continued = everything(Engine(again, again.segments[0], tmp_path / "again"))
    assert differing(begun, before) == set()
    assert differing(found, expected) == set()
    assert differing(continued, found) == set()


def test_the_exact_copies_of_rounded_weights_are_exported_as_float32(tmp_path):
    plan = plan_of(tmp_path / "run", "exaone_moe", precision=Bf16())
    with world_of_one(plan):
        engine = saved(plan, tmp_path / "run")
        engine.train_step()
        engine.save(wait=True)
        states = adam_states(engine)
    export(tmp_path / "run", tmp_path / "out", "float32")
    found = tensors_in(tmp_path / "out")
    for theirs, ours in (
        ("lm_head.weight", "output_layer.weight"),
        ("mtp.norm.weight", "mtp.layers.0.final_layernorm.weight"),
        ("model.layers.1.mlp.gate.weight", "decoder.layers.1.mlp.router.weight"),
        ("model.layers.1.mlp.experts.0.down_proj.weight", "decoder.layers.1.mlp.experts.weight2"),
    ):
        # flat, the first expert's first
        exact = states[f"0.{ours}"]["weight"].flatten()[: found[theirs].numel()]
        assert not torch.equal(exact, exact.bfloat16().float()), ours
        assert torch.equal(found[theirs].flatten(), exact), ours


@pytest.mark.parametrize("name", ["exaone_moe", "keural_moe"])
def test_rounded_weights_keep_the_float32_values_of_a_folder(name, tmp_path):
    plan = plan_of(tmp_path / "run", name)
    with world_of_one(plan):
        saved(plan, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "given")
    rounded = plan_of(tmp_path / "again", name, precision=Bf16())
    imported = from_hf(tmp_path / "given", tmp_path / "again", tokens_seen=0, say=quiet)
    write_plan(tmp_path / "plan.json", rounded)
    with world_of_one(rounded):
        engine = Engine(rounded, rounded.segments[0], tmp_path)
        checkpoint.load(imported, engine.chunks, engine.optimizer, same_layout=True)
        engine.save(wait=True)
    export(tmp_path, tmp_path / "out", "float32")
    given, found = (tensors_in(tmp_path / folder) for folder in ("given", "out"))
    assert differing(given, found) == set()
    assert not any(torch.equal(x, x.bfloat16().float()) for x in given.values())


def check_all(ours, outputs):
    """Compare with float64: a prediction is a fifth layer, after a sum over twice the width."""
    assert (ours[0] - outputs.logits).abs().max() < TOLERANCE
    for found, wanted in zip(ours[1:], outputs.mtp_logits, strict=True):
        assert (found - wanted).abs().max() < 2 * TOLERANCE


def differing(left, right):
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(left[name], right[name])}


def even_shares(engine: Engine) -> None:
    """Have the routers balance as new ones do: what they balance by is no weight."""
    for module in unwrap(engine.chunks[0]).modules():
        if isinstance(module, BalancedRouter):
            module.previous_shares_E.fill_(1 / module.config.num_moe_experts)
