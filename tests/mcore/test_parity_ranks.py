"""What `megamoe parity` says when its processes cannot be started, or fail."""

import re
import signal

import pytest

from megamoe import __main__ as command
from megamoe.errors import LaunchError
from megamoe.parity import ranks
from megamoe.parity.layouts import one_process
from megamoe.parity.small import MICRO_BATCH, plan_of, small_recipe


def test_a_machine_with_a_gpu_is_told_how_to_hide_it(tmp_path, monkeypatch):
    plan = plan_of(small_recipe("keural_14b"), one_process(MICRO_BATCH), seed=0)
    monkeypatch.setattr(ranks.cpu, "is_needed", lambda: False)
    with pytest.raises(LaunchError, match=re.escape("give CUDA_VISIBLE_DEVICES=''")):
        ranks.train(plan, tmp_path / "run")


def test_a_rank_that_fails_is_named_with_its_error(tmp_path):
    (tmp_path / "error.txt").write_text("rank 3: Traceback:\n  File x\nValueError: no\n")
    assert ranks._problem(tmp_path, 1 << 8) == "rank 3: ValueError: no"


def test_a_rank_that_was_killed_is_said_to_be(tmp_path):
    assert ranks._problem(tmp_path, signal.SIGKILL) == "a rank was ended by signal 9"


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
