"""Vanilla against interleaved MLA, timed at a tiny size on a CPU: it ends, and its figures add up."""

import json
import math

import pytest
import torch

from benchmarks import megamoe_step
from benchmarks.mla_windows import in_turns, main
from tests.mcore.world import world_of_one


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("windows") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        # The groups of this process are those that other tests have formed.
        patch.setattr(megamoe_step, "world_of_one", lambda plan, _: world_of_one(plan))
        assert main(["--device", "cpu", "--scale", "tiny", "--steps", "2", "-o", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["attention", "layer"])
def test_both_kinds_are_timed_and_their_ratio_is_a_quotient(result, part):
    case = result["cases"][part]
    kinds = case["seconds_per_layer"]
    for seconds in kinds.values():
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] < math.inf
    assert case["ratio"] == kinds["vanilla"]["median"] / kinds["interleaved"]["median"]


def test_five_layers_of_six_have_a_window_and_those_of_vanilla_none(result):
    assert result["windows"] == {"vanilla": [None] * 6, "interleaved": [16] * 5 + [None]}


def test_what_was_measured_is_told(result):
    assert (result["device"], result["scale"], result["seq_len"]) == ("cpu", "tiny", 512)
    assert result["versions"]["torch"] == torch.__version__
    assert result["attention kernels"]["window"] == "blocks"


def test_kinds_take_turns_and_the_first_ones_are_not_counted():
    ran = []
    steps = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = in_turns(steps, torch.device("cpu"), warmup=1, count=2)
    assert "".join(ran) == "abbaab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_without_cuda_it_says_what_to_give(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    assert main([]) == 2
    assert "give --device cpu --scale tiny" in capsys.readouterr().err
