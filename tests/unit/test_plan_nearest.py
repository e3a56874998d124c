"""Whatever a refusal says would do instead passes every check."""

import ast
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import PlanError
from megamoe.plan.cli import local_cluster
from megamoe.plan.layout import settle_dp
from megamoe.recipe import Fp32, Layout
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.pipeline import EVEN

NAMES = tuple(recipe_names())
RECIPES = {name: load_recipe(name).recipe for name in NAMES}
AXES = ("tp", "pp", "vpp", "cp", "ep", "etp")
LAYOUT = re.compile(r"; nearest possible layout(?: on world size ([\d,]+))?: (.*)$")
EXPERTS = replace(RECIPES["ax_k1_519b_a33b"].model.experts, ffn_dim=2_304)  # which 3 divides
LAYOUTS = st.builds(
    Layout,
    tp=st.sampled_from([1, 1, 2, 3, 4, 8]),
    pp=st.sampled_from([1, 1, 2, 4, 5, 8, 16, 64]),
    vpp=st.just(1),
    pipeline=st.just(EVEN),
    cp=st.sampled_from([1, 1, 2, 3, 4, 6]),
    cp_scheme=st.sampled_from(["auto", "heads"]),
    ep=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 512]),
    etp=st.sampled_from([1, 1, 2, 3]),
    dispatcher=st.sampled_from(["all_to_all", "deepep"]),
    micro_batch=st.sampled_from([1, 2, 3]),
    recompute=st.just(()),
)


def gpus(count):
    return replace(local_cluster(count, "cpu"), device="cuda")


def refusal(recipe, stage, world_size):
    with pytest.raises(PlanError) as caught:
        settle_dp(recipe, stage, gpus(world_size))
    return str(caught.value)


def sizes(text, what):
    """Return the sizes of 'use seq_len 60 or 64'."""
    found = re.search(rf"use {what} ([\d,]+)(?: or ([\d,]+))?", text)
    return [int(size.replace(",", "")) for size in found.groups() if size] if found else []


def written(model, pp):
    """Return a pipeline with one layer on all ranks but the last."""
    predictions = model.mtp.num_layers if model.mtp else 0
    return f"E{'t|' * (pp - 1)}t*{model.num_layers - pp + 1}{'m' * predictions}L"


def layout_of(text, before):
    """Return the layout of 'dp4 tp2 ep8 micro_batch 1', its dp and its world size, if another."""
    world_size, words = LAYOUT.search(text).groups()
    changes, words = dict.fromkeys(AXES, 1), words.split()
    while words:
        word = words.pop(0)
        if match := re.fullmatch(r"([a-z]+)(\d+)", word):
            changes[match[1]] = int(match[2])
        elif word.startswith("E"):
            changes["pipeline"] = word
        else:
            value = words.pop(0)
            changes[word] = int(value) if value.isdigit() else value
    dp = changes.pop("dp")
    return replace(before, **changes), dp, int((world_size or "0").replace(",", ""))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layout=LAYOUTS,
    pipeline=st.sampled_from(["even", "interleaved", "written"]),
    vpp=st.sampled_from([2, 2, 3, 32]),
    world_size=st.sampled_from([1, 6, 8, 24, 64, 256, 1024, 1536]),
    stage=st.integers(0, 4),
)
def test_every_remedy_passes_every_check(name, layout, pipeline, vpp, world_size, stage):
    recipe = RECIPES[name]
    stage = recipe.stages[stage % len(recipe.stages)]
    if pipeline == "interleaved" and layout.pp > 1:
        layout = replace(layout, vpp=vpp)
    if pipeline == "written" and 1 < layout.pp <= recipe.model.num_layers:
        layout = replace(layout, pipeline=written(recipe.model, layout.pp))
    stage = replace(stage, layout=layout)
    replace(recipe, stages=(stage,), assumed=())  # is left to the plan, which knows the cluster
    try:
        settle_dp(recipe, stage, gpus(world_size))
    except PlanError as error:
        text = str(error)
    else:
        return
    assert "; " in text
    if "nearest possible" in text:
        near, dp, elsewhere = layout_of(text, layout)
        assert settle_dp(recipe, replace(stage, layout=near), gpus(elsewhere or world_size)) == dp
    for size in sizes(text, "world size"):
        assert settle_dp(recipe, stage, gpus(size))
    for size in sizes(text, "seq_len"):
        assert settle_dp(recipe, replace(stage, seq_len=size), gpus(world_size))
    if found := re.search(r"use batch_ramp (\(.*?\));", text):
        ramp = ast.literal_eval(found[1])
        assert settle_dp(recipe, replace(stage, batch_ramp=ramp), gpus(world_size))


def stage_of(name, **axes):
    stage = RECIPES[name].stages[0]
    ones = replace(stage.layout, tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1)
    return replace(stage, layout=replace(ones, **axes))


@pytest.mark.parametrize(
    ("axes", "world_size", "nearest"),
    [
        ({"tp": 4, "pp": 4}, 24, "dp2 tp4 pp3"),  # 24 layers: 3 is nearer to 4 than 2 is
        ({"tp": 3, "pp": 4, "ep": 8}, 96, "dp8 tp4 pp3 ep8"),  # dp 12 would share no batch
        ({"pp": 4, "ep": 16}, 32, "dp16 pp2 ep16"),
        ({"ep": 7}, 8, "dp8 ep8"),
        ({"pp": 32}, 32, "dp4 pp8"),
        ({"pp": 4, "vpp": 8}, 32, "dp8 pp4 vpp6"),
        ({"pp": 2, "cp": 3}, 64, "dp8 pp2 cp4"),  # from 3 to 4 is less than from 3 to 2
    ],
)
def test_the_nearest_layout_changes_few_axes_and_those_little(axes, world_size, nearest):
    text = refusal(RECIPES["vaetki_7b_a1b"], stage_of("vaetki_7b_a1b", **axes), world_size)
    assert text.endswith(f"nearest possible layout: {nearest}")


@pytest.mark.parametrize(
    ("changes", "message", "dispatcher"),
    [
        (
            {"dispatcher": "deepep", "ep": 48},
            "'deepep' has no kernel for ep 48 x etp 1 =",
            "deepep",
        ),
        (
            {"dispatcher": "deepep", "ep": 64, "etp": 3},
            "for ep 64 x etp 3 = 192 ranks, only for 2",
            "all_to_all",
        ),
    ],
)
def test_deepep_has_kernels_for_some_numbers_of_ranks(changes, message, dispatcher):
    stage = replace(stage_of("ax_k1_519b_a33b", **changes), batch_ramp=((0, 768),))
    recipe = RECIPES["ax_k1_519b_a33b"]
    text = refusal(replace(recipe, model=replace(recipe.model, experts=EXPERTS)), stage, 192)
    assert message in text
    assert layout_of(text, stage.layout)[0].dispatcher == dispatcher


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_libraries_for_gpus_send_bfloat16(dispatcher):
    stage = replace(stage_of("vaetki_7b_a1b", ep=8, dispatcher=dispatcher), precision=Fp32())
    recipe = RECIPES["vaetki_7b_a1b"]
    text = refusal(recipe, stage, 8)
    assert f"dispatcher {dispatcher!r} sends bfloat16, and precision is Fp32" in text
    assert text.endswith("nearest possible layout: dp8 ep8 dispatcher all_to_all")
    assert settle_dp(recipe, stage, local_cluster(8, "cpu")) == 8, "not used without a GPU"
    alone = replace(stage, layout=replace(stage.layout, ep=1))
    assert settle_dp(recipe, alone, gpus(8)) == 8, "not used where a rank has all experts"
