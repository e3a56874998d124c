"""The mean of checkpoints is what float64 says, and a comparison finds every value that differs."""

import json
import math
from pathlib import Path

import pytest
import torch

from megamoe import __main__ as command
from megamoe.checkpoints import folder as files
from megamoe.checkpoints.tensors import kind_of, weight_of_master
from megamoe.convert.diff import differences, table
from megamoe.convert.merge import NOTE, merge
from megamoe.convert.ours import our_tensors, share_tensors
from megamoe.errors import CheckpointError
from megamoe.mcore.engine import Engine
from megamoe.mcore.stored import TensorReader
from megamoe.plan.json import write_plan
from megamoe.recipe import Bf16
from tests.mcore import tiny
from tests.mcore.test_convert_audit import random_tensors, write_run
from tests.mcore.world import world_of_one

NAME = "exaone_moe"
FLOAT32 = 2.0**-24  # half the distance of neighbours, relative


def quiet(_: str) -> None:
    pass


def latest(run: Path) -> Path:
    return files.latest(run / "checkpoints")


def trained(folder: Path, steps: int, **changes: object) -> Path:
    """Return a run folder with a checkpoint that the engine has written."""
    (folder / "run").mkdir(parents=True)
    plan = tiny.tiny_plan(folder / "data", tiny.GROUPED, **changes)
    write_plan(folder / "run" / "plan.json", plan)
    with world_of_one(plan):
        engine = Engine(plan, plan.segments[0], folder / "run")
        for _ in range(steps):
            engine.train_step()
        engine.save(wait=True)
    return folder / "run"


@pytest.fixture
def two(tmp_path):
    """Return two runs of one model with other weights, and the tensors of each."""
    tensors = [random_tensors(tiny.GROUPED) for _ in range(2)]
    for value in tensors[1].values():
        value.mul_(-0.7).add_(0.01)
    runs = [write_run(tmp_path / f"run{i}", NAME, tensors[i]) for i in range(2)]
    return runs, tensors


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.75), (1.0, 0.0), (1.5, -0.5)])
def test_the_mean_is_that_of_float64(shares, two, tmp_path):
    runs, (a, b) = two
    reader = TensorReader(merge(runs, tmp_path / "out", shares, say=quiet))
    assert reader.tensors.keys() == a.keys()
    for name in our_tensors(tiny.GROUPED):
        ours = reader.read(name).double()
        parts = [share * x[name].double() for share, x in zip(shares, (a, b), strict=True)]
        # Two products and a sum, each rounded once.
        bound = 2 * FLOAT32 * (parts[0].abs() + parts[1].abs())
        assert ((ours - parts[0] - parts[1]).abs() <= bound).all(), name


def test_what_was_merged_is_noted_and_the_new_run_stands_where_the_first_stood(two, tmp_path):
    runs, _ = two
    checkpoint = merge(runs, tmp_path / "out", (0.5, 0.5), say=quiet)
    assert latest(tmp_path / "out") == checkpoint
    assert files.read_progress(checkpoint) == files.read_progress(latest(runs[0]))
    assert (tmp_path / "out/plan.json").read_bytes() == (runs[0] / "plan.json").read_bytes()
    files.verify(checkpoint)
    note = json.loads((checkpoint / NOTE).read_bytes())
    assert [source["weight"] for source in note["sources"]] == [0.5, 0.5]
    assert {tensor["name"] for tensor in note["tensors"]} == our_tensors(tiny.GROUPED).keys()


@pytest.mark.slow
def test_a_run_goes_on_from_the_mean_of_a_checkpoint_with_itself(tmp_path):
    run = trained(tmp_path, 2)
    merge([run, run], tmp_path / "out", (0.5, 0.5), say=quiet)
    plan = tiny.tiny_plan(tmp_path / "data", tiny.GROUPED)
    with world_of_one(plan):
        expected = Engine(plan, plan.segments[0], run).train_step()
    with world_of_one(plan):
        merged = Engine(plan, plan.segments[0], tmp_path / "out")
        assert merged.step == 2
        assert merged.train_step().loss == pytest.approx(expected.loss, abs=1e-6)


@pytest.mark.slow
def test_bfloat16_weights_are_merged_from_their_float32_copies(tmp_path):
    runs = [trained(tmp_path / str(n), n, precision=Bf16()) for n in (1, 3)]
    checkpoint = merge(runs, tmp_path / "out", (0.5, 0.5), say=quiet)
    merged, sources = TensorReader(checkpoint), [TensorReader(latest(run)) for run in runs]
    rounded_twice = 0
    for master in sources[0].tensors:
        if (name := weight_of_master(master)) is None:
            continue
        mean = sum(source.read(master).double() for source in sources) / 2
        assert merged.tensors[name].dtype == torch.bfloat16
        assert torch.equal(merged.read(name), mean.float().to(torch.bfloat16)), name
        of_rounded = sum(source.read(name).double() for source in sources) / 2
        rounded_twice += int((of_rounded.to(torch.bfloat16) != merged.read(name)).sum())
    assert rounded_twice > 0  # the other way would have been seen


def test_another_model_is_refused_with_what_differs(two, tmp_path):
    runs, _ = two
    other = write_run(tmp_path / "other", "vaetki", random_tensors(tiny.LATENT))
    with pytest.raises(CheckpointError, match=r"is of another model than .*: attention is MLA"):
        merge([runs[0], other], tmp_path / "out", (0.5, 0.5), say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "0.5,0.4"], "--weights sum to 0.9; give numbers that sum to 1"),
        (["--weights", "1"], "--weights has 1 numbers for 2 checkpoints; give one for each"),
        (
            ["--weights", "0.5,half"],
            "--weights '0.5,half' are no numbers; give for example 0.5,0.5",
        ),
        (["--weights", "inf,0"], "--weights sum to inf; give numbers that sum to 1"),
    ],
)
def test_shares_that_are_none_are_refused(words, message, two, tmp_path, capsys):
    runs, _ = two
    arguments = ["checkpoint", "merge", *map(str, runs), "--out", str(tmp_path / "out"), *words]
    assert command.main(arguments) == command.EXIT_MISTAKE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_overflow_leaves_nothing_and_is_named(tmp_path):
    tensors = random_tensors(tiny.GROUPED)
    tensors["decoder.final_layernorm.weight"].fill_(3e38)
    runs = [write_run(tmp_path / f"run{i}", NAME, tensors) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"decoder.final_layernorm.weight holds 32 values"):
        merge(runs, tmp_path / "out", (3.0, -2.0), say=quiet)
    assert latest(tmp_path / "out") is None
    assert not list((tmp_path / "out").glob("checkpoints/.*partial"))


def test_an_existing_folder_is_refused(two, tmp_path):
    runs, _ = two
    with pytest.raises(CheckpointError, match="exists already"):
        merge(runs, runs[0], (0.5, 0.5), say=quiet)


@pytest.mark.parametrize("given", ["run", "checkpoint", "here"])
def test_without_a_folder_the_mean_lies_beside_the_first_run(given, two, capsys, monkeypatch):
    runs, _ = two
    first = latest(runs[0]) if given == "checkpoint" else runs[0]
    if given == "here":
        monkeypatch.chdir(runs[0])
        first = Path()
    arguments = ["checkpoint", "merge", str(first), str(runs[1])]
    assert command.main(arguments) == 0
    out = runs[0].with_name("run0-merged")
    assert capsys.readouterr().out == f"{latest(out)}\n"
    note = json.loads((latest(out) / NOTE).read_bytes())
    assert [source["weight"] for source in note["sources"]] == [0.5, 0.5]
    assert command.main(arguments) == command.EXIT_MISTAKE
    message = f"{out}: exists already; give another folder (--out), or remove it"
    assert message in capsys.readouterr().err


def test_a_checkpoint_does_not_differ_from_itself(two, capsys):
    runs, _ = two
    assert command.main(["checkpoint", "diff", str(runs[0]), str(latest(runs[0]))]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.rsplit(maxsplit=4) for line in lines[3:]]
    shares, weights = (str(len(f(tiny.GROUPED))) for f in (share_tensors, our_tensors))
    assert rows == [
        ["expert shares", shares, shares, "0", "0"],
        ["weights", weights, weights, "0", "0"],
    ]


EXPERT = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


def test_one_value_of_one_expert_is_found_and_measured(tmp_path, capsys):
    tensors = random_tensors(tiny.GROUPED)
    a = write_run(tmp_path / "a", NAME, tensors)
    tensors[EXPERT][5, 3, 2] += 0.5
    b = write_run(tmp_path / "b", NAME, tensors)
    assert command.main(["checkpoint", "diff", str(a), str(b)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{EXPERT}  1 values, max |A-B| 0.5")
    found = {x.name: x for x in differences(TensorReader(latest(a)), TensorReader(latest(b)))}
    assert [name for name, one in found.items() if not one.is_equal] == [EXPERT]
    whole = tensors[EXPERT].double()
    whole[5, 3, 2] -= 0.5
    # 0.5 is exact, but what it is added to is rounded.
    assert found[EXPERT].relative == pytest.approx(0.5 / float(whole.norm()), rel=1e-6)


def test_bits_are_compared_not_values(tmp_path):
    tensors = random_tensors(tiny.GROUPED)
    name = "decoder.final_layernorm.weight"
    tensors[name][:3] = torch.tensor([0.0, math.nan, math.inf])
    a = write_run(tmp_path / "a", NAME, tensors)
    tensors[name][0] = -0.0
    b = write_run(tmp_path / "b", NAME, tensors)
    found = {x.name: x for x in differences(TensorReader(latest(a)), TensorReader(latest(b)))}
    assert (found[name].num_different, found[name].largest) == (1, 0.0)
    tensors[name][2] = math.nan
    c = write_run(tmp_path / "c", NAME, tensors)
    found = {x.name: x for x in differences(TensorReader(latest(b)), TensorReader(latest(c)))}
    assert (found[name].num_different, found[name].largest) == (1, math.inf)


def test_missing_and_misshaped_tensors_are_named(tmp_path):
    tensors = random_tensors(tiny.GROUPED)
    a = write_run(tmp_path / "a", NAME, tensors)
    del tensors["output_layer.weight"]
    tensors["decoder.final_layernorm.weight"] = torch.ones(5)
    b = write_run(tmp_path / "b", NAME, tensors)
    found = list(differences(TensorReader(latest(a)), TensorReader(latest(b))))
    lines = list(table(found, every=False))
    assert lines[-2:] == [
        "decoder.final_layernorm.weight  float32 [32] in A, float32 [5] in B",
        "output_layer.weight  only in A",
    ]


@pytest.mark.slow
def test_two_steps_change_weights_and_moments_of_a_run(tmp_path, capsys):
    runs = [trained(tmp_path / str(n), n) for n in (1, 3)]
    assert command.main(["checkpoint", "diff", *map(str, runs)]) == 1
    rows = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"weights", "optimizer exp_avg", "optimizer exp_avg_sq"} <= rows


def test_kinds_of_tensors():
    assert kind_of("decoder.final_layernorm.weight") == "weights"
    assert kind_of("optimizer.state.exp_avg.decoder.x") == "optimizer exp_avg"
    assert kind_of("random.torch") == "random state"
    assert kind_of("decoder.layers.1.mlp.router.previous_shares_E") == "expert shares"
    assert weight_of_master("optimizer.state.param.decoder.x") == "decoder.x"
    assert weight_of_master("decoder.x") is None
