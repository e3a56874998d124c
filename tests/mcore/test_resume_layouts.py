"""Another group of processes of the same layout goes on bit for bit, whatever ranks share.

A float32 weight or a moment at a wrong place of a checkpoint (megamoe/mcore/states.py) shows nowhere
before a run goes on from it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
        ("k_exaone_236b_a23b", "pp3xE|tttt|mL"),  # ranks without an expert
        ("k_exaone_236b_a23b", "pp3xEttt|tm|L"),  # a table between the ends
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(recipe, layout, tmp_path):
    through, resumed = printed("resumed", tmp_path, recipe, layout)
    assert through["step"] == resumed["step"] == 2
    for name in through.keys() - OWN:
        assert resumed[name] == through[name], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layouts"),
    [
        ("vaetki_7b_a1b", ("pp3xE|tttt|L", "pp2", "one", "pp2xvpp2xEt|tt|t|L")),
        ("keural_14b", ("pp3xE|tttt|L", "pp2", "one")),
        ("k_exaone_236b_a23b", ("pp3xE|tttt|mL", "pp3xEttt|tm|L", "pp2", "one")),
        ("k_exaone_236b_a23b", ("one", "pp3xE|tttt|mL", "pp4xE|tttt|m|L")),
    ],
)
def test_a_checkpoint_of_one_pipeline_is_loaded_by_another_bit_for_bit(recipe, layouts, tmp_path):
    """Weights and optimizer, by saving again at once what was loaded; and the next step's loss."""
    found = printed("resharded", tmp_path, recipe, *layouts)
    assert [found[layout]["different"] for layout in layouts] == [[]] * len(layouts)
    first = found[layouts[0]]["result"]
    for layout in layouts[1:]:
        result = found[layout]["result"]
        assert result["step"] == first["step"] == 2
        for name in ("loss", "mtp_loss", "expert_load", "tokens_seen"):
            assert result[name] == first[name], (layout, name)


def printed(program: str, *arguments: object) -> Any:
    """Run a program of this folder; return what it prints."""
    on_the_processor = ("env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-W", "ignore")
    command = [*on_the_processor, "-m", f"tests.mcore.{program}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    return json.loads(done.stdout)
