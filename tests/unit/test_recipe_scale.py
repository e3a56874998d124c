"""`--scale tiny` keeps the structure of every published recipe and the checks hold."""

from dataclasses import replace

import pytest

from megamoe.recipe import GQA, Fp32, Rope, Yarn
from megamoe.recipe.load import LoadedRecipe, load_recipe, recipe_names
from megamoe.recipe.origin import leaves
from megamoe.recipe.scale import (
    BATCH,
    MAX_PEAK,
    MIN_BATCH,
    MIN_SHARE,
    MIN_WARMUP,
    MIN_WINDOW,
    SAMPLE_SOURCES,
    TOKENS,
    scale_tiny,
)

NAMES = tuple(recipe_names())
KEPT_OF_MODEL = ("num_dense_layers", "window_pattern", "norm", "mtp", "tied_embeddings")
KEPT_OF_EXPERTS = ("num_shared", "score", "scaling_factor", "expert_bias")
KEPT_OF_STAGE = (
    "name",
    "fim_rate",
    "document_mask",
    "router",
    "mtp_loss",
    "rope_interpolation",
)


def both(name: str) -> tuple[LoadedRecipe, LoadedRecipe]:
    loaded = load_recipe(name)
    return loaded, scale_tiny(loaded)


def unstretched(rope: Rope | None) -> Rope | None:
    """Return positions without the length that scales with the sequences."""
    if rope is None or rope.yarn is None:
        return rope
    return replace(rope, yarn=replace(rope.yarn, original_seq_len=1))


@pytest.mark.parametrize("name", NAMES)
def test_structure_is_kept(name: str):
    loaded, tiny = both(name)
    before, after = loaded.recipe, tiny.recipe
    for field in KEPT_OF_MODEL:
        assert getattr(before.model, field) == getattr(after.model, field)
    for field in KEPT_OF_EXPERTS:
        assert getattr(before.model.experts, field) == getattr(after.model.experts, field)
    assert type(before.model.attention) is type(after.model.attention)
    for kind in ("local_rope", "global_rope"):
        assert unstretched(getattr(before.model, kind)) == unstretched(getattr(after.model, kind))
    assert (before.model.experts.num_groups > 1) == (after.model.experts.num_groups > 1)
    assert replace(before.optimizer, moments_dtype="float32") == after.optimizer
    assert before.tokenizer.algorithm == after.tokenizer.algorithm
    for old, new in zip(before.stages, after.stages, strict=True):
        for field in KEPT_OF_STAGE:
            assert getattr(old, field) == getattr(new, field)
        assert old.lr.decay == new.lr.decay
        assert len(old.batch_ramp) == len(new.batch_ramp)
        assert (old.lr.decay_tokens > 0) == (new.lr.decay_tokens > 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_is_present(name: str):
    model = scale_tiny(load_recipe(name)).recipe.model
    assert model.num_layers % 2 == 0
    moe = {model.is_local(layer) for layer in range(model.num_dense_layers, model.num_layers)}
    assert moe == {letter == "L" for letter in model.window_pattern}


@pytest.mark.parametrize("name", NAMES)
def test_the_curriculum_is_short_and_whole(name: str):
    loaded, tiny = both(name)
    stages = tiny.recipe.stages
    assert sum(stage.tokens for stage in stages) == pytest.approx(TOKENS, abs=len(stages))
    for old, new in zip(loaded.recipe.stages, stages, strict=True):
        floor = min(MIN_SHARE, 1 / len(stages)) * TOKENS
        assert new.tokens >= floor - 1
        assert isinstance(new.precision, Fp32)
        assert new.lr.peak <= MAX_PEAK
        assert (new.lr.final is None) == (old.lr.final is None)
        if old.lr.final is not None:
            ratio = old.lr.final / old.lr.peak
            assert new.lr.final / new.lr.peak == pytest.approx(ratio, rel=0.01)
        assert (new.lr.warmup_tokens >= MIN_WARMUP * new.tokens - 1) == (old.lr.warmup_tokens > 0)
        sizes = [size for _, size in new.batch_ramp]
        assert all(size % MIN_BATCH == 0 for size in sizes)
        assert all(size % (2 * new.layout.micro_batch) == 0 for size in sizes)
    assert max(size for _, size in stages[0].batch_ramp) == BATCH


@pytest.mark.parametrize("name", NAMES)
def test_changed_values_name_their_rule_and_others_keep_their_origin(name: str):
    loaded, tiny = both(name)
    before, after = dict(leaves(loaded.recipe)), dict(leaves(tiny.recipe))
    assert set(tiny.origins) == set(after)
    for path, value in after.items():
        if path not in before or before[path] != value:
            assert tiny.origins[path].kind == "scale rule"
            assert tiny.origins[path].text
        elif ".layout." not in path:
            assert tiny.origins[path] == loaded.origins[path]
    assert tiny.scale == "tiny"
    assert loaded.scale is None


@pytest.mark.parametrize("name", NAMES)
def test_scaling_is_deterministic(name: str):
    assert both(name)[1] == both(name)[1]


def test_vaetki_tiny_by_the_numbers():
    recipe = scale_tiny(load_recipe("vaetki_7b_a1b")).recipe
    model, (general, reasoning, long_context) = recipe.model, recipe.stages
    assert (model.num_layers, model.hidden_dim, model.dense_ffn_dim) == (6, 128, 480)
    assert (model.window, model.vocab_size, model.experts.ffn_dim) == (16, 4_096, 64)
    assert [size for _, size in general.batch_ramp] == [8, 8, 16]
    assert (general.seq_len, reasoning.seq_len, long_context.seq_len) == (128, 128, 512)
    assert long_context.batch_ramp == ((0, 8),)
    assert reasoning.lr.decay_tokens == reasoning.tokens
    assert general.lr.peak == pytest.approx(2e-4 * 1_536 / 128)
    assert "long_context.lr.peak" not in recipe.assumed
    assert "optimizer" in recipe.assumed


def test_a_tiny_recipe_keeps_moments_in_float32_and_recomputes_nothing():
    tiny = scale_tiny(load_recipe("ax_k1_519b_a33b"))
    assert tiny.recipe.optimizer.moments_dtype == "float32"
    assert {stage.layout.recompute for stage in tiny.recipe.stages} == {()}
    assert tiny.origins["optimizer.moments_dtype"].kind == "scale rule"
    assert tiny.origins["general.layout.recompute"].text.startswith("nothing: ")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"), [(64, 8, 1), (32, 32, 4), (8, 4, 2), (6, 2, 1)]
)
def test_key_value_heads_keep_their_ratio(heads: int, kv_heads: int, expected: int):
    loaded = load_recipe("keural_14b")
    attention = GQA(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, qk_norm=False)
    model = replace(loaded.recipe.model, attention=attention)
    loaded = replace(loaded, recipe=replace(loaded.recipe, model=model))
    scaled = scale_tiny(loaded).recipe.model.attention
    assert isinstance(scaled, GQA)
    assert (scaled.num_heads, scaled.num_kv_heads) == (4, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_mixture_is_of_the_sample_corpus_and_keeps_its_code(name: str):
    loaded, tiny = both(name)
    for old, new in zip(loaded.recipe.stages, tiny.recipe.stages, strict=True):
        before, after = shares(old.mixture), shares(new.mixture)
        if set(before) <= set(SAMPLE_SOURCES):
            assert new.mixture == old.mixture
        assert set(after) <= set(SAMPLE_SOURCES)
        assert after.get("code", 0) == pytest.approx(before.get("code", 0), abs=5e-4)


def shares(mixture: tuple[tuple[str, float], ...]) -> dict[str, float]:
    total = sum(weight for _, weight in mixture)
    return {source: weight / total for source, weight in mixture}


def test_a_k1_tiny_by_the_numbers():
    recipe = scale_tiny(load_recipe("ax_k1_519b_a33b")).recipe
    model, stages = recipe.model, recipe.stages
    assert (model.num_layers, model.num_dense_layers, model.window_pattern) == (4, 1, "G")
    assert (model.experts.num_routed, model.experts.num_groups, model.experts.group_top_k) == (
        8,
        2,
        1,
    )
    assert model.global_rope is not None
    assert model.global_rope.yarn is not None
    assert model.global_rope.yarn.original_seq_len == 1_024
    assert [stage.mtp_loss for stage in stages] == [0.3, 0.1, 0.1, 0.1]
    assert [stage.router.bias_update_rate > 0 for stage in stages] == [True, True, False, False]
    assert dict(stages[0].mixture) == {"korean": 0.414, "english": 0.414, "code": 0.171}


def test_groups_yarn_and_a_pattern_that_starts_global_scale_too():
    overrides = (
        "model.experts.num_groups=8",
        "model.experts.group_top_k=4",
        "model.global_rope.yarn=Yarn(factor=4.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0,"
        " mscale=1.0, mscale_all_dim=0.0)",
        "long_context.rope_interpolation=1.0",
        "model.num_dense_layers=3",
        "model.window_pattern='GLL'",
    )
    model = scale_tiny(load_recipe("vaetki_7b_a1b", overrides)).recipe.model
    assert (model.experts.num_groups, model.experts.group_top_k) == (2, 1)
    assert model.global_rope is not None
    assert model.global_rope.yarn == Yarn(
        factor=4.0,
        original_seq_len=128,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=0.0,
    )
    assert model.num_layers == 6
    assert model.window is not None
    assert model.window >= MIN_WINDOW
