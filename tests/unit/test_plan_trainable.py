"""What no engine does yet is refused where it would move numbers, and otherwise told."""

from dataclasses import replace

import pytest

from megamoe.errors import PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cli import named_cluster
from megamoe.plan.trainable import check_trainable, left_out
from megamoe.recipe.load import load_recipe
from tests.unit.test_plan_golden import tiny_plan

BF16 = "*.precision=Bf16()"
FLOAT32_MOMENTS = "optimizer.moments_dtype='float32'"


def a_k1(*overrides: str):
    recipe = load_recipe("ax_k1_519b_a33b", overrides).recipe
    return build_plan(recipe, named_cluster("h200-8x400g", 128), Options())


def test_moments_in_bfloat16_are_refused_with_what_to_set():
    with pytest.raises(PlanError) as caught:
        check_trainable(a_k1(BF16))
    assert str(caught.value) == (
        "ax_k1_519b_a33b: optimizer.moments_dtype 'bfloat16' has no engine yet; "
        f'give --set "{FLOAT32_MOMENTS}"'
    )
    check_trainable(a_k1(BF16, FLOAT32_MOMENTS))


def test_a_tiny_recipe_has_moments_that_can_be_trained():
    check_trainable(tiny_plan("ax_k1_519b_a33b"))


def test_the_remedy_for_muon_is_one():
    plan = tiny_plan("k_exaone_236b_a23b")
    with pytest.raises(PlanError) as caught:
        check_trainable(plan)
    option = str(caught.value).partition("--set '")[2].rstrip("'")
    recipe = load_recipe("k_exaone_236b_a23b", (option,)).recipe
    check_trainable(replace(plan, optimizer=recipe.optimizer))


def test_what_is_not_recomputed_is_told_stage_by_stage():
    notes = [left_out(segment) for segment in a_k1().segments]
    assert notes[0] == (
        "general: layout.recompute mla_up_projection, mlp has no engine yet: activations are kept, "
        "with the same result and more memory",
    )
    assert [note.split(":")[0] for [note] in notes] == [
        "general", "reasoning", "context_16k", "context_32k"
    ]  # fmt: skip
    assert {left_out(segment) for segment in tiny_plan("ax_k1_519b_a33b").segments} == {()}
