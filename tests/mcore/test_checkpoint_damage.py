"""A checkpoint with one thing wrong is refused by file name, before anything of it is unpickled."""

import gc
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.manifest import MANIFEST
from megamoe.errors import CheckpointError
from megamoe.mcore import checkpoint, stored
from megamoe.mcore.engine import Engine
from tests.mcore import tiny
from tests.mcore.world import everything, train, world_of_one

CASES = 200
CLEAN_LOADS = 50
KINDS = ("truncate", "empty", "delete", "swap", "flip")
FILES = (
    "__0_0.distcp",
    ".metadata",
    "common.pt",
    "metadata.json",
    "tensors.json",
    "progress.json",
    MANIFEST,
    files.LATEST,
)
MODEL = replace(
    tiny.LATENT,
    num_layers=2,
    window_pattern="LG",
    experts=replace(tiny.LATENT.experts, num_routed=4),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plan, and a run of it with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    plan = tiny.tiny_plan(folder / "data", MODEL)
    with world_of_one(plan):
        engine = train(plan, folder / "run", 1)
        engine.save(wait=True)
        engine.train_step()
        engine.save(wait=True)
        gc.freeze()  # as in a run: Megatron-core collects garbage twice in every load
        yield plan, folder / "run", engine
        gc.unfreeze()


def _damage(path: Path, kind: str, other: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    if kind == "truncate":
        path.write_bytes(content[: chance.randrange(1, len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.write_bytes(_flipped(content, chance.randrange(8 * len(content))))


def _flipped(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def _cases() -> list[tuple[int, str, str, str]]:
    """Return (seed, kind, file, file it is swapped with), each kind and file in turn."""
    chance = random.Random(20261122)
    cases = []
    for seed in range(CASES):
        kind, name = KINDS[seed % len(KINDS)], FILES[seed // len(KINDS) % len(FILES)]
        other = chance.choice([file for file in FILES if file != name])
        cases.append((seed, kind, name, other))
    return cases


def test_every_kind_of_damage_to_every_file_is_among_the_cases():
    assert {(kind, name) for _, kind, name, _ in _cases()} == {(k, f) for k in KINDS for f in FILES}


def test_damage_is_refused_by_name_and_the_checkpoint_before_is_sound(saved, tmp_path, monkeypatch):
    _, run, engine = saved
    older, newer = files.all_checkpoints(run / "checkpoints")
    monkeypatch.setattr(pickle, "load", _unpickled)
    monkeypatch.setattr(torch, "load", _unpickled)
    monkeypatch.setattr(stored._Unpickler, "load", _unpickled)  # of `.metadata`
    for seed, kind, name, other in _cases():
        case = tmp_path / str(seed)
        folder = case / "checkpoints"
        shutil.copytree(run / "checkpoints", folder)
        place = {file: folder / newer.name / file for file in FILES}
        place[files.LATEST] = folder / files.LATEST
        _damage(place[name], kind, place[other], random.Random(seed))
        damaged = {name, other} if kind == "swap" else {name}
        with pytest.raises(CheckpointError) as caught:
            _load_latest(folder, engine)
        message = str(caught.value)
        assert any(f"/{file}: " in message or f"/{file} is not" in message for file in damaged), (
            f"case {seed}, {kind} {name}: {message}"
        )
        if damaged != {files.LATEST}:  # where it is gone or names another, no file is at fault
            assert "written by rank 0)" in message, f"case {seed}, {kind} {name}: {message}"
        assert "\n" not in message
        assert f"`megamoe run {case} --fallback`" in message
        chosen, problems = files.fall_back(folder)
        only_pointer = damaged == {files.LATEST}  # then nothing is wrong with the newest
        assert chosen == folder / (newer.name if only_pointer else older.name), (seed, problems)
        assert files.latest(folder) == chosen
        shutil.rmtree(case)


def test_every_cut_and_every_flipped_bit_of_latest_is_refused(saved, tmp_path):
    _, run, _ = saved
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    older, newer = files.all_checkpoints(folder)
    for bit in range(8 * len(newer.name)):  # what a flipped bit may name is there, and is sound
        name = _flipped(newer.name.encode(), bit)
        if name.isdigit():
            shutil.copytree(older, folder / name.decode())
    line = (folder / files.LATEST).read_bytes()
    assert len(line) == 81
    cuts = [line[:length] for length in range(len(line))]
    for damaged in (*cuts, *(_flipped(line, bit) for bit in range(8 * len(line)))):
        (folder / files.LATEST).write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            files.latest(folder)
        assert str(caught.value).startswith(f"{folder / files.LATEST}: "), damaged
        assert str(caught.value).endswith(files.remedy(folder)), damaged


@pytest.mark.parametrize("name", ["__0_0.distcp", MANIFEST])
def test_a_file_that_cannot_be_read_is_named_at_a_start(saved, tmp_path, name):
    _, run, engine = saved
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    newest = files.all_checkpoints(folder)[-1]
    (newest / name).unlink()
    (newest / name).mkdir()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(newest, engine.chunks, engine.optimizer, same_layout=True)
    problem = f"{newest / name}: cannot be read: Is a directory (written by rank 0)"
    assert str(caught.value) == f"{problem}{files.remedy(folder)}"


def test_no_sound_checkpoint_is_refused(saved):
    _, run, engine = saved
    expected = everything(engine)
    for _ in range(CLEAN_LOADS):
        _load_latest(run / "checkpoints", engine)
    loaded = everything(engine)
    assert [key for key in expected if not torch.equal(expected[key], loaded[key])] == []


def test_a_run_that_fell_back_ends_as_one_that_never_had_to(saved, tmp_path):
    plan, run, _ = saved
    with world_of_one(plan):
        whole = everything(train(plan, tmp_path / "whole", 4))
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shard = files.all_checkpoints(folder)[-1] / "__0_0.distcp"
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    with world_of_one(plan), pytest.raises(CheckpointError, match=r"__0_0\.distcp: is damaged"):
        Engine(plan, plan.segments[0], tmp_path / "run")
    files.fall_back(folder)
    with world_of_one(plan):
        again = train(plan, tmp_path / "run", 3)
    assert again.step == 4
    assert [key for key in whole if not torch.equal(whole[key], everything(again)[key])] == []


def _load_latest(folder: Path, engine: Engine) -> None:
    newest = files.latest(folder)
    assert newest is not None
    files.read_progress(newest)
    checkpoint.load(newest, engine.chunks, engine.optimizer, same_layout=True)


def _unpickled(*_: object, **__: object) -> None:
    pytest.fail("a damaged checkpoint was unpickled")
