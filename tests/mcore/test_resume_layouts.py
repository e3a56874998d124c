"""Another group of processes of the same layout goes on bit for bit, whatever ranks share.

Megatron-core writes a wrong float32 weight and wrong moments of a table that pipeline ranks share
(megamoe/mcore/optim.py, `_mend_gathered_state`): nothing else notices before a run goes on from them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OWN = {"seconds", "memory_bytes"}  # of each process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("ax_k1_519b_a33b", "pp2xvpp2"),  # a table that two ranks share, for MTP
        ("keural_14b", "pp2"),  # and one that is tied
        ("k_exaone_236b_a23b", "tp2xcp2xep2"),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(recipe, layout, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.resumed", tmp_path]
    done = subprocess.run(
        [*command, recipe, layout], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    through, resumed = json.loads(done.stdout)
    assert through["step"] == resumed["step"] == 2
    for name in through.keys() - OWN:
        assert resumed[name] == through[name], name
