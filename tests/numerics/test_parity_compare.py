"""What is called a difference between two layouts, and by which name."""

import math

import pytest
import torch

from megamoe.parity.cli import Row, table
from megamoe.parity.compare import Left, compare

STEP = {
    "loss": 2.0,
    "mtp_loss": 3.0,
    "grad_norm": 4.0,
    "aux_losses": [["aux_loss", 0.5]],
    "expert_load": [2.0],
    "loss_tokens": 512,
    "tokens_seen": 512,
    "lr": 0.5,
    "sequences": 8,
    "unequal_copies": [],
}
STORED = {
    "embedding.weight": torch.tensor([4.0, -2.0]),
    "router.previous_shares_E": torch.tensor([1.0, 0.0]),
    "output.weight": torch.tensor([1.0]),
    **{
        f"chained_{part}.optimizer.state.{kind}.{name}": torch.tensor(values)
        for part, name, values in ((0, "output.weight", [1.0]), (1, "embedding.weight", [4.0, 2.0]))
        for kind in ("param", "exp_avg", "exp_avg_sq")
    },
}
BOUND = 1e-6


def left(stored=None, **measured):
    return Left([{**STEP, **measured}], [{**STORED, **(stored or {})}])


def test_what_is_equal_differs_by_nothing():
    found = compare(left(), left(), BOUND)
    assert found.is_equal
    assert set(found.measured.values()) == {0.0}
    assert {worst.difference for worst in found.tensors.values()} == {0.0}
    assert found.idle_experts == 1


def test_a_tensor_is_compared_relative_to_its_largest_value():
    name = "chained_1.optimizer.state.exp_avg.embedding.weight"
    found = compare(left({name: torch.tensor([4.0, 2.5])}), left(), BOUND)
    assert found.tensors["gradient"].difference == 0.5 / 4
    assert found.tensors["gradient"].name == "step 1: embedding.weight gradient"
    assert found.beyond == ("step 1: embedding.weight gradient",)


def test_of_second_moments_the_roots_are_compared():
    name = "chained_0.optimizer.state.exp_avg_sq.output.weight"
    found = compare(left({name: torch.tensor([4.0])}), left(), BOUND)
    assert found.tensors["adam"].difference == 1.0


def test_names_come_in_the_order_of_the_forward_pass():
    changed = {name: value + 1 for name, value in STORED.items() if "exp_avg." in name}
    found = compare(left(changed), left(), BOUND)
    assert found.beyond == ("step 1: embedding.weight gradient", "step 1: output.weight gradient")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_exceeds_every_bound(value):
    found = compare(left({"output.weight": torch.tensor([value])}), left(), 1e30)
    assert found.beyond == ("step 1: output.weight",)
    assert compare(left(loss=value), left(), 1e30).beyond == ("step 1: loss",)


def test_counts_and_shares_must_be_equal():
    shares = {"router.previous_shares_E": torch.tensor([1.0, 1e-30])}
    found = compare(left(shares, loss_tokens=513), left(), 1.0)
    assert found.beyond == ("step 1: loss_tokens", "step 1: router.previous_shares_E")


def test_what_only_one_layout_has_is_a_difference():
    more = left({"mtp.weight": torch.ones(1)}, aux_losses=[])
    assert compare(more, left(), 1.0).beyond == ("step 1: aux_loss", "step 1: mtp.weight")
    assert compare(left(), more, 1.0).beyond == ("step 1: aux_loss", "step 1: mtp.weight")


def test_copies_that_are_not_equal_are_a_difference_however_small():
    found = compare(left(unequal_copies=["output.weight"]), left(), 1.0)
    assert found.beyond == ("step 1: output.weight copies",)
    assert found.first_tensor == "step 1: output.weight copies"


def note(comparison):
    row = Row(recipe="r", layout="tp2", processes=2, seconds=3.0, error=None, comparison=comparison)
    return table([row]).splitlines()[-2]


def test_the_first_tensor_is_named_beside_the_first_measured_value():
    name = "chained_1.optimizer.state.exp_avg.embedding.weight"
    tensors = {name: torch.tensor([4.0, 2.5]), "output.weight": torch.tensor([2.0])}
    both = compare(left(tensors, grad_norm=5.0), left(), BOUND)
    assert both.first_tensor == "step 1: embedding.weight gradient"
    assert note(both) == (
        "tp2 differs in 3, first in step 1: grad_norm; "
        "first tensor: step 1: embedding.weight gradient"
    )
    measured = compare(left(grad_norm=5.0), left(), BOUND)
    assert measured.first_tensor is None
    assert note(measured) == "tp2 differs in 1, first in step 1: grad_norm"


def test_the_table_names_the_first_difference_and_what_failed():
    found = compare(left({"output.weight": torch.tensor([2.0])}), left(), BOUND)
    rows = [
        Row(recipe="r", layout="tp2", processes=2, seconds=3.0, error=None, comparison=found),
        Row(
            recipe="r", layout="pp2", processes=2, seconds=3.0, error="rank 1: no", comparison=None
        ),
    ]
    lines = table(rows).splitlines()
    assert lines[0] == "r: largest relative difference from one process"
    assert lines[2].split() == [
        "tp2",
        "2",
        "0.0e+00",
        "0.0e+00",
        "0.0e+00",
        "0.0e+00",
        "0.0e+00",
        "0.0e+00",
        "1.0e+00",
        "DIFFERS",
        "3",
    ]
    assert lines[3].split() == ["pp2", "2", "FAILED", "3"]
    assert lines[-3:] == [
        "tp2 differs in 1, first in step 1: output.weight",
        "pp2 failed: rank 1: no",
        "",
    ]
    assert not rows[0].is_equal
    assert not rows[1].is_equal
