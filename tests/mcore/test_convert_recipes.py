"""Each recipe has the architecture of its released weights, with their names, at full size too."""

import math
import re
import shlex
from collections import Counter
from dataclasses import replace

import pytest

from megamoe.convert import memory
from megamoe.convert.architectures import (
    ARCHITECTURES,
    Stage,
    architecture_for,
    without_prediction,
)
from megamoe.convert.config import config_of, differences
from megamoe.convert.entries import entries
from megamoe.convert.from_hf import WITHOUT_BIAS, WITHOUT_PREDICTION
from megamoe.convert.memory import export_bytes, import_bytes, need
from megamoe.recipe import Model, PreNorm
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.scale import scale_tiny

RELEASED = {
    "keural_14b": "keural_moe",
    "vaetki_7b_a1b": "vaetki",
    "vaetki_20b_a2b": "vaetki",
    "vaetki_100b_a10b": "vaetki",
    "k_exaone_236b_a23b": "exaone_moe",
    "ax_k1_519b_a33b": "axk1",
}
# As their index files have them: layers and experts as {}, norms and matrices without `.weight`.
K_EXAONE = {
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    *(
        f"model.layers.{{}}.{name}"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            "mlp.gate",
            "mlp.e_score_correction_bias",
            *(f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")),
            *(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")),
        )
    ),
    *(f"mtp.{part}" for part in ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")),
    *(
        f"mtp.layers.{{}}.{name}"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    ),
}
# What the authors' own converter and vLLM plugin name; `post_attention_layernorm` norms the
# attention's output. By our names, since a set would not show two of one shape that are exchanged.
VAETKI = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
    **{
        f"decoder.layers.{{}}.{ours}": tuple(f"model.layers.{{}}.{name}" for name in theirs)
        for ours, theirs in {
            "input_layernorm": ("input_layernorm",),
            "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
            "self_attention.q_layernorm": ("self_attn.q_a_layernorm",),
            "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
            "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
            "self_attention.kv_layernorm": ("self_attn.kv_a_layernorm",),
            "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
            "self_attention.linear_proj": ("self_attn.o_proj",),
            "self_attn_bda.norm": ("post_attention_layernorm",),
            "pre_mlp_layernorm": ("pre_mlp_layernorm",),
            "mlp_bda.norm": ("post_mlp_layernorm",),
            "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.linear_fc2": ("mlp.down_proj",),
            "mlp.router": ("mlp.gate",),
            "mlp.experts.experts.linear_fc1": (
                "mlp.experts.{}.gate_proj",
                "mlp.experts.{}.up_proj",
            ),
            "mlp.experts.experts.linear_fc2": ("mlp.experts.{}.down_proj",),
            "mlp.shared_experts.linear_fc1": (
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
            ),
            "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj",),
        }.items()
    },
}
# Of the authors' training code; those of their Hub folder are not known.
KEURAL = {
    "embedding.word_embeddings": ("embed_tokens",),
    "decoder.final_layernorm": ("norm",),
    **{
        f"decoder.layers.{{}}.{ours}": tuple(f"layers.{{}}.{name}" for name in theirs)
        for ours, theirs in {
            "input_layernorm": ("attn_norm",),
            "self_attention.linear_qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "self_attention.linear_proj": ("attn.o_proj",),
            "pre_mlp_layernorm": ("moe_norm",),
            "mlp.router": ("moe.gate",),
            "mlp.experts.experts.linear_fc1": (
                "moe.experts.{}.gate_proj",
                "moe.experts.{}.up_proj",
            ),
            "mlp.experts.experts.linear_fc2": ("moe.experts.{}.down_proj",),
        }.items()
    },
}


def tensors(model_type: str, model: Model) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of a model's folder."""
    found = [
        part for entry in entries(ARCHITECTURES[model_type].table, model) for part in entry.theirs
    ]
    assert len(found) == len(dict(found)), "a name is there twice"
    return dict(found)


def plain(name: str) -> str:
    """Return a name without its numbers and `.weight`."""
    return re.sub(r"\.\d+\.", ".{}.", name).removesuffix(".weight")


@pytest.mark.parametrize("scale", ["full", "tiny"])
@pytest.mark.parametrize("name", recipe_names())
def test_each_stage_of_a_recipe_has_the_architecture_of_the_released_weights(name, scale):
    loaded = load_recipe(name)
    recipe = (scale_tiny(loaded) if scale == "tiny" else loaded).recipe
    for trained in recipe.stages:
        stage = Stage(
            model=recipe.model,
            interpolation=trained.rope_interpolation,
            seq_len=trained.seq_len,
        )
        architecture = architecture_for(stage, name)
        assert architecture.model_type == RELEASED[name]
        assert list(differences(architecture, stage, config_of(architecture, stage))) == []
    assert tensors(RELEASED[name], without_prediction(architecture, recipe.model))


def test_k_exaone_has_the_names_and_the_size_of_its_index():
    model = load_recipe("k_exaone_236b_a23b").recipe.model
    found = tensors("exaone_moe", model)
    assert {plain(name) for name in found} == K_EXAONE
    assert sum(map(math.prod, found.values())) == 237_099_669_632
    assert found["mtp.fc.weight"] == (6144, 12_288)
    assert found["model.layers.1.mlp.e_score_correction_bias"] == (128,)
    assert "model.layers.0.mlp.gate.weight" not in found


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("keural_14b", KEURAL),
        ("vaetki_7b_a1b", VAETKI),
        ("vaetki_20b_a2b", VAETKI),
        ("vaetki_100b_a10b", VAETKI),
    ],
)
def test_vaetki_and_keural_have_the_names_of_their_authors(name, names):
    model = load_recipe(name).recipe.model
    found = {
        (plain(entry.ours), tuple(plain(theirs) for theirs, _ in entry.theirs))
        for entry in entries(ARCHITECTURES[RELEASED[name]].table, model)
    }
    assert found == set(names.items())


def test_a_x_k1_has_the_976_keys_and_the_size_of_its_index():
    """It has experts in one tensor, no bias and no prediction; ours come one by one."""
    whole = load_recipe("ax_k1_519b_a33b").recipe.model
    model = replace(whole, mtp=None, experts=replace(whole.experts, expert_bias=False))
    found = tensors("axk1", model)
    assert sum(map(math.prod, found.values())) == 518_983_059_456
    fused = Counter(
        re.sub(r"\.\d+\.(gate|up)_proj\.weight$", ".gate_up_proj", name)
        if ".experts." in name and not name.endswith("down_proj.weight")
        else re.sub(r"(\.experts)\.\d+\.down_proj\.weight$", r"\1.down_proj", name)
        for name in found
    )
    assert len(fused) == 976
    assert fused["model.layers.1.mlp.experts.gate_up_proj"] == 2 * 192
    assert fused["model.layers.60.mlp.experts.down_proj"] == 192
    assert len(found) == 976 - 60 * 2 + 60 * 192 * 3
    norms = [name for name in found if name.endswith(".post_mlp_layernorm.weight")]
    assert len(norms) == 61
    # Its prediction is one more layer, a projection, three norms and two tables.
    tables, layer = 2 * 163_840 * 7_168, "model.layers.60."
    last = sum(math.prod(shape) for name, shape in found.items() if name.startswith(layer))
    added = tensors("axk1", replace(model, mtp=whole.mtp))
    assert sum(map(math.prod, added.values())) == (
        518_983_059_456 + last + 2 * 7_168**2 + 3 * 7_168 + tables
    )


@pytest.mark.parametrize(
    ("name", "told", "total"),
    [
        ("ax_k1_519b_a33b", f"{WITHOUT_PREDICTION} {WITHOUT_BIAS}", 518_983_059_456),
        ("k_exaone_236b_a23b", WITHOUT_PREDICTION, 237_099_669_632 - 528_513_280),
        ("k_exaone_236b_a23b", WITHOUT_BIAS, 237_099_669_632 - 47 * 128),
    ],
)
def test_what_an_import_tells_to_set_gives_a_model_without_the_part(name, told, total):
    recipe = load_recipe(name, [word for word in shlex.split(told) if word != "--set"]).recipe
    found = tensors(RELEASED[name], recipe.model)
    assert sum(map(math.prod, found.values())) == total
    has_prediction, has_bias = (
        any(re.search(pattern, name) for name in found)
        for pattern in (r"^mtp\.|\.enorm\.", r"\.e_score_correction_bias$")
    )
    assert has_prediction == (WITHOUT_PREDICTION not in told)
    assert has_bias == (WITHOUT_BIAS not in told)


@pytest.mark.parametrize(
    ("name", "count", "largest", "told"),
    [
        ("k_exaone_236b_a23b", 18_688, 943_718_400, {2: (6.6, 4.5), 4: (12.0, 8.2)}),
        ("ax_k1_519b_a33b", 36_073, 1_174_405_120, {2: (7.9, 5.5), 4: (14.9, 10.2)}),
    ],
)
def test_a_conversion_says_that_it_needs_memory_for_a_table_and_not_for_the_layers(
    name, count, largest, told, monkeypatch
):
    """test_convert_memory.py measures that no more is taken; these are the figures of docs/convert.md."""
    monkeypatch.setattr(memory, "_BASE_BYTES", 500_000_000)  # of a torch without CUDA
    model = load_recipe(name).recipe.model
    found = list(entries(ARCHITECTURES[RELEASED[name]].table, model))
    theirs = [math.prod(shape) for entry in found for _, shape in entry.theirs]
    ours = max(math.prod(entry.shape) for entry in found)
    assert (len(theirs), max(theirs), ours) == (count, largest, largest)
    for itemsize, (out, back) in told.items():
        sizes = [itemsize * size for size in theirs]
        most = export_bytes(sizes, itemsize * ours, 2_000_000_000)
        assert need(most) == f"needs at most {out} GB of memory"
        assert most < 16e9
        assert need(import_bytes(count, itemsize * ours)) == f"needs at most {back} GB of memory"


def test_deepseek_v3_has_the_size_of_its_files_with_prediction_and_its_copies():
    """The Hub counts 3,918,786,560 values in bfloat16 and 680,571,043,840 in FP8; biases apart."""
    near = load_recipe("ax_k1_519b_a33b").recipe.model  # 61 layers of 7,168 too
    model = replace(
        near,
        num_dense_layers=3,
        dense_ffn_dim=18_432,
        vocab_size=129_280,
        attention=replace(near.attention, num_heads=128),
        norm=PreNorm(eps=1e-6, zero_centered=False),
        experts=replace(near.experts, num_routed=256),
    )
    found = tensors("deepseek_v3", model)
    biases = {name for name in found if name.endswith(".e_score_correction_bias")}
    assert len(biases) == 59
    sizes = {name: math.prod(shape) for name, shape in found.items() if name not in biases}
    assert sum(sizes.values()) == 3_918_786_560 + 680_571_043_840
    # Not quantised: tables and their copies, norms, routers and eh_proj.
    plain = ("norm.weight", "embed_tokens.weight", "head.weight", "gate.weight", "eh_proj.weight")
    assert sum(size for name, size in sizes.items() if name.endswith(plain)) == 3_918_786_560
