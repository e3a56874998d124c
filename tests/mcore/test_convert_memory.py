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
    assert measured["weights"] > 300_000_000
    # A file of 16 MB, the copies that are made of it, its page cache, and torch.
    assert measured["grown"] < 100_000_000
