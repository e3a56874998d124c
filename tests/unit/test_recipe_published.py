"""Every recipe in model_configs, found by discovery: sound, sourced, and the size its authors publish."""

import importlib

import pytest

from megamoe.recipe import GQA, MLA, DualNorm, Model, PeriNorm, Recipe
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.origin import known_paths, leaves

NAMES = tuple(recipe_names())
TOTALS = {
    "vaetki_7b_a1b": 7_250_296_320,
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
    total = model.num_layers * layer + model.num_dense_layers * dense
    total += (model.num_layers - model.num_dense_layers) * moe
    total += hidden + model.vocab_size * hidden * (1 if model.tied_embeddings else 2)
    if model.mtp is not None:  # projection of 2 x hidden, three norms, a layer
        ffn = dense if model.mtp.ffn == "dense" else moe
        total += model.mtp.num_layers * (2 * hidden * hidden + 3 * hidden + layer + ffn)
    return total


def test_the_three_published_recipes_are_there():
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
    assert recipe.published.total_params == total_params(recipe.model)
    assert total_params(recipe.model) == TOTALS.get(name, total_params(recipe.model))


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
