"""The processes of `megamoe parity`: on a GPU, and what is said when they fail."""

import json
import signal
import subprocess
import sys

import pytest

from megamoe import __main__ as command
from megamoe.errors import LaunchError
from megamoe.parity import ranks
from megamoe.parity.layouts import parse_layouts
from megamoe.parity.small import MICRO_BATCH, plan_of, small_recipe
from tests.mcore.test_resume_layouts import OWN, printed


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2xep2xetp2xall_gather", "cp2xring", "pp3xEtt|ttm|L"])
def test_ranks_that_share_a_gpu_get_the_numbers_of_ranks_over_gloo(tmp_path, layout):
    """There is none here: processes of their own, and every message through copies, to the bit."""
    ours, theirs = printed("shared_gpu", tmp_path, "k_exaone_236b_a23b", layout)
    assert len(ours) == len(theirs) == 2
    for step, expected in zip(ours, theirs, strict=True):
        assert step["unequal_copies"] == []
        for name in expected.keys() - OWN:
            assert step[name] == expected[name], name


def test_a_plan_for_a_processor_wants_no_gpu(tmp_path, monkeypatch):
    [grid] = parse_layouts("dp2", MICRO_BATCH)
    monkeypatch.setattr(ranks.cpu, "is_needed", lambda: False)
    with pytest.raises(LaunchError, match="here is a GPU; hide it: CUDA_VISIBLE_DEVICES=''"):
        ranks.train(plan_of(small_recipe("keural_14b"), grid, seed=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "layouts"),
    [
        ("vaetki_7b_a1b", "dp2,tp2,cp4xring,tp2xcp2xep2"),
        ("k_exaone_236b_a23b", "pp2,cp2,ep2xpp2,pp3xEtt|ttm|L"),
        ("keural_14b", "tp2xcp2,pp2xvpp2"),
        ("ax_k1_519b_a33b", "tp2xep2xetp2"),
    ],
)
def test_layouts_on_a_gpu_train_the_model_of_one_process(recipe, layouts, tmp_path):
    file = tmp_path / "parity.json"
    command_line = ["parity", recipe, "--layouts", layouts, "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", *command_line],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "which all processes share" in done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["is_equal"] for row in rows] == [True] * len(layouts.split(","))


def test_a_rank_that_fails_is_named_with_its_error(tmp_path):
    (tmp_path / "error.txt").write_text("rank 3: Traceback:\n  File x\nValueError: no\n")
    assert ranks._problem(tmp_path, 1) == "rank 3: ValueError: no"


def test_a_rank_that_was_killed_is_said_to_be(tmp_path):
    assert ranks._problem(tmp_path, -signal.SIGKILL) == "a rank was ended by signal 9"


def test_a_rank_that_never_began_is_said_to_be(tmp_path):
    said = "a rank ended with status 1 before it began; see what it printed above"
    assert ranks._problem(tmp_path, 1) == said


def test_a_folder_for_the_numbers_must_be_there_before_anything_starts(tmp_path, capsys):
    file = tmp_path / "none" / "parity.json"
    assert command.main(["parity", "keural_14b", "--json", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"megamoe: error: --json: {file}: there is no such folder; make it first\n"
    )


@pytest.mark.parametrize(
    ("name", "problem"), [("folder", "Is a directory"), ("x" * 300, "File name too long")]
)
def test_a_result_that_could_not_be_written_is_refused_first(tmp_path, capsys, name, problem):
    (tmp_path / "folder").mkdir()
    file = tmp_path / name
    assert command.main(["parity", "keural_14b", "--json", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"megamoe: error: --json: {file}: {problem}; give a file to write\n"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
