"""A conversion needs memory for a file that it writes, not for the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what converting a model of 2 layers and one of 5 took."""
    return {n: convert(tmp_path_factory.mktemp("large"), n) for n in (2, 5)}


def convert(folder: Path, num_layers: int) -> dict:
    command = [sys.executable, "-m", "tests.mcore.convert_large", folder, str(num_layers)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3_000:]
    return json.loads(child.stdout)


@pytest.mark.slow
def test_a_checkpoint_is_converted_in_a_fraction_of_its_size(measured):
    large = measured[5]
    assert large["weights"] > 4 * large["limit"]
    assert large["whole_is_refused"]
    # Files of 8 MB, mapped once for each tensor that is joined, the copies of one, and torch.
    assert large["grown"] < large["limit"]


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_layers(measured):
    more = measured[5]["weights"] - measured[2]["weights"]
    assert more > 300_000_000
    # What an allocator keeps varies by some files of 8 MB; layers kept would add all of `more`.
    assert measured[5]["grown"] - measured[2]["grown"] < more / 4
