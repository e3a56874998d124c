"""Ranks share the reading of checkpoints and text: what one finds is raised by all, in the same line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.checkpoints import folder as files
from tests.mcore.verified import CASES, WORLD_SIZE

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_damage_in_any_file_is_raised_on_both_ranks_in_the_same_line(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.verified", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)
    )
    assert first == second
    text = {gone: first.pop(gone) for gone in ("no text", "one.idx", "two.idx")}
    remedy = "is missing; restore it or plan again"
    assert text == {
        "no text": None,
        "one.idx": f"{tmp_path}/data/one.idx {remedy}",
        "two.idx": f"{tmp_path}/data/two.idx {remedy}",
    }
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
