"""A rank whose training fails: what it was writing then is finished, and recorded."""

import subprocess
import sys

import pytest

from megamoe.checkpoints import folder as files
from megamoe.plan.json import write_plan
from megamoe.recipe import LearningRate
from megamoe.train.metrics import read_records
from tests.mcore import tiny

ONE_RANK = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@pytest.mark.slow
def test_a_save_that_is_being_written_when_training_fails_is_recorded(tmp_path, monkeypatch):
    for name, value in ONE_RANK.items():
        monkeypatch.setenv(name, value)
    # The second step has no finite gradient.
    too_high = LearningRate(peak=1e30, final=None, warmup_tokens=0, decay_tokens=0, decay="linear")
    plan = tiny.tiny_plan(tmp_path / "data", lr=too_high, checkpoint_every=1)
    write_plan(tmp_path / "plan.json", plan)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megamoe", "train", str(tmp_path), "--segment", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: step 2 (256 tokens): loss " in done.stderr
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [(record["kind"], record["step"]) for record in records] == [("step", 1), ("save", 1)]
    assert "error" not in records[1]
    assert "step 1/4  checkpoint: " in done.stdout
    newest = files.latest(tmp_path / "checkpoints")
    assert newest is not None
    files.verify(newest)
