"""A checkpoint is whole or absent, and a continued run is the uninterrupted one, bit for bit."""

import json
import shutil
import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.manifest import HashingFile
from megamoe.errors import CheckpointError
from megamoe.mcore import checkpoint, compat, optim, shards
from megamoe.mcore.config import transformer_config
from megamoe.mcore.engine import Engine
from megamoe.mcore.stored import METADATA, ShardReader
from megamoe.recipe import Bf16, Fp32
from tests.mcore import tiny
from tests.mcore.world import adam_states, everything, train, world_of_one

MODELS = {"latent": tiny.LATENT, "grouped": tiny.GROUPED, "softmax": tiny.SOFTMAX}
# Saving takes its time by the number of weights, not by their size.
SMALL = replace(
    tiny.LATENT,
    num_layers=2,
    window_pattern="LG",
    experts=replace(tiny.LATENT.experts, num_routed=4),
)


@pytest.fixture
def plan(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", SMALL)
    with world_of_one(plan):
        yield plan


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, Fp32()) for name in MODELS), ("grouped", Bf16())],
    ids=[*MODELS, "grouped in bfloat16"],
)
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, name, precision):
    plan = tiny.tiny_plan(tmp_path / "data", MODELS[name], precision=precision)
    with world_of_one(plan):
        uninterrupted = everything(train(plan, tmp_path / "whole", 4))
    with world_of_one(plan):
        train(plan, tmp_path / "halves", 2).save(wait=True)
    with world_of_one(plan):
        continued = everything(train(plan, tmp_path / "halves", 2))
    assert continued.keys() == uninterrupted.keys()
    differing = [key for key in continued if not torch.equal(continued[key], uninterrupted[key])]
    assert differing == []


def test_what_is_loaded_is_what_was_saved_bit_for_bit(plan, tmp_path):
    saved = train(plan, tmp_path, 2)
    saved.save(wait=True)
    loaded = Engine(plan, plan.segments[0], tmp_path)
    assert (loaded.step, loaded.tokens_seen) == (2, 256)
    before, after = everything(saved), everything(loaded)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    shares = [key for key in before if key.endswith("previous_shares_E")]
    assert len(shares) == 1
    assert all(before[key].std() > 0 for key in shares)  # not the even ones a router starts with


def test_a_run_can_be_saved_and_continued_before_its_first_step(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        Engine(plan, plan.segments[0], tmp_path / "begun").save(wait=True)
    with world_of_one(plan):
        continued = everything(train(plan, tmp_path / "begun", 1))
    with world_of_one(plan):
        at_once = everything(train(plan, tmp_path / "at_once", 1))
    assert [key for key in at_once if not torch.equal(at_once[key], continued[key])] == []


def test_only_the_newest_checkpoints_are_kept(plan, tmp_path):
    engine = Engine(plan, plan.segments[0], tmp_path)
    names = []
    for _ in range(4):
        engine.train_step()
        names.append(engine.save(wait=True).name)
    folder = tmp_path / "checkpoints"
    assert plan.keep_checkpoints == 2
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names[-2:]
    assert files.latest(folder) == folder / names[-1]


def test_a_save_killed_before_latest_moved_is_done_again(plan, tmp_path):
    engine = train(plan, tmp_path, 1)
    engine.save(wait=True)
    folder = tmp_path / "checkpoints"
    (folder / files.LATEST).write_text(f"{files.NONE_YET}\n")
    again = train(plan, tmp_path, 1)
    assert again.step == 1
    again.save(wait=True)
    assert files.latest(folder) == folder / "000000000000128"


def test_a_checkpoint_of_another_plan_is_refused(plan, tmp_path):
    train(plan, tmp_path, 1).save(wait=True)
    other = replace(plan, seed=plan.seed + 1)
    with pytest.raises(CheckpointError) as caught:
        Engine(other, other.segments[0], tmp_path)
    folder = tmp_path / "checkpoints" / "000000000000128"
    assert str(caught.value) == f"{folder} belongs to another plan; use another run folder"


def test_only_tensors_and_a_few_settings_are_stored(plan, tmp_path):
    """Everything is read without pickle but `.metadata`, which is read with an allow-list."""
    folder = train(plan, tmp_path, 1).save(wait=True)
    reader = ShardReader(folder)
    names = reader.read_metadata().state_dict_metadata
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names
    assert not [name for name in names if "_extra_state" in name]
    described = json.loads((folder / "tensors.json").read_bytes())
    assert described.keys() == names.keys()
    assert described["decoder.layers.0.mlp.linear_fc1.weight"] == ["float32", [96, 32]]
    assert str(tmp_path).encode() not in (folder / METADATA).read_bytes()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
    ],
)
def test_metadata_that_names_anything_else_is_refused(plan, tmp_path, payload):
    (tmp_path / METADATA).write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"\.metadata: holds .*, which no checkpoint needs"):
        ShardReader(tmp_path).read_metadata()


def test_torch_still_unpickles_metadata_without_looking(tmp_path):
    (tmp_path / METADATA).write_bytes(b"cbuiltins\ndict\n(tR.")
    with pytest.raises(AttributeError):  # the dict was made: only then is something missed
        FileSystemReader(tmp_path).read_metadata()


def test_training_goes_on_while_a_checkpoint_is_written(plan, tmp_path, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    publish = files.publish

    def slow(*arguments):
        begun.set()
        assert may_end.wait(60)
        publish(*arguments)

    monkeypatch.setattr(files, "publish", slow)
    engine = train(plan, tmp_path / "async", 1)
    folder = engine.save()
    assert begun.wait(60)
    before = engine.ended_saves()
    engine.train_step()  # changes weights, moments and random state
    may_end.set()
    assert engine.saver.wait() is None
    [saved] = engine.ended_saves()
    assert (before, saved.step, saved.error) == ([], 1, None)
    assert 0 < saved.stall_seconds <= saved.seconds
    assert (
        saved.num_bytes
        == sum(path.stat().st_size for path in folder.iterdir())
        - (folder / "manifest.json").stat().st_size
    )
    kept = everything(Engine(plan, plan.segments[0], tmp_path / "async"))
    with world_of_one(plan):
        at_rest = everything(train(plan, tmp_path / "other", 1))
    assert [key for key in kept if not torch.equal(kept[key], at_rest[key])] == []


def test_a_save_that_is_waited_for_stalls_training_until_it_is_written(plan, tmp_path):
    engine = train(plan, tmp_path, 1)
    engine.save()
    engine.train_step()
    engine.save(wait=True)
    behind, waited_for = engine.ended_saves()
    assert behind.stall_seconds < behind.seconds
    assert waited_for.stall_seconds == waited_for.seconds > 0


def test_a_save_waits_for_the_one_before(plan, tmp_path):
    engine = train(plan, tmp_path, 1)
    engine.save()
    engine.train_step()
    newest = engine.save(wait=True)
    assert [saved.step for saved in engine.ended_saves()] == [1, 2]
    assert files.latest(tmp_path / "checkpoints") == newest


@pytest.mark.parametrize("damage", ["removed", "manifest", "latest"])
def test_damage_to_the_latest_checkpoint_does_not_stop_the_saves_of_a_run(plan, tmp_path, damage):
    engine = train(plan, tmp_path, 1)
    first = engine.save(wait=True)
    if damage == "removed":  # by a person who makes room
        shutil.rmtree(first)
    else:
        place = first / "manifest.json" if damage == "manifest" else first.parent / files.LATEST
        place.write_bytes(place.read_bytes()[:-9])
    engine.train_step()
    second = engine.save(wait=True)
    assert files.latest(first.parent) == second
    files.verify(second)


def test_an_error_of_the_writer_surfaces_at_the_next_step_and_training_goes_on(
    plan, tmp_path, monkeypatch
):
    first = train(plan, tmp_path, 1)
    kept = first.save(wait=True)
    first.train_step()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(HashingFile, "write", fail)
        failed = first.save()
        first.train_step()
        first.saver.wait()
    first_saved, second_saved = first.ended_saves()
    assert first_saved.error is None
    assert second_saved.error == "OSError: [Errno 28] No space left on device (rank 0)"
    assert not failed.exists()
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.name, "latest"]
    assert files.latest(kept.parent) == kept
    first.train_step()
    assert first.save(wait=True).exists()


def test_a_save_that_is_waited_for_raises_its_error(plan, tmp_path, monkeypatch):
    engine = train(plan, tmp_path, 1)
    monkeypatch.setattr(shards, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(
        CheckpointError, match=r"needs \d[\d,]+ bytes, 1,000 are available; make room"
    ):
        engine.save(wait=True)
    [failed] = engine.ended_saves()
    assert failed.stall_seconds == failed.seconds > 0


def test_each_weight_counts_its_own_steps_after_a_load(plan, tmp_path):
    train(plan, tmp_path, 2).save(wait=True)
    states = list(adam_states(Engine(plan, plan.segments[0], tmp_path)).values())
    assert len({state["step"].data_ptr() for state in states}) == len(states) > 1
    assert {float(state["step"]) for state in states} == {2.0}


def test_megatron_still_shares_one_step_counter_among_loaded_weights(plan, tmp_path, monkeypatch):
    train(plan, tmp_path, 2).save(wait=True)
    monkeypatch.setattr(checkpoint, "separate_steps", lambda optimizer: None)
    states = list(adam_states(Engine(plan, plan.segments[0], tmp_path)).values())
    shared = len({state["step"].data_ptr() for state in states}) < len(states)
    assert shared, "Megatron-core loads a counter for each weight: drop optim.separate_steps"


def test_megatron_still_cannot_save_a_torch_adam_before_its_first_step(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "_mend_torch_adam", lambda optimizer: None)
    engine = Engine(plan, plan.segments[0], tmp_path)
    with pytest.raises(AssertionError):  # it looks for the one step that all weights have made
        engine.save(wait=True)


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
def test_megatron_0_16_still_takes_experts_for_replicated_weights_without_expert_parallelism(
    plan, layer
):
    # tp 2 and etp 1: each tp rank holds whole experts.
    whole = transformer_config(plan, plan.segments[0])
    config = replace(whole, tensor_model_parallel_size=2, sequence_parallel=True)
    side = {ColumnParallelLinear: {}, RowParallelLinear: {"input_is_parallel": True}}[layer]
    expert = layer(
        8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=True,
        is_expert=True, **side,
    )  # fmt: skip
    is_replicated = expert.weight.allreduce
    assert is_replicated == (compat.MEGATRON_CORE < (0, 19)), (
        "which versions need the mark in megamoe/mcore/experts.py has changed: it is dropped with the last of them"
    )


def test_a_checkpoint_under_way_is_finished_when_training_fails(plan, tmp_path):
    engine = train(plan, tmp_path, 1)
    folder = engine.save()
    with pytest.raises(ZeroDivisionError), closing(engine):
        raise ZeroDivisionError
    assert files.latest(tmp_path / "checkpoints") == folder
