"""What the engine does otherwise on a GPU, tried on a CPU as far as it can be."""

import pytest
import torch

from megamoe.mcore import checkpoint, optim
from megamoe.mcore.engine import Engine
from tests.mcore import tiny
from tests.mcore.world import adam_states, everything, train, world_of_one


@pytest.fixture
def plan(tmp_path):
    return tiny.tiny_plan(tmp_path / "data")


@pytest.fixture
def one_pass(monkeypatch):
    """Adam in one pass, which a CPU has too."""

    def choose(inner):
        for group in inner.param_groups:
            group["fused"] = True

    monkeypatch.setattr(optim, "_choose_kernel", choose)


def test_adam_in_one_pass_makes_the_same_steps(plan, tmp_path, one_pass, monkeypatch):
    with world_of_one(plan):
        fused = adam_states(train(plan, tmp_path / "fused", 1))
        monkeypatch.undo()
        plain = adam_states(train(plan, tmp_path / "plain", 1))
    for name, expected in plain.items():
        assert fused[name]["step"] == expected["step"] == 1
        # The moments: a product or two of the same gradient, in another order.
        for key in ("exp_avg", "exp_avg_sq"):
            error = (fused[name][key] - expected[key]).abs()
            assert (error <= 4 * 2.0**-24 * expected[key].abs() + 1e-30).all(), name
        # A step is lr times a number up to 1, of some eight roundings; a weight is rounded twice.
        bound = 8 * 2.0**-24 * 1e-2 + 2 * 2.0**-24 * expected["weight"].abs()
        assert ((fused[name]["weight"] - expected["weight"]).abs() <= bound).all(), name


def test_a_run_with_adam_in_one_pass_continues_bit_for_bit(plan, tmp_path, one_pass):
    with world_of_one(plan):
        uninterrupted = everything(train(plan, tmp_path / "whole", 4))
    with world_of_one(plan):
        train(plan, tmp_path / "half", 2).save(wait=True)
        continued = everything(train(plan, tmp_path / "half", 2))
    assert uninterrupted.keys() == continued.keys()
    differing = [n for n in continued if not torch.equal(continued[n], uninterrupted[n])]
    assert differing == []


def test_a_checkpoint_of_a_gpu_does_not_bring_its_kernel_along(
    plan, tmp_path, one_pass, monkeypatch
):
    with world_of_one(plan):
        folder = train(plan, tmp_path / "gpu", 1).save(wait=True)
        monkeypatch.undo()
        engine = Engine(plan, plan.segments[0], tmp_path / "cpu")
        checkpoint.load(folder, engine.chunks, engine.optimizer, same_layout=True)
    assert {group["fused"] for group in engine.optimizer.param_groups} == {None}
