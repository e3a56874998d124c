"""A conversion takes the memory that it says, for a file that it writes and not for the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.convert.memory import export_bytes, import_bytes
from tests.mcore.convert_large import SHARD_BYTES, WIDTH

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 100_000_000  # beyond what the process has when it begins to convert
NUM_WORDS = 49_152
TABLE_BYTES = NUM_WORDS * WIDTH * 4
# Layers, experts and their width, words, and the limit.
CASES = {
    "small": (2, 32, 512, 96, 0),
    "more layers": (5, 32, 512, 96, LIMIT_BYTES),
    "more tensors": (3, 384, 16, 96, 0),
    "larger tables": (2, 32, 512, NUM_WORDS, 0, "rounded"),
}
WAYS = ("export", "import")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what converting models took that differ in one way from the small one."""
    return {case: convert(tmp_path_factory.mktemp("large"), case) for case in CASES}


def convert(folder: Path, case: str) -> dict:
    command = [sys.executable, "-m", "tests.mcore.convert_large", folder, *map(str, CASES[case])]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3_000:]
    return json.loads(child.stdout)


@pytest.mark.slow
def test_a_checkpoint_is_converted_in_a_fraction_of_its_size(measured):
    large = measured["more layers"]
    assert large["weights"] > 4 * LIMIT_BYTES
    assert large["whole_is_refused"]
    # Files of 8 MB, mapped once for each tensor that is joined, the copies of one, and torch.
    assert max(large[way]["grown"] for way in WAYS) < LIMIT_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_memory_does_not_grow_with_the_layers(way, measured):
    small, large = measured["small"], measured["more layers"]
    more = large["weights"] - small["weights"]
    assert more > 300_000_000
    # What an allocator keeps varies by some files of 8 MB; layers kept would add all of `more`.
    assert large[way]["grown"] - small[way]["grown"] < more / 4


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_memory_grows_with_the_list_of_tensors_by_no_more_than_is_said(way, measured):
    small, large = measured["small"], measured["more tensors"]
    assert large["tensors"] - small["tensors"] > 2_200
    more = import_bytes(large["tensors"], 0) - import_bytes(small["tensors"], 0)
    # And by what an allocator happens to keep: two files.
    assert large[way]["grown"] - small[way]["grown"] < more + 2 * SHARD_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_takes_no_more_memory_than_it_says(case, measured):
    found = {way: measured[case][way] for way in (*WAYS, "rounded") if way in measured[case]}
    assert all(each["peak"] < each["said"] for each in found.values()), found


@pytest.mark.slow
def test_what_is_said_follows_from_the_largest_table_and_is_not_far_above(measured):
    found = measured["larger tables"]
    sizes, halves = (
        [size] + [0] * (found["tensors"] - 1) for size in (TABLE_BYTES, TABLE_BYTES // 2)
    )
    wanted = {
        "export": export_bytes(sizes, TABLE_BYTES, SHARD_BYTES),
        "rounded": export_bytes(halves, TABLE_BYTES * 3 // 2, SHARD_BYTES),
        "import": import_bytes(len(sizes), TABLE_BYTES),
    }
    for way, most in wanted.items():
        assert 0 <= found[way]["said"] - most < 1e8, way  # told in tenths of a GB
        assert found[way]["peak"] > most / 2, way
