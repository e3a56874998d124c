"""Layouts that do not fit are refused with what would."""

from dataclasses import replace

import pytest

from megamoe.errors import PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.layout import layout_text
from megamoe.recipe import GQA, Fp8Block, Fp8Delayed
from megamoe.recipe.layout import one_rank
from tests.unit.test_plan_build import CPU, GENERAL, RECIPE

ONES = one_rank(1)


def plan(cluster=CPU, world_size=2, model=RECIPE.model, layout=ONES, **stage_values):
    stage = replace(GENERAL, layout=layout, **stage_values)
    recipe = replace(RECIPE, model=model, stages=(stage,))
    return build_plan(recipe, replace(cluster, devices_per_node=world_size), Options())


@pytest.mark.parametrize(
    ("world_size", "layout", "message"),
    [
        (
            24,
            replace(ONES, tp=4, pp=4),
            "small/general: world size 24 is not a multiple of tp 4 x pp 4 x cp 1 = 16; "
            "use world size 16 or 32",
        ),
        (
            2,
            replace(ONES, tp=4),
            "small/general: world size 2 is not a multiple of tp 4 x pp 1 x cp 1 = 4; "
            "use world size 4; nearest possible layout: dp1 tp2",
        ),
        (
            6,
            replace(ONES, pp=2, ep=8),
            "small/general: world size 6 is not a multiple of etp 1 x ep 8 x pp 2 = 16; "
            "use world size 16",
        ),
        (
            36,
            replace(ONES, tp=3, ep=8),
            "small/general: world size 36 is not a multiple of etp 1 x ep 8 x pp 1 = 8; "
            "nearest possible layout on world size 32: dp8 tp4 ep8",
        ),
    ],
)
def test_ranks_that_do_not_fill_the_grid(world_size, layout, message):
    with pytest.raises(PlanError) as caught:
        plan(world_size=world_size, layout=layout)
    assert str(caught.value) == message


def test_other_world_sizes_are_whole_nodes():
    model = replace(RECIPE.model, num_layers=6)
    with pytest.raises(PlanError, match=r"world size 8 is not .* = 3; use world size 6 or 9;"):
        plan(world_size=8, model=model, layout=replace(ONES, pp=3), batch_ramp=((0, 24),))
    nodes = replace(CPU, num_nodes=2)
    with pytest.raises(PlanError, match=r"world size 8 is not .* = 3; use world size 12;"):
        plan(nodes, 4, model=model, layout=replace(ONES, pp=3), batch_ramp=((0, 24),))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (replace(ONES, tp=8), "model.attention.num_heads 4 is not a multiple of tp 8"),
        (replace(ONES, ep=3), "model.experts.num_routed 8 is not a multiple of ep 3; nearest "),
        (
            replace(ONES, pp=3, vpp=2),
            "pp 3 x vpp 2 = 6 exceeds model.num_layers 4; nearest possible",
        ),
        (replace(ONES, etp=64), "model.experts.ffn_dim 32 is not a multiple of etp 64"),
        (replace(ONES, pp=3), "num_layers 4 is not a multiple of pp 3 x vpp 1 = 3, and leaves"),
    ],
)
def test_model_sizes_that_an_axis_does_not_divide(layout, message):
    with pytest.raises(PlanError) as caught:
        plan(world_size=192, layout=layout)
    assert message in str(caught.value)


def test_the_last_chunk_of_a_pipeline_may_hold_fewer_layers():
    model = replace(RECIPE.model, num_layers=61)
    layout = replace(ONES, pp=16)
    assert plan(world_size=16, model=model, layout=layout).segments[0].dp == 1
    assert layout.chunks(model) == ("Etttt", *["tttt"] * 14, "tL")
    assert replace(ONES, pp=4, vpp=4).chunks(model) == ("Etttt", *["tttt"] * 14, "tL")
    assert replace(ONES, pp=15).chunks(replace(model, num_layers=60))[-1] == "ttttL"
    for layout in (replace(ONES, pp=15), replace(ONES, pp=15, vpp=2)):
        with pytest.raises(PlanError, match=r"none unless layout\.pipeline is written; nearest"):
            plan(world_size=15, model=model, layout=layout)


def test_a_written_pipeline_places_what_cannot_be_dealt():
    model = replace(RECIPE.model, num_layers=61)
    layout = replace(ONES, pp=16, vpp=2, pipeline="Et|(tt|)*30L")
    (segment,) = plan(world_size=16, model=model, layout=layout, batch_ramp=((0, 16),)).segments
    assert segment.layout.chunks(model) == ("Et", *["tt"] * 30, "L")
    assert layout_text(segment) == "dp1 pp16 vpp2 Et|(tt|)*30L"


def test_key_value_heads_are_split_or_repeated_evenly():
    attention = GQA(num_heads=12, num_kv_heads=4, head_dim=16, qk_norm=False)
    model = replace(RECIPE.model, attention=attention, vocab_size=600, dense_ffn_dim=120)
    model = replace(model, experts=replace(model.experts, num_shared=0))
    with pytest.raises(
        PlanError, match="num_kv_heads 4 is neither a multiple nor a divisor of tp 6"
    ):
        plan(world_size=6, model=model, layout=replace(ONES, tp=6), seq_len=60)


@pytest.mark.parametrize(
    ("layout", "seq_len", "message"),
    [
        (replace(ONES, tp=4), 63, "seq_len 63 is not a multiple of tp 4; use seq_len 60 or 64"),
        (
            replace(ONES, cp=4),
            63,
            "is not a multiple of cp 4 x tp 1 = 4; use seq_len 60 or 64",
        ),
        (replace(ONES, cp=4, tp=4), 24, "cp 4 x tp 4 = 16; use seq_len 16 or 32"),
    ],
)
def test_sequences_that_cannot_be_split(layout, seq_len, message):
    with pytest.raises(PlanError) as caught:
        plan(world_size=16, layout=layout, seq_len=seq_len)
    assert message in str(caught.value)


def test_heads_that_ranks_of_cp_cannot_share():
    layout = replace(ONES, cp=4, cp_scheme="heads")
    grouped = GQA(num_heads=12, num_kv_heads=3, head_dim=16, qk_norm=False)
    model = replace(RECIPE.model, attention=grouped)
    with pytest.raises(PlanError, match="3 key-value heads of a rank to cp 4, which is neither"):
        plan(world_size=4, model=model, layout=layout, seq_len=64)
    model = replace(RECIPE.model, attention=replace(grouped, num_heads=6))
    with pytest.raises(
        PlanError, match="6 heads of a rank to cp 4, which does not divide them; nearest possible"
    ):
        plan(world_size=4, model=model, layout=layout, seq_len=64)
    assert plan(world_size=4, model=model, layout=replace(layout, cp_scheme="ring"), seq_len=64)


def test_every_batch_of_the_ramp_must_be_whole_micro_batches():
    with pytest.raises(PlanError) as caught:
        plan(world_size=4, layout=replace(ONES, micro_batch=2), batch_ramp=((0, 8), (9_000, 1_030)))
    assert "batch_ramp entry (9,000, 1,030): 1,030 sequences" in str(caught.value)
    assert (
        "micro_batch 2 x dp 4 = 8; use world size 1; use batch_ramp ((0, 8), (9_000, 1_032));"
        in str(caught.value)
    )


def test_an_interleaved_pipeline_wants_rounds_of_pp_micro_batches():
    layout = replace(ONES, pp=2, vpp=2)
    assert plan(world_size=4, layout=layout, batch_ramp=((0, 8),)).segments[0].dp == 2
    with pytest.raises(
        PlanError, match=r"x dp 2 x pp 2 \(interleaved\) = 4; use world size 2 or 6"
    ):
        plan(world_size=4, layout=layout, batch_ramp=((0, 6),))


@pytest.mark.parametrize(
    "precision",
    [
        Fp8Block(bf16_first_layers=1, bf16_last_layers=1),
        Fp8Delayed(gradient_format="e4m3", amax_history=1, bf16_first_layers=1, bf16_last_layers=1),
    ],
)
def test_fp8_is_refused_where_there_is_no_gpu(precision):
    with pytest.raises(PlanError, match=r"use --scale tiny or --set 'general.precision=Bf16\(\)'"):
        plan(precision=precision)
    with pytest.raises(PlanError, match=r"has none; use --scale tiny$"):
        plan(precision=precision, layout=replace(ONES, tp=8))
    on_gpu = plan(cluster=replace(CPU, device="cuda"), precision=precision)
    assert on_gpu.segments[0].precision == precision


def test_a_layout_reads_as_its_used_axes():
    assert layout_text(plan().segments[0]) == "dp2"
    assert (
        layout_text(plan(world_size=8, layout=replace(ONES, tp=4, ep=8)).segments[0])
        == "dp2 tp4 ep8"
    )
