"""A checkpoint is exported alike whatever the layout of the ranks that wrote it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.checkpoints import folder as files
from megamoe.convert.ours import EXPERTS
from megamoe.convert.to_hf import to_hf
from megamoe.mcore import checkpoint
from megamoe.mcore.engine import Engine
from megamoe.mcore.stored import ShardReader
from megamoe.plan.json import write_plan
from tests.mcore.layouts import ONE, plan_of, run_dir_of
from tests.mcore.test_parity import results_of
from tests.mcore.world import world_of_one

REPOSITORY = Path(__file__).parents[2]
# K-EXAONE's kind of model with its prediction layer, and A.X-K1's on an uneven pipeline.
CASES = [
    ("grouped", "tp2"),
    ("grouped", "ep2"),
    ("grouped", "pp2 vpp2"),
    ("dual", "tp2"),
    ("dual", "pp2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the layouts have left their checkpoints."""
    folder = tmp_path_factory.mktemp("converted")
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.layouts", str(folder)]
    command += [f"{model}/{layout}" for model, layout in CASES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def exported(run_dir: Path, out: Path) -> dict[str, tuple[str, str]]:
    """Return dtype and SHA-256 of each tensor that a run becomes."""
    to_hf(run_dir, out, dtype=None, shard_bytes=1 << 30, say=lambda _: None)
    pairs = json.loads((out / "audit.json").read_text())["tensors"]
    return {
        part["name"]: (part["dtype"], part["sha256"]) for pair in pairs for part in pair["theirs"]
    }


def largest_chunk_of_experts(checkpoint: Path) -> int:
    """Return how many experts a stored part of a tensor holds at most: it is read as a whole."""
    metadata = ShardReader(checkpoint).read_metadata()
    return max(
        chunk.sizes[0]
        for name, tensor in metadata.state_dict_metadata.items()
        if EXPERTS in name
        for chunk in tensor.chunks
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_checkpoint_of_any_layout_becomes_the_folder_of_one_process(
    model, layout, folder, tmp_path
):
    results_of(folder, model, layout)
    run_dir = run_dir_of(folder, model, layout)
    plan = plan_of(folder, model, layout)
    write_plan(run_dir / "plan.json", plan)
    whole = plan_of(folder, model, ONE)
    (tmp_path / "run").mkdir()
    write_plan(tmp_path / "run/plan.json", whole)
    with world_of_one(whole):
        engine = Engine(whole, whole.segments[0], tmp_path / "run")
        latest = files.latest(run_dir / "checkpoints")
        checkpoint.load(latest, engine.chunks, engine.optimizer, same_layout=False)
        engine.save(wait=True)
    assert largest_chunk_of_experts(latest) == 1
    of_one = exported(tmp_path / "run", tmp_path / "one")
    assert exported(run_dir, tmp_path / "many") == of_one
    assert any(name.startswith("mtp.") for name in of_one) == (model == "grouped")
