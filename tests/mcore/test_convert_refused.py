"""What the system refuses during a conversion or a merge is one line, and leaves nothing."""

import shutil

import pytest
import torch

from megamoe import __main__ as command
from megamoe.checkpoints import folder as files
from megamoe.convert import to_hf as exporting
from megamoe.mcore.stored import TensorWriter
from megamoe.plan.json import read_plan
from tests.mcore.converted import MODELS
from tests.mcore.test_convert_audit import NAME, exported, random_tensors, write_run
from tests.mcore.test_convert_tokenizer import data_with
from tests.unit.disks import SIZE, tmpfs

ROOM = 60_000  # bytes; the tiny models have some 200,000 bytes of weights


def refused(capsys, *words: object) -> str:
    """Return the one line that a command says of a mistake."""
    capsys.readouterr()
    assert command.main([str(word) for word in words]) == command.EXIT_MISTAKE
    said = capsys.readouterr()
    mistake = said.err.splitlines()[-1]
    assert mistake.startswith("megamoe: error: ")
    assert ("Traceback" in said.err, said.out) == (False, "")
    return mistake


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", NAME, random_tensors(MODELS[NAME]))


@pytest.mark.parametrize("name", ["to-hf", "merge"])
def test_a_place_that_cannot_be_made_is_named(name, run, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("no folder")
    if name == "to-hf":
        mistake = refused(capsys, "convert", "to-hf", run, file / "out")
    else:
        mistake = refused(capsys, "checkpoint", "merge", run, run, "--out", file / "out")
    assert f"{file}/" in mistake
    assert mistake.endswith("Not a directory; nothing was kept; mend that, or give another place")


def test_a_full_disk_ends_a_conversion_or_a_merge_in_one_line(run, tmp_path, capsys):
    folder = exported(tmp_path / "other")
    full = tmp_path / "full"
    with tmpfs(full):
        (full / "ballast").write_bytes(bytes(SIZE - ROOM))
        again = full / "again"
        again.mkdir()
        shutil.copyfile(run / "plan.json", again / "plan.json")
        for words, left in (
            (("convert", "to-hf", run, full / "out"), []),
            (("checkpoint", "merge", run, run, "--out", full / "merged"), []),
            (("convert", "from-hf", folder, again), ["latest"]),
        ):
            mistake = refused(capsys, *words)
            assert "No space left on device" in mistake
            assert str(full) in mistake
            assert sorted(path.name for path in full.iterdir()) == ["again", "ballast"]
            checkpoints = again / "checkpoints"
            found = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
            assert found == left
        assert files.latest(again / "checkpoints") is None


def test_a_disk_that_fills_up_within_a_tensor_is_what_is_told(tmp_path):
    """torch alone would tell of positions in the file."""
    with tmpfs(tmp_path / "full"):
        (tmp_path / "full" / "ballast").write_bytes(bytes(SIZE - ROOM))
        writer = TensorWriter(tmp_path / "full")
        with pytest.raises(OSError, match="No space left on device"), writer:
            writer.write("x", torch.ones(1 << 20))


def test_an_error_that_names_no_file_is_said_of_the_folder(run, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    out = tmp_path / "out"
    mistake = refused(capsys, "convert", "to-hf", run, out)
    assert mistake.startswith(f"megamoe: error: {out}: No space left on device; nothing was kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_tokenizer_that_is_gone_is_told_before_anything_is_read(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", NAME, random_tensors(MODELS[NAME]))
    data = data_with(run / "data", "byte-level-bpe")
    plan = read_plan(run / "plan.json")
    assert data.folder == plan.data.folder
    (run / "data" / "tokenizer" / "tokenizer.json").unlink()
    monkeypatch.setattr(exporting, "TensorReader", None)
    mistake = refused(capsys, "convert", "to-hf", run, tmp_path / "out")
    assert mistake.endswith(
        "data/tokenizer/tokenizer.json: is missing, tokenizer_meta.json names it; restore it"
    )
    assert not (tmp_path / "out").exists()
