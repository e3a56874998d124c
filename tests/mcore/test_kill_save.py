"""kill -9 at thirty moments around saves: a sound checkpoint is always there, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mcore.killed import NUM_STEPS, POINTS, cases

REPOSITORY = Path(__file__).parents[2]
CASES = cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every case has left its results."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.killed", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _ranks(folder, world_size):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def test_every_moment_is_among_the_cases():
    assert len(CASES) == 30
    assert {case.point for case in CASES} == POINTS.keys()
    assert {case.world_size for case in CASES} == {1, 2}
    either = [case.rank for case in CASES if case.world_size == len(POINTS[case.point].most) == 2]
    assert either == [1, 0, 1, 0]


@pytest.mark.slow
def test_every_case_was_killed_in_its_save(folder):
    """A moment drawn beyond the calls of a save would come in a later one, or never."""
    results = {
        case.name: json.loads((folder / case.name / "result.json").read_text()) for case in CASES
    }
    died = {name: result["died_in_save"] for name, result in results.items()}
    assert died == {case.name: case.save for case in CASES}
    assert len(died) == 30


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_killed_at_a_moment_of_a_save(folder, case):
    run = folder / case.name
    errors = [path.read_text() for path in run.glob("error*.txt")]
    result = json.loads((run / "result.json").read_text())
    # Before the first save has ended there may be no checkpoint, and then none is named.
    assert result["latest_is_sound"] is True or (case.save == 1 and result["latest"] is None), (
        result
    )
    assert result["sound"] == result["there"], result  # what has a name is whole
    assert result["sound"] >= 1 or case.save == 1, result
    assert result["continued"], errors
    whole = _ranks(folder / f"whole{case.world_size}", case.world_size)
    for rank, continued in enumerate(_ranks(run, case.world_size)):
        assert continued["digest"] == whole[rank]["digest"]
        expected = whole[rank]["losses"]
        assert continued["losses"] == {step: expected[step] for step in continued["losses"]}
        done_before = int(result["latest"] or 0) // 128
        assert len(continued["losses"]) == NUM_STEPS - done_before
