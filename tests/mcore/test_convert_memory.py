"""A conversion needs memory for a file that it writes, not for the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_checkpoint_is_converted_in_a_fraction_of_its_size(tmp_path):
    command = [sys.executable, "-m", "tests.mcore.convert_large", tmp_path]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3_000:]
    measured = json.loads(child.stdout)
    assert measured["weights"] > 4 * measured["limit"]
    assert measured["whole_is_refused"]
    # Files of 8 MB, mapped once for each tensor that is joined, the copies of one, and torch.
    assert measured["grown"] < measured["limit"]
