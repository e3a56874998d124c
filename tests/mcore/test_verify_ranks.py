"""Ranks share the reading of a checkpoint and of text: what one finds is raised by all, in the same line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.checkpoints import folder as files
from tests.mcore.verified import CASES, TEXT_CASES, WORLD_SIZE

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Return the folder, and what each rank was told."""
    folder = tmp_path_factory.mktemp("verified")
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.verified", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    return folder, [
        json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)
    ]


@pytest.mark.slow
def test_each_index_is_hashed_by_one_rank_and_the_first_that_is_wrong_named_by_both(told):
    folder, answers = told
    first, second = (answer["texts"] for answer in answers)
    assert first == second
    problems = {
        "sound": None,
        "first": "s0.idx changed since the plan was made",
        "middle": "s1.idx changed since the plan was made",
        "last two": "s1.idx changed since the plan was made",
        "last, and one that is missing": "s1.bin is missing",
    }
    assert problems.keys() == TEXT_CASES.keys()
    for case, problem in problems.items():
        line = f"{folder / 'text' / case}/{problem}; restore it or plan again"
        assert first[case] == (None if problem is None else line)
    assert [answer["hashed"] for answer in answers] == [["s0", "s2"], ["s1"]]


@pytest.mark.slow
def test_damage_in_any_file_is_raised_on_both_ranks_in_the_same_line(told):
    tmp_path, answers = told
    first, second = (answer["checkpoints"] for answer in answers)
    assert first == second
    assert first.keys() == CASES.keys()
    assert first["sound"] is None
    problems = {
        "rank 0": "__0_0.distcp: is damaged, its SHA-256 is another (written by rank 0)",
        "rank 1": "__1_0.distcp: is damaged, its SHA-256 is another (written by rank 1)",
        "rank 1, another": "tensors.json: is damaged, its SHA-256 is another (written by rank 0)",
        "both": "__0_0.distcp: is damaged, its SHA-256 is another (written by rank 0)",
        "manifest": "manifest.json: is damaged (written by rank 0)",
    }
    for case, problem in problems.items():
        folder = tmp_path / case / "checkpoints"
        assert first[case] == f"{folder / files.name_of(64)}/{problem}{files.remedy(folder)}"
