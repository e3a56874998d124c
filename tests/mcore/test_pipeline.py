"""What Megatron-core needs where a rank of a pipeline has few layers."""

import pytest

from tests.mcore import tiny
from tests.mcore.world import train, world_of_one


@pytest.fixture
def engine(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        yield train(plan, tmp_path, 2)


def test_a_part_without_a_weight_knows_the_step_of_the_others(engine):
    others, experts = engine.optimizer.chained_optimizers
    experts.optimizer.state.clear()  # as on a rank that holds the embedding alone
    groups = experts.state_dict()["optimizer"]["param_groups"]
    assert {group["step"] for group in groups} == {2.0}
    assert not experts.optimizer.state
    assert {group["step"] for group in others.state_dict()["optimizer"]["param_groups"]} == {2.0}


def test_megatron_still_wants_a_weight_in_every_part(engine):
    experts = engine.optimizer.chained_optimizers[1]
    experts.optimizer.state.clear()
    with pytest.raises(AssertionError):  # it looks for the one step that all weights have made
        type(experts).state_dict(experts)
