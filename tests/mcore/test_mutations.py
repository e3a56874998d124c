"""`megamoe parity` finds each of the mistakes that are planted on purpose."""

import pytest

from tests.mcore.mutations import MUTATIONS, plant


@pytest.mark.mutations
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_found(name):
    found = plant(name)
    assert "DIFFERS" in found
    assert f"{MUTATIONS[name].layout} differs in " in found
