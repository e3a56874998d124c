"""Layouts as words, and the model they are compared on; nothing is trained."""

import re
from dataclasses import replace

import pytest

from megamoe.errors import MegamoeError, PlanError
from megamoe.parity.layouts import DEFAULT, one_process, parse_layouts
from megamoe.parity.small import BATCHES, MICRO_BATCH, plan_of, small_recipe
from megamoe.plan.layout import layout_text
from megamoe.recipe.check import FieldError
from megamoe.recipe.load import recipe_names

FIVE = "tp2xpp2xcp2xep2xdp2"


@pytest.mark.parametrize(
    ("name", "world_size", "text"),
    [
        ("tp2", 2, "dp1 tp2"),
        ("ep4", 4, "dp4 ep4"),
        ("pp2xvpp2", 2, "dp1 pp2 vpp2"),
        ("cp2xep2", 2, "dp1 cp2 ep2"),
        ("ep2xpp2", 4, "dp2 pp2 ep2"),
        ("tp2xcp2xep8", 8, "dp2 tp2 cp2 ep8"),
        ("tp2xetp2", 2, "dp1 tp2 etp2"),
        (FIVE, 16, "dp2 tp2 pp2 cp2 ep2"),
    ],
)
def test_a_layout_takes_the_fewest_processes_that_fill_both_grids(name, world_size, text):
    (grid,) = parse_layouts(name, MICRO_BATCH)
    plan = plan_of(small_recipe("vaetki_7b_a1b"), grid, seed=0)
    assert grid.world_size == world_size
    assert layout_text(plan.segments[0]) == text


def test_a_scheme_of_context_parallelism_can_be_named():
    ring, automatic = parse_layouts("cp2xring,cp2", MICRO_BATCH)
    assert (ring.layout.cp, ring.layout.cp_scheme) == (2, "ring")
    assert automatic.layout.cp_scheme == "auto"


def test_a_dispatcher_can_be_named():
    gathered, plain = parse_layouts("tp2xep2xall_gather,ep2", MICRO_BATCH)
    assert (gathered.layout.ep, gathered.layout.dispatcher) == (2, "all_gather")
    assert plain.layout.dispatcher == "all_to_all"


def test_what_the_chunks_of_a_pipeline_hold_can_be_written():
    (grid,) = parse_layouts("pp2xvpp2xE|tt|tt|mLxep2", MICRO_BATCH)
    assert (grid.layout.pipeline, grid.layout.ep, grid.world_size) == ("E|tt|tt|mL", 2, 4)
    plan = plan_of(small_recipe("k_exaone_236b_a23b"), grid, seed=0)
    assert layout_text(plan.segments[0]) == "dp2 pp2 vpp2 ep2 E|tt|tt|mL"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2,qp2", "--layouts: 'qp2' in 'qp2' is no axis with a size, such as tp2; did you mean"),
        ("tp", "--layouts: 'tp' in 'tp' is no axis with a size, such as tp2; did you mean 'tp'?"),
        ("", "--layouts: '' in '' is no axis with a size, such as tp2; known: "),
        ("ep2xdeepep", "--layouts: 'deepep' in 'ep2xdeepep' is no axis with a size, such as tp2"),
        ("tp0", "--layouts: 'tp0' in 'tp0' is no axis with a size, such as tp2"),
        ("tp2xtp4", "--layouts: 'tp2xtp4' has tp twice; give it once"),
        ("cp2xringxheads", "'cp2xringxheads' has cp_scheme twice, ring and heads; give it once"),
        ("pp2xEt|tttLxEttt|tL", "has pipeline twice, Et|tttL and Ettt|tL; give it once"),
        ("ep2xall_gatherxall_to_all", "has dispatcher twice, all_gather and all_to_all; give it"),
        (
            "tp2xring",
            "--layouts: 'ring' in 'tp2xring' has no effect without cp; add cp2, or leave ring out",
        ),
        (
            "tp2xall_gather",
            "'all_gather' in 'tp2xall_gather' has no effect without ep; add ep2, or",
        ),
        ("cp2,tp2,cp2", "--layouts: 'cp2' is there twice; give it once"),
        ("vpp2", "vpp: 2 needs pp above 1; give vpp=1 or a larger pp"),
        ("pp3xEtt|ttL", "pipeline: 'Ett|ttL' has 2 chunks, and pp x vpp is 3; put 2 | into it"),
    ],
)
def test_a_wrong_word_is_refused(text, message):
    with pytest.raises(MegamoeError, match=re.escape(message)):
        parse_layouts(text, MICRO_BATCH)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tp8", "layout tp8: vaetki_7b_a1b/general: model.attention.num_heads 4 is not a multiple"),
        (
            "ep3",
            "layout ep3: vaetki_7b_a1b/general: model.experts.num_routed 16 is not a multiple of ep 3; "
            "nearest possible layout on world size 2: dp2 ep2",
        ),
        ("dp16", "layout dp16: vaetki_7b_a1b/general: batch_ramp entry (0, 8): 8 sequences are"),
        (
            "pp2xEtt|ttmL",
            "layout pp2xEtt|ttmL: general.layout.pipeline: 'Ett|ttmL' has 1 m, and model.mtp is None",
        ),
        ("dp3xep2", "layout dp3xep2: vaetki_7b_a1b/general: world size 3 is not a multiple of etp"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_planners_words(name, message):
    (grid,) = parse_layouts(name, MICRO_BATCH)
    with pytest.raises(PlanError, match=re.escape(message)):
        plan_of(small_recipe("vaetki_7b_a1b"), grid, seed=0)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_every_default_layout(name):
    recipe = small_recipe(name)
    grids = [one_process(MICRO_BATCH), *parse_layouts(f"{DEFAULT},{FIVE}", MICRO_BATCH)]
    assert len(grids) >= 14
    for grid in grids:
        (segment,) = plan_of(recipe, grid, seed=0).segments
        assert [size for _, size in segment.batch_ramp] == list(BATCHES)
        assert segment.num_steps == 2


@pytest.mark.parametrize("document_mask", [False, True])
def test_documents_are_kept_apart_where_that_is_asked_for(document_mask):
    recipe = small_recipe("keural_14b", document_mask=document_mask)
    (segment,) = plan_of(recipe, one_process(MICRO_BATCH), seed=0).segments
    assert segment.document_mask is document_mask


@pytest.mark.parametrize("name", recipe_names())
def test_the_small_model_keeps_the_structure_of_its_recipe(name):
    from megamoe.recipe.load import load_recipe

    whole, small = load_recipe(name).recipe.model, small_recipe(name).model
    assert set(small.window_pattern) == set(whole.window_pattern)
    assert (small.num_dense_layers > 0) == (whole.num_dense_layers > 0)
    assert (small.mtp is None) == (whole.mtp is None)
    for model in (small, whole):
        assert type(model.norm) is type(whole.norm)
        assert type(model.attention) is type(whole.attention)
    assert small.experts.score == whole.experts.score
    assert small.experts.expert_bias == whole.experts.expert_bias
    moe = {small.is_local(layer) for layer in range(small.num_dense_layers, small.num_layers)}
    assert moe == {letter == "L" for letter in whole.window_pattern}


@pytest.mark.parametrize("name", recipe_names())
def test_positions_are_interpolated_unless_the_recipe_refuses_that(name):
    recipe = small_recipe(name)
    (stage,) = recipe.stages
    if stage.rope_interpolation == 1:
        with pytest.raises(FieldError, match="rope_interpolation"):
            replace(recipe, stages=(replace(stage, rope_interpolation=2.0),))
