"""Parameters: the real modules, the formula and the published count are one number, for every recipe."""

import json
import subprocess
import sys

import pytest

from megamoe.errors import PlanError
from megamoe.mcore.meta import count_plan, one_process_plan
from megamoe.plan.params import count_params, layer_params
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.scale import scale_tiny
from tests.mcore.world import world_of_one
from tests.unit.test_recipe_published import TOTALS


@pytest.mark.parametrize("scale", ["full", "tiny"])
@pytest.mark.parametrize("name", recipe_names())
def test_modules_formula_and_published_count_agree(name, scale):
    loaded = load_recipe(name)
    recipe = (scale_tiny(loaded) if scale == "tiny" else loaded).recipe
    plan = one_process_plan(recipe)
    with world_of_one(plan):
        built = count_plan(plan)
    assert built.params == count_params(recipe.model)
    layers = range(recipe.model.num_layers)
    assert built.layers == tuple(layer_params(recipe.model, layer) for layer in layers)
    released = built.params.released(recipe.published.unreleased)
    if scale == "full":
        assert released == recipe.published.total_params == TOTALS.get(name, released)


def test_a_dense_mlp_without_a_norm_after_it_is_counted_as_it_is_built():
    loaded = load_recipe("ax_k1_519b_a33b", ("model.norm.after_dense_mlp=False",))
    recipe = scale_tiny(loaded).recipe
    plan = one_process_plan(recipe)
    with world_of_one(plan):
        built = count_plan(plan)
    assert built.params == count_params(recipe.model)
    assert built.layers[0] == layer_params(recipe.model, 0)


def test_the_command_builds_the_modules_and_warns_of_nothing():
    command = [sys.executable, "-m", "megamoe", "model", "params", "vaetki_7b_a1b"]
    done = subprocess.run(
        [*command, "--scale", "tiny", "--json"], capture_output=True, text=True, check=True
    )
    # The CUDA build of torch tells where it looks for CUDA on a machine without a GPU.
    told = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert told == []
    document = json.loads(done.stdout)
    assert document["modules"]["difference"] == 0
    assert document["modules"]["total"] == document["total"] > 0


def test_a_model_without_an_engine_is_refused_in_one_line():
    recipe = load_recipe("keural_14b", ("model.experts.top_k=1",)).recipe
    with pytest.raises(PlanError) as caught:
        one_process_plan(recipe)
    message = str(caught.value)
    assert message.startswith("keural_14b: model.experts.top_k 1 with score 'softmax' ")
    assert message.endswith("; or count by --formula alone")
