"""Checkpoints as files: published whole, verified before anything is believed, fallen back from."""

import errno
import hashlib
import json
import os
import shutil

import pytest

from megamoe.__main__ import main
from megamoe.checkpoints import folder as files
from megamoe.checkpoints.manifest import (
    MANIFEST,
    HashingFile,
    check_file,
    file_sha256,
    read_manifest,
)
from megamoe.errors import CheckpointError
from tests.unit.saved import SHARDS, names, progress, save, three


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of a run."""
    return three(tmp_path / "run")


def test_what_is_hashed_on_the_way_is_what_is_on_disk(tmp_path):
    chunks = [os.urandom(size) for size in (1, 0, 70_001, 3)]
    with HashingFile(tmp_path / "shard") as file:
        for chunk in chunks:
            assert file.write(chunk) == len(chunk)
        assert file.tell() == 70_005
    entry = file.entry(rank=7)
    assert (entry.name, entry.num_bytes, entry.rank) == ("shard", 70_005, 7)
    assert entry.sha256 == file_sha256(tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == b"".join(chunks)
    check_file(tmp_path, entry)


def test_a_manifest_lists_every_other_file_with_its_writer(folder):
    entries = read_manifest(folder / "000000000000064")
    assert [(entry.name, entry.rank) for entry in entries] == [
        ("__0_0.distcp", 0),
        ("__1_0.distcp", 1),
        ("progress.json", 0),
        ("tensors.json", 0),
    ]
    assert files.verify(folder / "000000000000064") == entries


def test_progress_is_what_was_saved(folder):
    assert files.read_progress(folder / "000000000000128") == progress(128)


def test_latest_names_the_newest_with_the_hash_of_its_manifest(folder):
    newest = folder / "000000000000192"
    assert files.latest(folder) == newest
    expected = f"{newest.name} {file_sha256(newest / MANIFEST)}\n"
    assert (folder / "latest").read_text() == expected


def test_a_name_written_by_hand_is_enough(folder):
    (folder / "latest").write_text("000000000000064\n")
    assert files.latest(folder) == folder / "000000000000064"


def test_no_checkpoint_yet(tmp_path):
    assert files.latest(tmp_path / "checkpoints") is None
    partial = files.begin(tmp_path / "checkpoints", "000000000000064")
    assert partial is not None
    assert files.latest(tmp_path / "checkpoints") is None  # a save has begun and may be killed
    assert files.fall_back(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "latest: is missing, but 000000000000192 is there"),
        ("", "latest: is damaged (written by rank 0)"),
        ("000000000000192 a b\n", "latest: is damaged (written by rank 0)"),
        ("../elsewhere\n", "latest: is damaged (written by rank 0)"),
        ("000000000000192", "latest: is damaged (written by rank 0)"),
        ("000000000000192 ", "latest: is damaged (written by rank 0)"),
        ("000000000000192 \n", "latest: is damaged (written by rank 0)"),
        ("000000000000192\r\n", "latest: is damaged (written by rank 0)"),
        ("000000000000192 " + "0" * 64, "latest: is damaged (written by rank 0)"),
        ("000000000000192 " + "0" * 64 + "\v", "latest: is damaged (written by rank 0)"),
        ("none", "latest: is damaged (written by rank 0)"),
        ("000000000000193\n", "latest: names 000000000000193, which is missing"),
        ("000000000000192 " + "0" * 64 + "\n", "latest: 000000000000192/manifest.json is not the one it names (both written by rank 0)"),
    ],
)  # fmt: skip
def test_a_bad_pointer_is_refused_with_the_remedy(folder, text, message):
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_bytes(text.encode())
    with pytest.raises(CheckpointError) as caught:
        files.latest(folder)
    remedy = f"; `megamoe run {folder.parent} --fallback` goes on from the newest sound checkpoint"
    assert str(caught.value) == f"{folder}/{message}{remedy}"
    checkpoint, problems = files.fall_back(folder)
    assert checkpoint == folder / "000000000000192"
    assert problems == [f"{folder}/{message}"]
    assert files.latest(folder) == checkpoint


@pytest.mark.parametrize("shard", [*SHARDS, "progress.json", MANIFEST])
def test_fallback_takes_the_newest_sound_one_and_keeps_the_damaged(folder, shard):
    bad = folder / "000000000000192"
    (bad / shard).write_bytes(b"x" + (bad / shard).read_bytes()[1:])
    checkpoint, problems = files.fall_back(folder)
    assert checkpoint == files.latest(folder) == folder / "000000000000128"
    assert problems[-1].startswith(f"{bad / shard}: ")
    assert "000000000000192" not in names(folder)
    kept = [name for name in names(folder) if "192" in name]
    assert kept == (["000000000000192.damaged"])


def test_fallback_does_not_take_what_is_newer_than_latest(folder):
    (folder / "latest").write_text("000000000000128\n")
    (folder / "000000000000128" / "__1_0.distcp").write_bytes(b"")
    checkpoint, _ = files.fall_back(folder)
    assert checkpoint == folder / "000000000000064"
    assert "000000000000192" in names(folder)


def test_fallback_changes_nothing_where_the_latest_is_sound(folder):
    before = names(folder)
    assert files.fall_back(folder) == (folder / "000000000000192", [])
    assert names(folder) == before


def test_fallback_without_a_sound_checkpoint_changes_nothing_and_says_what_is_wrong(folder):
    for checkpoint in files.all_checkpoints(folder):
        (checkpoint / "__0_0.distcp").unlink()
    before = names(folder)
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint is sound \(.*192.*128.*064.*\); start another run folder$",
    ):
        files.fall_back(folder)
    assert names(folder) == before


def test_a_second_damaged_checkpoint_of_one_name_does_not_replace_the_first(folder):
    for _ in range(2):
        save(folder, progress(192))
        (folder / "000000000000192" / "__0_0.distcp").write_bytes(b"")
        files.fall_back(folder)
    damaged = [name for name in names(folder) if "damaged" in name]
    assert damaged == ["000000000000192.damaged", "000000000000192.damaged.2"]


def test_the_latest_checkpoint_is_not_written_again(folder):
    assert files.begin(folder, "000000000000192") is None
    partial = files.begin(folder, "000000000000128")
    assert partial == folder / ".000000000000128.partial"


@pytest.mark.parametrize("name", [*SHARDS, "progress.json", MANIFEST])
def test_a_file_that_cannot_be_opened_is_damage_and_fallen_back_from(folder, name, capsys):
    bad = folder / "000000000000192" / name
    bad.unlink()
    bad.mkdir()
    message = f"{bad}: cannot be read: Is a directory (written by rank {int('__1' in name)})"
    assert main(["checkpoint", "verify", str(folder / "000000000000192")]) == 1
    assert capsys.readouterr().out == f"000000000000192  DAMAGED  {message}\n"
    checkpoint, problems = files.fall_back(folder)
    assert checkpoint == files.latest(folder) == folder / "000000000000128"
    assert message in problems


def test_a_file_that_the_disk_does_not_give_back_is_damage_and_fallen_back_from(
    folder, monkeypatch
):
    bad = folder / "000000000000192" / "__1_0.distcp"
    digest = hashlib.file_digest

    def failing(file, name):
        if file.name == str(bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", failing)
    message = f"{bad}: cannot be read: Input/output error (written by rank 1)"
    with pytest.raises(CheckpointError) as caught:
        files.verify(bad.parent)
    assert str(caught.value) == message
    assert files.fall_back(folder) == (folder / "000000000000128", [message])


def test_a_pointer_or_a_manifest_that_cannot_be_read_is_refused_with_the_remedy(folder):
    for place in (folder / "000000000000192" / MANIFEST, folder / "latest"):
        place.unlink()
        place.mkdir()
        with pytest.raises(CheckpointError) as caught:
            files.latest(folder)
        assert str(caught.value).startswith(
            f"{place}: cannot be read: Is a directory (written by rank 0); `megamoe run "
        )


@pytest.mark.parametrize("tokens", [192, 256])
@pytest.mark.parametrize("damage", ["removed", "manifest", "no manifest", "latest", "no latest"])
def test_a_save_takes_the_place_of_a_damaged_latest(folder, damage, tokens):
    newest = folder / "000000000000192"
    if damage == "removed":
        shutil.rmtree(newest)
    elif damage == "manifest":
        (newest / MANIFEST).write_bytes(b"{}")
    elif damage == "latest":
        (folder / "latest").write_bytes(b"")
    else:
        (folder / "latest" if damage == "no latest" else newest / MANIFEST).unlink()
    with pytest.raises(CheckpointError):
        files.latest(folder)
    saved = save(folder, progress(tokens))
    assert files.latest(folder) == saved == folder / f"{tokens:015d}"
    files.verify(saved)


def test_verify_and_inspect_say_what_is_there(folder, capsys):
    assert main(["checkpoint", "verify", str(folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["sound", "sound", "sound", "names"]
    assert lines[0].startswith("000000000000064  sound    4 files, ")
    assert main(["checkpoint", "inspect", str(folder.parent), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert f"checkpoint   {folder / '000000000000192'}" in text
    assert "192  general: korean" in text
    assert "__1_0.distcp" in text
    assert "a.weight  float32 [2, 3]" in text
    assert main(["checkpoint", "inspect", str(folder / "000000000000064")]) == 0
    assert "tokens seen  64" in capsys.readouterr().out


def test_verify_names_what_is_damaged_and_its_writer(folder, capsys):
    shard = folder / "000000000000128" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    shutil.rmtree(folder / "000000000000192")
    assert main(["checkpoint", "verify", str(folder.parent)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("000000000000064  sound")
    assert lines[1] == (
        f"000000000000128  DAMAGED  {shard}: has 116 bytes of 117 (written by rank 1)"
    )
    assert lines[2].startswith(
        f"latest           DAMAGED  {folder}/latest: names 000000000000192, "
    )
    assert main(["checkpoint", "verify", str(folder / "000000000000128")]) == 1


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_path_that_is_no_run_is_a_mistake(tmp_path, capsys, command):
    assert main(["checkpoint", command, str(tmp_path / "nowhere")]) == 2
    assert "is neither a run folder nor a checkpoint" in capsys.readouterr().err
    assert main(["checkpoint", command, str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"megamoe: error: {tmp_path}: is neither a run folder nor a checkpoint\n"
    )
    assert printed.out == ""
    (tmp_path / "checkpoints").mkdir()
    assert main(["checkpoint", command, str(tmp_path)]) == 2
    assert "holds no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["000000000000192", "000000000000192.damaged"])
def test_a_checkpoint_without_its_manifest_is_damaged(folder, monkeypatch, capsys, name):
    checkpoint = (folder / "000000000000192").rename(folder / name)
    (checkpoint / MANIFEST).unlink()
    assert main(["checkpoint", "verify", str(checkpoint)]) == 1
    assert "manifest.json: is missing (written by rank 0)" in capsys.readouterr().out
    monkeypatch.chdir(checkpoint)
    assert main(["checkpoint", "verify", "."]) == 1


@pytest.mark.parametrize("name", ["tensors.json", "progress.json", MANIFEST])
@pytest.mark.parametrize("damage", ["delete", "empty", "flip"])
def test_inspect_believes_nothing_that_is_damaged(folder, capsys, name, damage):
    place = folder / "000000000000128" / name
    content = place.read_bytes()
    if damage == "delete":
        place.unlink()
    else:  # "2" and "3", of which shapes and tokens are made, differ in one bit
        place.write_bytes(b"" if damage == "empty" else content.replace(b"2", b"3"))
    assert main(["checkpoint", "inspect", str(place.parent)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"megamoe: error: {place}: ")
    assert printed.err.count("\n") == 1
    assert f"(written by rank 0); `megamoe run {folder.parent} --fallback`" in printed.err


def test_a_manifest_of_another_text_is_refused_even_if_its_json_is_sound(folder):
    manifest = folder / "000000000000064" / MANIFEST
    content = json.loads(manifest.read_bytes())
    for changed in (content | {"format": 2}, {**content, "files": []}):
        manifest.write_text(json.dumps(changed, indent=1, sort_keys=True) + "\n")
        with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
            read_manifest(folder / "000000000000064")
    manifest.write_text(json.dumps(content))  # the same content, other spaces
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
        read_manifest(folder / "000000000000064")
