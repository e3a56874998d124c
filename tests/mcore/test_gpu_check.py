"""The measurement for a GPU, run at a tiny size without one: it ends, and its figures add up."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, megamoe_step
from benchmarks.breakdown import Breakdown
from benchmarks.gpu_check import main
from benchmarks.megamoe_step import STATE_BYTES, Load, layer_counts, layers_that_fit
from benchmarks.record import Record
from megamoe.recipe.load import load_recipe
from megamoe.recipe.scale import scale_tiny
from tests.mcore.world import world_of_one

REPOSITORY = Path(__file__).parents[2]
ROUTINGS = ["natural routing", "balanced routing"]
OURS = [f"{text}, {routing}" for text in ("random", "sample text") for routing in ROUTINGS]
TRANSFORMERS = [f"transformers, random, {routing}" for routing in ROUTINGS]
STEPS = [*OURS, *(TRANSFORMERS if find_spec("transformers") else [])]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "result.json"
    arguments = "--device cpu --scale tiny --sequences 2 --steps 2 --warmup 1"
    command = [sys.executable, "benchmarks/gpu_check.py", *arguments.split(), "-o", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", STEPS)
def test_the_figures_of_a_case_are_finite_and_agree(result, name):
    case = result["cases"][name]
    seconds = case["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] < math.inf
    assert case["tokens_per_step"] == result["sequences_per_step"] * result["seq_len"]
    assert case["tokens_per_s"] == pytest.approx(case["tokens_per_step"] / seconds["median"])
    assert 0 < case["model_tflop_per_s"] < math.inf
    # ln of the vocabulary, about 8.3, is what a model says that knows nothing.
    assert 0 < case["loss"]["last"] < 1.2 * math.log(4096)
    assert case["mfu"]["of 989.4 TFLOP/s"] is None, "a GPU's peak says nothing about a CPU"


def test_what_was_measured_is_told(result):
    assert result["device"] == "cpu"
    assert result["scale"] == "tiny"
    assert result["layers"] == result["layers_of_recipe"]
    for name in ("torch", "numpy", "megatron-core", "python"):
        assert result["versions"][name]
    assert "gpu_check.py" in result["command"]


def test_the_parts_of_a_step_take_no_longer_than_the_step(result):
    kinds = result["cases"]["breakdown"]["kinds"]
    whole = kinds["whole step"]["step_ms"]
    apart = ("attention", "moe layer", "output layer")  # none is inside another
    parts = [kinds[kind][f"{way}_ms"] for kind in apart for way in ("forward", "backward")]
    assert all(part > 0 for part in parts)
    assert sum(parts) + kinds["optimizer"]["step_ms"] <= whole
    for kind in apart:
        assert kinds[kind]["forward_calls"] == kinds[kind]["backward_calls"]


@pytest.mark.parametrize("text", ["random", "sample text"])
def test_balanced_routing_is_more_even_than_none(result, text):
    natural, balanced = (
        result["cases"][f"{text}, {routing}"]["expert_load"]["max"] for routing in ROUTINGS
    )
    assert 1 <= balanced < natural


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_ratio_is_of_our_speed_to_that_of_transformers(result, routing):
    ratio = result["tokens_per_s_over_transformers"][routing]
    if not find_spec("transformers"):
        assert ratio is None
        return
    speeds = [result["cases"][f"{who}random, {routing}"] for who in ("", "transformers, ")]
    assert ratio == pytest.approx(speeds[0]["tokens_per_s"] / speeds[1]["tokens_per_s"])


def test_what_was_not_measured_has_no_ratio(capsys):
    record = Record(None, {})
    check = gpu_check.Check(gpu_check._parse(["--device", "cpu"]), CPU, record)
    record.add("random, natural routing", {"tokens_per_s": 6.0})
    record.add("transformers, random, natural routing", {"tokens_per_s": 4.0})
    record.add("random, balanced routing", {"tokens_per_s": 6.0})
    record.add("transformers, random, balanced routing", {"failed": "no memory"})
    check.compare()
    ratios = record.result["tokens_per_s_over_transformers"]
    assert ratios == {"natural routing": 1.5, "balanced routing": None}
    shown = capsys.readouterr().err
    assert "transformers, random, natural routing: 1.500" in shown
    assert "transformers, random, balanced routing: not measured" in shown


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_routers_of_transformers_choose_evenly_and_then_as_before():
    from benchmarks import transformers_step

    recipe = scale_tiny(load_recipe("vaetki_7b_a1b")).recipe
    model = transformers_step.build(recipe.model, 64, CPU)
    experts = recipe.model.experts
    chosen = []
    [router, *_] = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    router.register_forward_hook(lambda *call: chosen.append(call[-1][-1]))
    tokens_BS = torch.full((4, 64), 7)  # all alike: naturally, all go the same way
    with torch.no_grad():
        model(tokens_BS)
        with transformers_step.balanced(model):
            model(tokens_BS)
        model(tokens_BS)
    before, balanced, after = (
        torch.bincount(chosen_TK.flatten(), minlength=experts.num_routed) for chosen_TK in chosen
    )
    assert before.count_nonzero() == experts.top_k
    # 256 tokens choose: a deviation is the square root of the mean, six are allowed.
    mean = 256 * experts.top_k / experts.num_routed
    assert (balanced - mean).abs().max() < 6 * mean**0.5
    assert torch.equal(after, before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_is_measured_or_its_absence_told(result, name):
    case = result["cases"][name]
    if find_spec("transformers"):
        assert case["experts_implementation"] == "grouped_mm"
        # The same matrices; norms, and biases of the router, differ.
        assert case["parameters"] == pytest.approx(result["parameters"], rel=1e-2)
    else:
        assert case == {"skipped": "transformers is not installed"}


def test_without_cuda_it_says_what_to_give(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    assert main(["--device", "cuda"]) == 2
    assert "give --device cpu --scale tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "told"),
    [("--recipe", "nope"), ("--attention", "--attention nope is not a kernel; give one of ")],
)
def test_a_mistake_is_told_in_one_line(capsys, flag, told):
    assert main(["--device", "cpu", "--scale", "tiny", flag, "nope"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_check: ")
    assert told in line


def test_layers_are_added_in_whole_periods_until_memory_is_full():
    recipe = load_recipe("vaetki_7b_a1b").recipe
    load = Load(sequences=8, micro_batch=1, warmup=1, count=1)
    assert layer_counts(recipe) == [6, 12, 18, 24]
    assert layers_that_fit(recipe, load, 10**13) == 24
    assert layers_that_fit(recipe, load, 0) == 6
    # All states of 7.25e9 parameters alone would take 130.5 GB.
    assert STATE_BYTES * recipe.published.total_params > 130e9
    assert layers_that_fit(recipe, load, 130 * 10**9) < 24


def test_every_case_leaves_a_whole_file(tmp_path):
    record = Record(tmp_path / "results" / "x.json", {"device": "cpu"})
    for count in (1, 2):
        record.add(f"case {count}", {"value": count})
        assert len(json.loads(record.path.read_text())["cases"]) == count
    assert [path.name for path in record.path.parent.iterdir()] == ["x.json"]


def test_cases_of_a_model_that_did_not_fit_are_set_aside():
    record = Record(None, {})
    for name in ("ceiling", "steps"):
        record.add(name, {"value": name})
    record.give_up({"layers": 24}, keep=("ceiling",))
    assert record.result == {
        "cases": {"ceiling": {"value": "ceiling"}},
        "out_of_memory": [{"layers": 24, "cases": {"steps": {"value": "steps"}}}],
    }


@pytest.mark.parametrize("failures", [1, 2])
def test_fewer_layers_are_tried_when_memory_runs_out(tmp_path, monkeypatch, failures):
    arguments = "--device cpu --recipe vaetki_7b_a1b --layers 24"
    check = gpu_check.Check(gpu_check._parse(arguments.split()), CPU, Record(None, {}))
    tried = []

    def cases(self, plan, folder):
        tried.append(plan.model.num_layers)
        if len(tried) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_check.Check, "_cases", cases)
    monkeypatch.setattr(megamoe_step, "world_of_one", lambda *_: nullcontext())
    assert check.megamoe(tmp_path) == [24, 18, 12][failures]
    assert tried == [24, 18, 12][: failures + 1]
    assert len(check.record.result["out_of_memory"]) == failures


def test_no_case_begins_after_the_time_limit():
    arguments = "--device cpu --scale tiny --time-limit 0"
    check = gpu_check.Check(gpu_check._parse(arguments.split()), CPU, Record(None, {}))
    check.case("late", lambda: {"value": 1})
    assert check.record.result["cases"] == {"late": {"skipped": "time limit of 0.0 s"}}


def test_a_case_that_fails_is_kept_and_does_not_end_the_others():
    def fail():
        raise ValueError("no such kernel\nand more")

    check = gpu_check.Check(gpu_check._parse(["--device", "cpu"]), CPU, Record(None, {}))
    check.case("bad", fail)
    assert check.record.result["cases"]["bad"]["failed"] == "ValueError: no such kernel"


def test_a_run_that_measured_no_step_of_ours_fails(monkeypatch, tmp_path):
    def fail(*_):
        raise ValueError("no such kernel")

    # The groups of this process are those that other tests have formed.
    monkeypatch.setattr(megamoe_step, "world_of_one", lambda plan, _: world_of_one(plan))
    path = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--scale", "tiny", "-o", str(path)]
    assert main([*arguments, "--time-limit", "0"]) == 1
    assert "skipped" in json.loads(path.read_text())["cases"][STEPS[0]]
    monkeypatch.setattr(megamoe_step, "measure", fail)
    monkeypatch.setattr(gpu_check, "find_spec", lambda _: None)  # it would only take time
    assert main(arguments) == 1
    assert "failed" in json.loads(path.read_text())["cases"][STEPS[0]]


def test_a_module_is_timed_in_both_directions_and_no_longer_than_it_is_watched():
    linear = torch.nn.Linear(4, 4)
    breakdown = Breakdown(CPU)
    x = torch.randn(2, 4, requires_grad=True)
    with breakdown.watch({"linear": [linear]}):
        linear(x).sum().backward()
    linear(x).sum().backward()
    [(kind, found)] = breakdown.milliseconds().items()
    assert kind == "linear"
    assert found["forward_calls"] == found["backward_calls"] == 1
    assert found["forward_ms"] > 0
    assert found["backward_ms"] > 0
