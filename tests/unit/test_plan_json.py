"""Plans survive JSON unchanged; anything else is refused with its place."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.json import differences, digest, from_json, read_plan, to_json, write_plan
from megamoe.plan.plan import Plan
from megamoe.recipe import GQA, Bf16, Fp8Block, Fp8Delayed, Fp32, Mtp, Muon
from tests.unit.test_plan_build import CPU, GENERAL, RECIPE, with_data

PLAN = build_plan(RECIPE, CPU, Options())


def through_text(plan):
    return from_json(json.loads(json.dumps(to_json(plan))), Plan, "here")


def test_a_plan_with_data_survives(tmp_path):
    plan = with_data(tmp_path)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert digest(read_plan(tmp_path / "plan.json")) == digest(plan)


def test_every_variant_survives():
    muon = Muon(
        momentum=0.95,
        newton_schulz_steps=5,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        grad_clip=1,
        moments_dtype="float32",
    )
    model = replace(
        RECIPE.model,
        attention=GQA(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True),
        global_rope=None,
        mtp=Mtp(num_layers=1, ffn="moe"),
    )
    plan = replace(PLAN, optimizer=muon, model=model)
    assert through_text(plan) == plan


precisions = st.one_of(
    st.just(Bf16()),
    st.just(Fp32()),
    st.builds(
        Fp8Delayed,
        amax_history=st.integers(1, 9),
        bf16_first_layers=st.integers(0, 3),
        bf16_last_layers=st.integers(0, 3),
    ),
    st.builds(Fp8Block, bf16_first_layers=st.integers(0, 3), bf16_last_layers=st.integers(0, 3)),
)


@settings(deadline=None)  # the machine may be busy
@given(
    st.integers(0, 2**63),
    precisions,
    st.floats(1e-300, 1e300),
    st.lists(st.tuples(st.integers(1, 10**13), st.integers(1, 10**6)), max_size=4),
    st.lists(st.text(), max_size=3),
)
def test_any_plan_survives(seed, precision, interpolation, ramp, assumed):
    segment = replace(
        PLAN.segments[0],
        precision=precision,
        rope_interpolation=interpolation,
        batch_ramp=((0, 8), *ramp),
    )
    plan = replace(PLAN, seed=seed, segments=(segment,), assumed=tuple(assumed))
    assert through_text(plan) == plan
    assert digest(through_text(plan)) == digest(plan)


def test_the_digest_sees_every_value_and_no_spelling():
    assert digest(replace(PLAN, seed=1)) != digest(PLAN)
    whole = replace(PLAN.segments[0], rope_interpolation=1)
    decimal = replace(PLAN.segments[0], rope_interpolation=1.0)
    assert digest(replace(PLAN, segments=(whole,))) == digest(replace(PLAN, segments=(decimal,)))


def edited(*path, value):
    """The plan's JSON with one value changed; `...` as value removes it."""
    data = to_json(PLAN)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edited("sed", value=1), "here: plan: unknown key 'sed'; did you mean 'seed'?"),
        (edited("seed", value=...), "here: plan: key 'seed' is missing; make the plan again"),
        (edited("seed", value=-1), "here: plan.seed: -1 is out of range; give int at least 0"),
        (edited("seed", value=True), "here: plan.seed: True is not of type int"),
        (edited("format", value=2), "here: plan.format: 2 is not one of 1"),
        (edited("segments", value={}), "here: plan.segments: {} is not a tuple of"),
        (
            edited("segments", 0, "lr", "peak", value="high"),
            "here: plan.segments[0].lr.peak: 'high' is not of type float",
        ),
        (
            edited("segments", 1, "batch_ramp", 0, value=[1]),
            "here: plan.segments[1].batch_ramp[0]: [1] is not a tuple (int, int)",
        ),
        (
            edited("segments", 0, "precision", "type", value="Bf17"),
            "here: plan.segments[0].precision: type 'Bf17' is not known; did you mean 'Bf16'?",
        ),
        (
            edited("optimizer", value=3),
            "here: plan.optimizer: 3 is not an object with a 'type'",
        ),
        (edited("model", value=None), "here: plan.model: null is not an object (Model)"),
        (
            edited("model", "experts", "top_k", value=99),
            "here: plan.model.experts.top_k: 99 is more than num_routed 8",
        ),
    ],
)
def test_what_is_not_a_plan_is_refused_with_its_place(data, message):
    with pytest.raises(PlanError) as caught:
        from_json(data, Plan, "here")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanError, match=r"plan\.json: No such file.*megamoe plan NAME -o"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("text", "why"), [("{", "Expecting"), ('{"a": 1, "a": 2}', "'a' stands twice")]
)
def test_a_file_that_is_not_plain_json_is_refused(tmp_path, text, why):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=f"plan.json: not JSON .*{why}"):
        read_plan(tmp_path / "plan.json")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_plan(path, PLAN)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*/plan\.json'"):
        write_plan(path, replace(PLAN, seed=7))
    assert read_plan(path) == PLAN
    assert [item.name for item in tmp_path.iterdir()] == ["plan.json"]


def test_differences_name_the_places():
    other = replace(GENERAL, lr=replace(GENERAL.lr, peak=2e-3))
    changed = build_plan(replace(RECIPE, stages=(other, RECIPE.stages[1])), CPU, Options(seed=3))
    assert differences(PLAN, changed) == [
        "seed: 0, not 3",
        "segments[0].lr.peak: 0.001, not 0.002",
    ]
    assert differences(PLAN, PLAN) == []
