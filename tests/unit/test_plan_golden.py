"""Plans of every shipped recipe, as they were reviewed. Renew: python -m tests.unit.test_plan_golden."""

import itertools
from pathlib import Path

import pytest

from megamoe.errors import PlanError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cli import local_cluster, named_cluster
from megamoe.plan.flops import train_flops_per_token
from megamoe.plan.json import differences, digest, from_json, read_plan, to_json, write_plan
from megamoe.plan.params import count_params
from megamoe.plan.plan import Plan
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.scale import scale_tiny

FOLDER = Path(__file__).parents[1] / "golden" / "plans"


def cluster_plan(name):
    """The recipe on the fewest nodes (a power of two) that its layouts fit."""
    recipe = load_recipe(name).recipe
    for power in itertools.count():
        try:
            return build_plan(recipe, named_cluster("h200-8x400g", 2**power), Options())
        except PlanError:
            if power > 10:
                raise
    raise AssertionError


def tiny_plan(name):
    recipe = scale_tiny(load_recipe(name)).recipe
    return build_plan(recipe, local_cluster(2, "cpu"), Options(scale="tiny"))


def golden_plans():
    plans = {f"{name}.h200-8x400g.json": cluster_plan(name) for name in recipe_names()}
    return plans | {f"{name}.tiny.json": tiny_plan(name) for name in recipe_names()}


PLANS = golden_plans()


@pytest.mark.parametrize("file", sorted(PLANS))
def test_the_plan_is_the_one_that_was_reviewed(file):
    golden = read_plan(FOLDER / file)
    assert differences(golden, PLANS[file]) == [], "renew: python -m tests.unit.test_plan_golden"
    assert digest(golden) == digest(PLANS[file])


def test_there_is_no_golden_plan_of_a_recipe_that_is_gone():
    assert sorted(path.name for path in FOLDER.glob("*.json")) == sorted(PLANS)


@pytest.mark.parametrize("file", sorted(PLANS))
def test_every_plan_survives_json(file):
    assert from_json(to_json(PLANS[file]), Plan, file) == PLANS[file]


@pytest.mark.parametrize("file", sorted(PLANS))
def test_every_plan_spends_what_the_recipe_asks(file):
    plan = PLANS[file]
    loaded = load_recipe(plan.recipe)
    recipe = (scale_tiny(loaded) if plan.scale else loaded).recipe
    for stage, segment in zip(recipe.stages, plan.segments, strict=True):
        largest_step = max(size for _, size in stage.batch_ramp) * stage.seq_len
        assert 0 <= segment.tokens - stage.tokens < largest_step
        assert train_flops_per_token(plan, segment) > 0


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_counts_what_its_authors_released(name):
    recipe = load_recipe(name).recipe
    if recipe.published.total_params is not None:
        released = count_params(recipe.model).released(recipe.published.unreleased)
        assert released == recipe.published.total_params


def renew():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for file, plan in PLANS.items():
        write_plan(FOLDER / file, plan)


if __name__ == "__main__":
    renew()
