"""The published recipe at tiny scale, through the command a user would type."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from megamoe.checkpoints.folder import latest
from megamoe.checkpoints.tensors import kind_of
from megamoe.train.metrics import Record, read_records

# A curriculum of a few steps a stage; the rest is what `--scale tiny` makes of the recipe.
_SHORT = (
    "general.tokens=8_192",
    "general.batch_ramp=((0, 8), (4_096, 16))",
    "general.lr.warmup_tokens=2_048",
    "reasoning.tokens=8_192",
    "reasoning.batch_ramp=((0, 16),)",
    "reasoning.lr.decay_tokens=8_192",
    "reasoning.layout.micro_batch=4",
    "long_context.tokens=8_192",
    "long_context.lr.decay_tokens=8_192",
    "long_context.batch_ramp=((0, 4),)",
)


def _megamoe(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus, prepared with the commands of the documentation."""
    folder = tmp_path_factory.mktemp("sample")
    _megamoe("data", "sample", str(folder / "text"))
    _megamoe(
        "data", "tokenizer", "train", "--algorithm", "sentencepiece-bpe", "--vocab-size", "4096",
        "-o", str(folder / "tokenizer"), str(folder / "text"),
    )  # fmt: skip
    for source in ("korean", "english", "code"):
        _megamoe(
            "data", "tokenize", "--tokenizer", str(folder / "tokenizer"), "--source", source,
            "-o", str(folder / "data"), "--heldout", "0.03", "--fim",
            str(folder / "text" / f"{source}.jsonl.zst"),
        )  # fmt: skip
    return folder / "data"


def _run(run_dir: Path, data: Path, num_processes: int, *changes: str) -> list[Record]:
    sets = [word for change in (*_SHORT, *changes) for word in ("--set", change)]
    _megamoe(
        "run", "vaetki_7b_a1b", "--scale", "tiny", "--nproc", str(num_processes),
        "--data", str(data), "--run-dir", str(run_dir), "--eval-every", "1000", *sets,
    )  # fmt: skip
    return [r for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == "step"]


def _losses(records: list[Record]) -> list[float]:
    return [float(record["loss_nats_per_token"]) for record in records]


@pytest.mark.slow
def test_two_data_parallel_processes_train_the_model_of_one(
    tmp_path: Path, sample_data: Path
) -> None:
    one = _losses(_run(tmp_path / "one", sample_data, 1))
    two = _losses(_run(tmp_path / "two", sample_data, 2))
    assert len(one) == len(two) > 10
    assert two == pytest.approx(one, rel=1e-6, abs=0)
    _each_rank_wrote_its_half_of_the_optimizer(latest(tmp_path / "two" / "checkpoints"))


def _each_rank_wrote_its_half_of_the_optimizer(checkpoint: Path | None) -> None:
    assert checkpoint is not None
    tensors = json.loads((checkpoint / "tensors.json").read_text())
    states = sum(
        4 * prod(shape)
        for name, (_, shape) in tensors.items()
        if kind_of(name).startswith("optimizer ")
    )
    sizes = [(checkpoint / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    # Halves but for the padding of buckets. torch.save adds 1.2 KB to a tensor; the first rank has the
    # weights, too.
    assert 0.49 * states < sizes[1] < states / 2 + 2_000 * len(tensors)
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_the_loss_goes_on_when_the_layout_changes_between_stages(
    tmp_path: Path, sample_data: Path
) -> None:
    ep = ("general.layout.ep=2", "reasoning.layout.ep=2")
    changed = _run(tmp_path / "changed", sample_data, 2, *ep, "long_context.layout.pp=2")
    kept = _run(tmp_path / "kept", sample_data, 2, *ep, "long_context.layout.ep=2")
    before = [r["loss_nats_per_token"] for r in changed if r["stage"] != "long_context"]
    assert before == [r["loss_nats_per_token"] for r in kept if r["stage"] != "long_context"]
    first = [next(r for r in run if r["stage"] == "long_context") for run in (changed, kept)]
    assert first[0]["loss_nats_per_token"] == pytest.approx(
        first[1]["loss_nats_per_token"], rel=1e-5
    )
    report = json.loads((tmp_path / "changed" / "plan.json").read_text())
    layouts = [segment["layout"] for segment in report["segments"]]
    assert (layouts[0]["ep"], layouts[2]["pp"]) == (2, 2)
