"""--set: one value, several that need each other, every stage, and whatever a person may type."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamoe.errors import RecipeError
from megamoe.recipe import GQA, Bf16, Layout, Stage
from megamoe.recipe.load import LoadedRecipe, load_recipe, override_recipe, recipe_names
from megamoe.recipe.origin import known_paths

LOADED = {name: load_recipe(name) for name in recipe_names()}
FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def changed(*overrides: str, name: str = "vaetki_7b_a1b") -> LoadedRecipe:
    return override_recipe(LOADED[name], overrides)


def stage(loaded: LoadedRecipe, name: str) -> Stage:
    return next(stage for stage in loaded.recipe.stages if stage.name == name)


def message(*overrides: str, name: str = "vaetki_7b_a1b") -> str:
    with pytest.raises(RecipeError) as caught:
        changed(*overrides, name=name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_override_changes_nothing():
    assert changed() is LOADED["vaetki_7b_a1b"]


def test_one_value_changes_and_says_so():
    loaded = changed("reasoning.lr.peak=3e-4")
    assert stage(loaded, "reasoning").lr.peak == 3e-4
    assert stage(loaded, "general").lr.peak == 2e-4
    origin = loaded.origins["reasoning.lr.peak"]
    assert (origin.kind, origin.text) == ("command line", "--set reasoning.lr.peak=3e-4")
    before = LOADED["vaetki_7b_a1b"].origins
    assert loaded.origins["reasoning.lr.final"] == before["reasoning.lr.final"]


def test_load_recipe_takes_overrides_too():
    assert load_recipe("vaetki_7b_a1b", ("model.init_std=0.01",)).recipe.model.init_std == 0.01


def test_a_star_is_every_stage_and_one_stage_wins_over_it():
    loaded = changed("general.precision=Fp32()", "*.precision=Bf16()")
    assert type(stage(loaded, "general").precision).__name__ == "Fp32"
    assert stage(loaded, "reasoning").precision == stage(loaded, "long_context").precision == Bf16()
    assert loaded.origins["reasoning.precision"].text == "--set *.precision=Bf16()"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_values_that_need_each_other_go_in_any_order(order: tuple[int, ...]):
    # vpp 2 needs pp above 1, and a budget of 10,000 tokens needs a shorter warm-up and ramp
    options = ("stage_1.layout.vpp=2", "stage_1.layout.pp=2", "stage_1.layout.ep=4")
    layout = stage(changed(*(options[i] for i in order), name="keural_14b"), "stage_1").layout
    assert (layout.vpp, layout.pp, layout.ep) == (2, 2, 4)


def test_a_whole_object_and_one_of_its_fields_can_both_be_set():
    whole = "general.layout=Layout(tp=1,pp=2,vpp=1,pipeline='even',cp=1,cp_scheme='auto',ep=1,etp=1,dispatcher='all_to_all',micro_batch=4,recompute=())"
    loaded = changed(whole, "general.layout.pp=3")
    assert stage(loaded, "general").layout == Layout(
        tp=1,
        pp=3,
        vpp=1,
        pipeline="even",
        cp=1,
        cp_scheme="auto",
        ep=1,
        etp=1,
        dispatcher="all_to_all",
        micro_batch=4,
        recompute=(),
    )
    assert loaded.origins["general.layout.pp"].text == "--set general.layout.pp=3"
    assert loaded.origins["general.layout.tp"].text == f"--set {whole}"


def test_a_variant_is_exchanged_whole():
    attention = "GQA(num_heads=12, num_kv_heads=4, head_dim=128, qk_norm=True)"
    loaded = changed(f"model.attention={attention}")
    assert loaded.recipe.model.attention == GQA(
        num_heads=12, num_kv_heads=4, head_dim=128, qk_norm=True
    )
    assert loaded.origins["model.attention.head_dim"].kind == "command line"


def test_a_part_that_the_attention_has_not_is_not_recomputed():
    text = message("stage_1.layout.recompute=('mla_up_projection',)", name="keural_14b")
    problem = "'mla_up_projection' is no part of model.attention GQA; leave it out"
    assert text.endswith(f"stage_1.layout.recompute=('mla_up_projection',): {problem}")


def test_mtp_can_be_switched_off_with_its_loss():
    options = ("model.mtp=None", "*.mtp_loss=None")
    loaded = changed(*options, name="k_exaone_236b_a23b")
    assert loaded.recipe.model.mtp is None
    assert "model.mtp.num_layers" not in loaded.origins


def test_arithmetic_and_tuples_are_read():
    loaded = changed("general.tokens=2_000 * 10**9", "*.batch_ramp=((0, 8 * 16),)")
    assert stage(loaded, "general").tokens == 2_000_000_000_000
    assert stage(loaded, "long_context").batch_ramp == ((0, 128),)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("general.lr.peek=1e-4", "--set general.lr.peek=1e-4: no such field in LearningRate; did you mean 'peak'?"),
        ("generl.lr.peak=1", "generl: no such stage or part; did you mean 'general'?"),
        ("model.num_layer=1", "no such field in Model; did you mean 'num_layers'?"),
        ("general.lr.peak=-1", "--set general.lr.peak=-1: -1 is out of range; give float above 0"),
        ("general.tokens=2e10", "give 20_000_000_000"),
        ("general.lr.decay=cosine", "--set \"general.lr.decay='cosine'\""),
        ("general.lr.decay='cosin'", "did you mean 'cosine'?"),
        ("general.lr.peak.x=1", "general.lr.peak: has no field 'x'; set general.lr.peak as a whole"),
        ("model.mtp.ffn='moe'", "set model.mtp as a whole"),
        ("general.precision=Bf17()", "did you mean 'Bf16'?"),
        ("general.precision=Bf16", "give Bf16(...)"),
        ("general.precision=5", "Bf16 or Fp32 or Fp8Delayed or Fp8Block"),
        ("general.layout=Layout(tp=1)", ": Layout lacks pp, vpp"),
        ("general.layout.pipeline='E|t|t|L'", "'E|t|t|L' has 2 t, and model.num_layers is 24; write 24 t"),
        ("general.layout.recompute=('mlp', 'mlp')", "('mlp', 'mlp') names a part twice; give each once"),
        ("general.layout.recompute=('layer', 'mlp')", "('layer', 'mlp') names a part twice"),
        ("general.layout.recompute=('layers',)", "recompute[0]: 'layers' is not one of"),
        ("optimizer.moments_dtype='float16'", "did you mean 'bfloat16'?"),
        ("general.mtp_loss=0.1", "contradicts model.mtp None"),
        ("*.tokens=5", "--set *.tokens=5: general.lr: "),
        ("general=5", "field by field"),
        ("general.name='x'", "keeps its name"),
        ("*.name='x'", "keeps its name"),
        ("stages=()", "no such stage or part"),
        ("assumed=()", "no such stage or part"),
        ("name='two words'", "plain word"),
        ("general.lr.peak", "not PATH=VALUE"),
        ("=5", "not PATH=VALUE"),
        ("general.lr.peak=", "not PATH=VALUE"),
        ("general..peak=5", "not a dotted path"),
        ("general.batch_ramp[0]=5", "not a dotted path"),
        ("general.lr.peak=1e-4,", "(0.0001,) is not of type float"),
        ("general.lr.peak=(", "not valid Python"),
        ("general.lr.peak=__import__('os')", "calls '__import__'"),
        ("general.lr.peak=open('x')", "calls 'open'"),
        ("general.lr.peak=[x for x in (1,)]", "a comprehension"),
        ("general.lr.peak=9**9**9", "an exponent beyond"),
        ("general.lr.peak=" + "(" * 3_000, "not valid Python"),
        ("general.lr.peak=" + "-" * 50_000 + "1", "nested too deep"),
        ("general.lr.peak=\0", "a null byte"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_told_in_one_line(override: str, words: str):
    told = message(override)
    assert told.startswith("--set ")
    assert words in told


def test_the_override_at_fault_is_named_among_several():
    told = message("reasoning.lr.peak=3e-4", "general.layout.vpp=0", "model.init_std=0.01")
    assert told.startswith("--set general.layout.vpp=0: ")


def test_the_peak_of_a_constant_rate_is_set_alone_and_that_of_a_decay_stays_above_its_end():
    lr = stage(changed("general.lr.peak=1e-4"), "general").lr
    assert (lr.peak, lr.final) == (1e-4, None)
    assert "above peak 5e-05" in message("reasoning.lr.peak=5e-5")
    lr = stage(changed("reasoning.lr.peak=1e-5", "reasoning.lr.final=1e-6"), "reasoning").lr
    assert (lr.peak, lr.final) == (1e-5, 1e-6)


def test_the_same_path_twice_is_refused():
    assert "set twice" in message("general.lr.peak=1e-4", "general.lr.peak=2e-4")


PATHS = sorted({path for loaded in LOADED.values() for path in known_paths(loaded.recipe)})
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(
        ("None", "True", "Bf16()", "Fp32()", "((0, 8),)", "()", "'cosine'", "'LG'", "Stage()")
    ),
    st.text(max_size=30),
    st.text("()[]{}+-*/.,=0123456789eE_'\"abcBf16 :#\\\n", max_size=30),
)
OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(PATHS), VALUES).map("=".join),
        st.tuples(st.sampled_from(("*.tokens", "*.layout.pp", "*.lr", "*.router.z_loss")), VALUES).map("=".join),
        st.text(max_size=40),
    ),
    max_size=3,
)  # fmt: skip


def outcome(name: str, overrides: list[str]) -> LoadedRecipe | str:
    try:
        return override_recipe(LOADED[name], overrides)
    except RecipeError as error:
        return str(error)


@FUZZ
@given(st.sampled_from(sorted(LOADED)), OVERRIDES)
def test_any_override_is_taken_whole_or_refused_in_one_line(name: str, overrides: list[str]):
    result = outcome(name, overrides)
    if isinstance(result, str):
        assert result.startswith("--set")
        assert "\n" not in result
    else:
        assert result.recipe.assumed == LOADED[name].recipe.assumed


def test_a_scale_of_dimensions_that_do_not_rotate_is_refused_where_all_do():
    yarn = "Yarn(factor=4.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, "
    assert changed(f"model.global_rope.yarn={yarn}mscale_all_dim=0.0)", name="keural_14b")
    wrong = message(f"model.global_rope.yarn={yarn}mscale_all_dim=1.0)", name="keural_14b")
    assert "model.global_rope.yarn.mscale_all_dim: 1 with GQA" in wrong
    assert "give 0" in wrong
