"""`megamoe parity` finds each of the mistakes that are planted on purpose, and nothing without them."""

import pytest

from tests.mcore.mutations import CONTROLS, MUTATIONS, leave_as_it_is, plant


@pytest.mark.mutations
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_found(name):
    found = plant(name)
    assert "DIFFERS" in found
    assert f"{MUTATIONS[name].layout} differs in " in found


@pytest.mark.mutations
@pytest.mark.parametrize(("recipe", "options"), CONTROLS)
def test_without_a_mistake_the_same_layouts_are_equal(recipe, options):
    found = leave_as_it_is(recipe, options)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.mutations
def test_the_first_tensor_that_is_named_is_a_wrong_one():
    """Gradients are compared as they are, not clipped: then all would be as wrong as the norm."""
    found = plant("expert_divisor")
    assert "first tensor: step 1: decoder.layers.1.mlp.experts." in found


@pytest.mark.mutations
def test_swapped_chunks_have_the_tensors_of_the_model():
    """Values alone tell that they are swapped: a tensor that is not there differs by infinity."""
    assert "inf" not in plant("vpp_chunk")
