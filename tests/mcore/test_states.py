"""What a rank has of the optimizer's state, as boxes of tensors (megamoe/mcore/states.py)."""

from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamoe.errors import CheckpointError
from megamoe.mcore import checkpoint
from megamoe.mcore.states import boxes_of_run, read_states, state_boxes
from megamoe.mcore.stored import StoredTensor
from tests.mcore import tiny
from tests.mcore.world import train, world_of_one


@st.composite
def runs(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    first = draw(st.integers(0, prod(sizes)))
    return sizes, first, draw(st.integers(first, prod(sizes)))


@given(runs())
def test_boxes_are_the_values_of_the_run_in_order_and_few(run):
    sizes, first, end = run
    whole = torch.arange(prod(sizes)).view(sizes)
    found, boxes = [], list(boxes_of_run(sizes, first, end))
    for offsets, box in boxes:
        part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, box, strict=True))]
        assert part.shape == box
        found += part.flatten().tolist()
    assert found == list(range(first, end))
    assert len(boxes) <= 2 * len(sizes) - 1


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (0, 12, [((0, 0), (3, 4))]),
        (4, 8, [((1, 0), (1, 4))]),
        (5, 7, [((1, 1), (1, 2))]),
        (3, 5, [((0, 3), (1, 1)), ((1, 0), (1, 1))]),
        (2, 11, [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 3))]),
        (7, 7, []),
    ],
)
def test_boxes_of_a_matrix(first, end, expected):
    assert list(boxes_of_run((3, 4), first, end)) == expected


def test_a_state_that_is_absent_or_of_another_shape_is_named(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        engine = train(plan, tmp_path, 0)
        models = checkpoint._models(checkpoint._state(engine.chunks))
        boxes = [box for box, is_own in state_boxes(engine.optimizer, models) if is_own]
        first = boxes[0]
        reader = SimpleNamespace(folder="runs/a", tensors={})
        with pytest.raises(CheckpointError, match=rf"^runs/a: {first.name} is absent, not \("):
            read_states(reader, engine.optimizer, models)
        reader.tensors = {box.name: StoredTensor(torch.float32, (7, *box.shape)) for box in boxes}
        with pytest.raises(CheckpointError, match=rf"{first.name} is of shape \(7, .*, not \("):
            read_states(reader, engine.optimizer, models)


def test_one_rank_has_each_value_of_each_weight_once(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        engine = train(plan, tmp_path, 0)
        models = checkpoint._models(checkpoint._state(engine.chunks))
        boxes = [box for box, _ in state_boxes(engine.optimizer, models)]
        num_weights = sum(w.numel() for chunk in engine.chunks for w in chunk.parameters())
    assert sum(box.data.numel() for box in boxes) == 3 * num_weights
