"""Every recipe in model_configs, found by discovery: sound, sourced, and the size its authors publish."""

import importlib
import itertools
import re
from dataclasses import replace

import pytest

from megamoe.recipe import GQA, MLA, DualNorm, Model, PeriNorm, Recipe
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.origin import comments_of, is_covered, known_paths, leaves

NAMES = tuple(recipe_names())
REASON = re.compile(r"not published: \S.{6,}")  # a word or two at least
TOTALS = {
    "vaetki_7b_a1b": 7_250_296_320,
    "vaetki_20b_a2b": 19_596_810_240,
    "vaetki_100b_a10b": 112_191_900_672,
    "ax_k1_519b_a33b": 518_983_059_456,
    "keural_14b": 14_832_046_080,
    "k_exaone_236b_a23b": 237_099_669_632,
}


def attention_params(model: Model) -> int:
    attention, hidden = model.attention, model.hidden_dim
    if isinstance(attention, GQA):
        query = attention.num_heads * attention.head_dim
        key_value = 2 * attention.num_kv_heads * attention.head_dim
        norms = 2 * attention.head_dim if attention.qk_norm else 0
        return hidden * (query + key_value) + query * hidden + norms
    assert isinstance(attention, MLA)
    heads, latent = attention.num_heads, attention.kv_lora_rank
    query_dim = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank = attention.q_lora_rank
    queries = hidden * query_dim if rank is None else hidden * rank + rank + rank * query_dim
    down = hidden * (latent + attention.qk_rope_head_dim) + latent
    up = latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return queries + down + up + heads * attention.v_head_dim * hidden


def total_params(model: Model) -> int:
    hidden, experts = model.hidden_dim, model.experts
    one_expert = 3 * hidden * experts.ffn_dim
    moe = (experts.num_routed + experts.num_shared) * one_expert + hidden * experts.num_routed
    moe += experts.num_routed if experts.expert_bias else 0
    dense = 3 * hidden * (model.dense_ffn_dim or 0)
    norms = 4 if isinstance(model.norm, PeriNorm) else 3 if isinstance(model.norm, DualNorm) else 2
    layer = attention_params(model) + norms * hidden
    is_moe_only = isinstance(model.norm, DualNorm) and not model.norm.after_dense_mlp
    dense -= hidden if is_moe_only else 0
    total = model.num_layers * layer + model.num_dense_layers * dense
    total += (model.num_layers - model.num_dense_layers) * moe
    total += hidden + model.vocab_size * hidden * (1 if model.tied_embeddings else 2)
    if model.mtp is not None:  # projection of 2 x hidden, three norms, a layer
        ffn = dense if model.mtp.ffn == "dense" else moe
        total += model.mtp.num_layers * (2 * hidden * hidden + 3 * hidden + layer + ffn)
    return total


def released_model(recipe: Recipe) -> Model:
    model = recipe.model
    if "mtp" in recipe.published.unreleased:
        model = replace(model, mtp=None)
    if "expert_bias" in recipe.published.unreleased:
        model = replace(model, experts=replace(model.experts, expert_bias=False))
    return model


def test_the_six_published_recipes_are_there():
    assert set(NAMES) >= set(TOTALS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_read_as_data_equals_the_same_file_imported(name: str):
    module = importlib.import_module(f"model_configs.{name}")
    loaded = load_recipe(name)
    assert isinstance(module.RECIPE, Recipe)
    assert loaded.recipe == module.RECIPE
    assert loaded.recipe.name == name


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_its_authors_publish(name: str):
    recipe = load_recipe(name).recipe
    released = total_params(released_model(recipe))
    assert recipe.published.total_params == released
    assert released == TOTALS.get(name, released)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_an_origin(name: str):
    loaded = load_recipe(name)
    assert set(loaded.origins) == {path for path, _ in leaves(loaded.recipe)}
    kinds = {path: origin.root().kind for path, origin in loaded.origins.items()}
    assert [path for path, kind in kinds.items() if kind == "unstated"] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_assumed_says_so_on_its_line_and_the_reverse(name: str):
    for path, origin in load_recipe(name).origins.items():
        root = origin.root()
        assert (root.kind == "assumed") == root.text.startswith("not published"), (path, root)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_assumed_says_why(name: str):
    for path, origin in load_recipe(name).origins.items():
        root = origin.root()
        if root.kind == "assumed":
            assert REASON.fullmatch(root.text), (path, root.text)


@pytest.mark.parametrize("name", NAMES)
def test_every_mark_in_a_file_says_why(name: str):
    text = recipe_names()[name].read_text(encoding="utf-8")
    marks = [comment for comment in comments_of(text).values() if "not published" in comment]
    assert marks
    assert [mark for mark in marks if not REASON.fullmatch(mark)] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_assumption_covers_a_value_without_a_source(name: str):
    loaded = load_recipe(name)
    assumed = {path for path, origin in loaded.origins.items() if origin.kind == "assumed"}
    for prefix in loaded.recipe.assumed:
        assert any(is_covered(path, (prefix,)) for path in assumed), prefix


@pytest.mark.parametrize("name", NAMES)
def test_every_assumption_names_a_value_once(name: str):
    recipe = load_recipe(name).recipe
    assert set(recipe.assumed) <= known_paths(recipe)
    assert len(set(recipe.assumed)) == len(recipe.assumed)


@pytest.mark.parametrize("name", NAMES)
def test_stages_add_up_to_the_published_tokens(name: str):
    recipe = load_recipe(name).recipe
    assert sum(stage.tokens for stage in recipe.stages) == recipe.published.tokens


def test_vaetki_follows_its_report():
    general, reasoning, long_context = load_recipe("vaetki_7b_a1b").recipe.stages
    assert [stage.name for stage in (general, reasoning, long_context)] == [
        "general",
        "reasoning",
        "long_context",
    ]
    assert [stage.fim_rate for stage in (general, reasoning, long_context)] == [0.0, 0.6, 0.0]
    assert [stage.rope_interpolation for stage in (general, reasoning, long_context)] == [1, 1, 8]
    assert general.lr.peak == reasoning.lr.peak == 2e-4
    assert reasoning.lr.final == long_context.lr.peak == 1e-4
    assert type(general.precision).__name__ == "Fp8Delayed"
    assert type(reasoning.precision).__name__ == type(long_context.precision).__name__ == "Fp8Block"
    assert general.router.aux_loss == general.router.global_aux_loss == 1e-4


def test_a_k1_follows_its_report():
    general, reasoning, context_16k, context_32k = load_recipe("ax_k1_519b_a33b").recipe.stages
    stages = (general, reasoning, context_16k, context_32k)
    assert [stage.tokens for stage in stages] == [7e12, 1.66e12, 0.3e12, 0.3e12]
    assert [stage.seq_len for stage in stages] == [4_096, 4_096, 16_384, 32_768]
    assert [(s.layout.pp, s.layout.ep, s.layout.tp, s.layout.cp) for s in stages] == [
        (16, 8, 1, 1),
        (16, 8, 1, 1),
        (16, 8, 1, 4),
        (16, 8, 1, 8),
    ]
    sizes = [size for _, size in general.batch_ramp]
    assert sizes == [*range(2_048, 16_385, 1_024), 18_432]
    assert general.batch_ramp[14][0] == general.lr.warmup_tokens == 72_000_000 * 4_096
    last_steps = [stage.batch_ramp[-1][1] * stage.seq_len for stage in stages]
    assert last_steps == [18_432 * 4_096] * 4
    for stage in stages:
        assert sum(weight for _, weight in stage.mixture) == pytest.approx(100, abs=0.011)
    assert context_16k.mixture == context_32k.mixture


def test_a_k1_and_keural_save_the_memory_that_their_authors_tell_of():
    a_k1, keural = load_recipe("ax_k1_519b_a33b").recipe, load_recipe("keural_14b").recipe
    parts = {stage.layout.recompute for stage in a_k1.stages}
    assert parts == {("mla_up_projection", "mlp")}
    assert {stage.layout.recompute for stage in keural.stages} == {("layer",)}
    assert (a_k1.optimizer.moments_dtype, keural.optimizer.moments_dtype) == ("bfloat16", "float32")


def test_vaetki_100b_follows_its_report():
    general, reasoning, *long_context = load_recipe("vaetki_100b_a10b").recipe.stages
    stages = (general, reasoning, *long_context)
    assert [stage.tokens for stage in stages[:2]] == [3.6e12, 1.5e12]
    assert sum(stage.tokens for stage in long_context) == 20e9
    assert [stage.seq_len for stage in stages] == [4_096, 4_096, 8_192, 16_384, 32_768]
    ramp = [size * 4_096 for stage in stages[:2] for _, size in stage.batch_ramp]
    assert ramp == pytest.approx([8e6, 16e6, 32e6, 32e6, 46e6], rel=0.02)
    assert all(s.batch_ramp[0][1] * s.seq_len == ramp[-1] for s in long_context)
    assert [stage.rope_interpolation for stage in stages] == [1, 1, 8, 8, 8]
    for before, after in itertools.pairwise(stages[1:]):
        assert after.lr.peak == before.lr.final


def test_vaetki_batches_are_those_of_its_card_within_half_a_percent():
    general, _, long_context = load_recipe("vaetki_7b_a1b").recipe.stages
    tokens = [size * general.seq_len for _, size in general.batch_ramp]
    assert tokens[0] == pytest.approx(8.1e6, rel=5e-3)
    assert tokens[-1] == pytest.approx(32.4e6, rel=5e-3)
    assert long_context.batch_ramp[-1][1] * long_context.seq_len == tokens[-1]


def test_a_stage_keeps_the_origin_of_what_it_inherits():
    origins = load_recipe("vaetki_7b_a1b").origins
    inherited = origins["long_context.router.z_loss"]
    assert (inherited.kind, inherited.source) == ("inherited", "general.router.z_loss")
    assert inherited.root().kind == "assumed"
    assert origins["long_context.precision"].source == "reasoning.precision"
    assert origins["model.num_layers"].words() == "report table 1"
