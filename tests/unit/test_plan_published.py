"""Each recipe has a plan on the GPUs that its authors report, or is refused for the reason in its comments."""

from dataclasses import replace

import pytest

from megamoe.errors import PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cli import named_cluster
from megamoe.plan.plan import Plan
from megamoe.recipe.load import load_recipe, recipe_names

NUM_GPUS = {name: load_recipe(name).recipe.published.gpus for name in recipe_names()}
PUBLISHED = {name: count for name, count in NUM_GPUS.items() if count is not None}
# What the plan for the published number says, and a number that has one.
REFUSED = {
    "ax_k1_519b_a33b": (
        "ax_k1_519b_a33b/general: batch_ramp entry (0, 2,048): 2,048 sequences are not a multiple of "
        "micro_batch 1 x dp 96 = 96; use world size 1,024 or 2,048; ",
        1_024,
    ),
    "vaetki_100b_a10b": (
        "vaetki_100b_a10b/general: world size 1016 is not a multiple of etp 1 x ep 4 x pp 8 = 32; "
        "use world size 992 or 1,984",
        992,
    ),
}


def plan_on(name: str, num_gpus: int, overrides: tuple[str, ...] = ()) -> Plan:
    """Return a recipe's plan on nodes of 8 GPUs of the published kind, or on one smaller node."""
    recipe = load_recipe(name, overrides).recipe
    assert recipe.published.gpu is not None
    cluster = named_cluster(f"{recipe.published.gpu.lower()}-8x400g", max(1, num_gpus // 8))
    cluster = replace(cluster, devices_per_node=min(8, num_gpus))
    assert cluster.world_size == num_gpus
    return build_plan(recipe, cluster, Options())


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - REFUSED.keys()))
def test_a_recipe_has_a_plan_on_the_published_gpus(name: str):
    plan = plan_on(name, PUBLISHED[name])
    assert {segment.world_size for segment in plan.segments} == {PUBLISHED[name]}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_recipe_without_a_plan_on_the_published_gpus_says_which_have_one(name: str):
    message, other = REFUSED[name]
    with pytest.raises(PlanError) as caught:
        plan_on(name, PUBLISHED[name])
    assert str(caught.value).startswith(message)
    plan = plan_on(name, other)
    assert {segment.world_size for segment in plan.segments} == {other}
    text = recipe_names()[name].read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.strip().startswith("#")]
    assert f"{PUBLISHED[name]:,}" in " ".join(comments)
    assert f"{other:,}" in " ".join(comments)


def test_a_k1_has_a_plan_on_1536_gpus_from_the_batch_on_that_they_had():
    plan = plan_on("ax_k1_519b_a33b", 1_536, ("general.batch_ramp=((0, 18_432),)",))
    assert [segment.dp for segment in plan.segments] == [96, 96, 24, 12]
