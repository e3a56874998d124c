"""What a save keeps, sets aside and removes beside its own checkpoint, whatever the system refuses."""

import errno
import os

import pytest

from megamoe.checkpoints import folder as files
from megamoe.errors import CheckpointError
from tests.unit.saved import names, progress, save, three


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of a run."""
    return three(tmp_path / "run")


def test_the_newest_are_kept(folder):
    save(folder, progress(256), keep=2)
    assert names(folder) == ["000000000000192", "000000000000256", "latest"]


def test_after_going_back_the_newest_of_the_new_line_are_kept_and_the_old_one_is_set_aside(folder):
    (folder / "latest").write_text("000000000000064\n")
    left = ["000000000000128.abandoned", "000000000000192.abandoned"]
    kept = {96: [64, 96], 112: [96, 112], 256: [112, 256]}
    for tokens, line in kept.items():
        saved = save(folder, progress(tokens), keep=2)
        assert files.latest(folder) == saved
        assert names(folder) == sorted([*map(files.name_of, line), *left, "latest"])
    (saved / "__0_0.distcp").unlink()
    assert files.fall_back(folder)[0] == folder / "000000000000112"


def test_a_save_replaces_its_own_name_of_the_line_that_was_left(folder):
    (folder / "latest").write_text("000000000000064\n")
    saved = save(folder, progress(128, step=7))
    assert files.read_progress(saved).step == 7
    assert names(folder) == [
        "000000000000064", "000000000000128", "000000000000192.abandoned", "latest"
    ]  # fmt: skip


def test_a_second_line_that_is_left_does_not_replace_the_first(folder):
    for _ in range(2):
        save(folder, progress(192))
        (folder / "latest").write_text("000000000000064\n")
        save(folder, progress(128))
    left = [name for name in names(folder) if "192" in name]
    assert left == ["000000000000192.abandoned", "000000000000192.abandoned.2"]


def test_fallback_names_what_was_left_where_nothing_before_latest_is_sound(folder):
    (folder / "latest").write_text("000000000000064\n")
    (folder / "000000000000064" / "__0_0.distcp").unlink()
    expected = r"no checkpoint is sound \(.*\); start another run folder, or go on from one that was left: {}$"
    with pytest.raises(CheckpointError, match=expected.format("000000000000128, 000000000000192")):
        files.fall_back(folder)
    save(folder, progress(128), keep=1)
    (folder / "000000000000128" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=expected.format(r"000000000000192\.abandoned")):
        files.fall_back(folder)


@pytest.mark.parametrize(
    "leftover", [".000000000000256.partial", ".000000000000064.removed", ".latest"]
)
def test_what_a_killed_save_left_is_removed_by_the_next(folder, leftover):
    if leftover == ".latest":
        (folder / leftover).write_text("000000000000064\n")
    else:
        (folder / leftover).mkdir()
        (folder / leftover / "__0_0.distcp").write_bytes(b"half of a shard")
    assert files.latest(folder) == folder / "000000000000192"
    save(folder, progress(256))
    assert leftover not in names(folder)


@pytest.fixture
def kept_by_the_system(monkeypatch):
    """Names of folders that cannot be deleted, as NFS keeps those with a file that is open."""
    names, rmdir = [], os.rmdir

    def refusing(path, **options):
        if os.path.basename(path) in names:  # noqa: PTH119 - relative to a descriptor
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", refusing)
    return names


def test_a_folder_that_cannot_be_deleted_fails_no_save(folder, kept_by_the_system):
    kept_by_the_system.append(".000000000000128.removed")
    for tokens in (256, 320, 384):
        saved = save(folder, progress(tokens), keep=2)
        assert files.latest(folder) == saved
    assert names(folder) == [
        ".000000000000128.removed",
        "000000000000320",
        "000000000000384",
        "latest",
    ]
    kept_by_the_system.clear()
    save(folder, progress(448), keep=2)
    assert names(folder) == ["000000000000384", "000000000000448", "latest"]


def test_a_checkpoint_whose_name_the_system_keeps_fails_no_save(folder, monkeypatch):
    rename = os.rename

    def refusing(source, target, **options):
        if str(source).endswith("/000000000000064"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source)
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refusing)
    saved = save(folder, progress(256), keep=1)
    assert files.latest(folder) == saved
    assert names(folder) == ["000000000000064", "000000000000256", "latest"]


def test_a_checkpoint_is_removed_beside_one_of_its_name_that_could_not_be_deleted(
    folder, kept_by_the_system
):
    kept_by_the_system.append(".000000000000064.removed")
    (folder / ".000000000000064.removed").mkdir()
    save(folder, progress(256), keep=3)
    assert names(folder)[0] == ".000000000000064.removed"
    assert "000000000000064" not in names(folder)


def test_a_save_begins_beside_a_leftover_of_its_name_that_cannot_be_deleted(
    folder, kept_by_the_system
):
    kept_by_the_system.append(".000000000000256.partial")
    (folder / ".000000000000256.partial").mkdir()
    (folder / ".000000000000256.partial" / "__7_0.distcp").write_bytes(b"of another world")
    saved = save(folder, progress(256))
    assert files.latest(folder) == saved
    files.verify(saved)
    assert not (saved / "__7_0.distcp").exists()


def test_hidden_folders_that_are_not_ours_stay(folder):
    for name in (".snapshot", ".nfs0001", ".000000000000256.partial"):
        (folder / name).mkdir()
    save(folder, progress(256))
    assert [name for name in names(folder) if name.startswith(".")] == [".nfs0001", ".snapshot"]
