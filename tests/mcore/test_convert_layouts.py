"""A checkpoint is exported alike whatever the layout of the ranks that wrote it, and imported exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.checkpoints import folder as files
from megamoe.convert.from_hf import from_hf
from megamoe.convert.ours import EXPERTS
from megamoe.convert.to_hf import to_hf
from megamoe.mcore import checkpoint
from megamoe.mcore.engine import Engine
from megamoe.mcore.stored import ShardReader
from megamoe.plan.json import write_plan
from tests.mcore.converted import saved
from tests.mcore.layouts import ONE, imported_dir_of, in_bfloat16, plan_of, run_dir_of
from tests.mcore.test_parity import results_of
from tests.mcore.world import world_of_one

REPOSITORY = Path(__file__).parents[2]
# K-EXAONE's kind of model with its prediction layer, A.X-K1's on an uneven pipeline, VAETKI's with its
# norms after each branch, and Keural's, whose one table both ends of a pipeline have.
CASES = [
    ("grouped", "tp2"),
    ("grouped", "ep2"),
    ("grouped", "tp2 etp2"),
    ("grouped", "pp2 vpp2"),
    ("dual", "tp2"),
    ("dual", "pp2"),
    ("latent", "cp2 heads"),
    ("softmax", "pp2"),
]
IMPORTED = [("grouped", "dp2"), ("softmax", "pp2")]  # float32 into bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the layouts have left their checkpoints."""
    folder = tmp_path_factory.mktemp("converted")
    for model, _ in IMPORTED:
        write_import(folder, model)
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.layouts", str(folder)]
    command += [f"{model}/{layout}" for model, layout in CASES]
    command += [f"{model}/{layout}/imported" for model, layout in IMPORTED]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def write_import(folder: Path, model: str) -> None:
    """Make a run of a folder in float32, FOLDER/<model>/hf, whose weights are of no other type."""
    plan = plan_of(folder, model, ONE)
    for name, its_plan in (("one", plan), ("imported", in_bfloat16(plan))):
        (folder / model / name).mkdir()
        write_plan(folder / model / name / "plan.json", its_plan)
    with world_of_one(plan):
        saved(plan, folder / model / "one")
    out = folder / model / "hf"
    exported(folder / model / "one", out)
    from_hf(out, folder / model / "imported", tokens_seen=0, say=lambda _: None)


def exported(run_dir: Path, out: Path, dtype: str | None = None) -> dict[str, tuple[str, str]]:
    """Return dtype and SHA-256 of each tensor that a run becomes."""
    to_hf(run_dir, out, dtype=dtype, shard_bytes=1 << 30, say=lambda _: None)
    return tensors_of(out)


def tensors_of(out: Path) -> dict[str, tuple[str, str]]:
    """Return dtype and SHA-256 of each tensor of an exported folder."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), IMPORTED)
def test_rounded_weights_keep_the_float32_values_of_a_folder_in_any_layout(
    model, layout, folder, tmp_path
):
    run_dir = imported_dir_of(folder, model, layout)
    assert not (run_dir / "error.txt").exists(), (run_dir / "error.txt").read_text()
    write_plan(run_dir / "plan.json", in_bfloat16(plan_of(folder, model, layout)))
    given = tensors_of(folder / model / "hf")
    assert exported(run_dir, tmp_path / "exact", "float32") == given
    rounded = exported(run_dir, tmp_path / "rounded")
    assert {dtype for name, (dtype, _) in rounded.items() if "bias" not in name} == {"bfloat16"}
