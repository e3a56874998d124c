"""A checkpoint is whole or absent, and a continued run is the uninterrupted one, bit for bit."""

import shutil
from dataclasses import replace

import pytest
import torch

from megamoe.errors import CheckpointError
from megamoe.mcore import checkpoint, model, optim
from megamoe.mcore.engine import Engine
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
        train(plan, tmp_path / "halves", 2).save()
    with world_of_one(plan):
        continued = everything(train(plan, tmp_path / "halves", 2))
    assert continued.keys() == uninterrupted.keys()
    differing = [key for key in continued if not torch.equal(continued[key], uninterrupted[key])]
    assert differing == []


def test_what_is_loaded_is_what_was_saved_bit_for_bit(plan, tmp_path):
    saved = train(plan, tmp_path, 2)
    saved.save()
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
        Engine(plan, plan.segments[0], tmp_path / "begun").save()
    with world_of_one(plan):
        continued = everything(train(plan, tmp_path / "begun", 1))
    with world_of_one(plan):
        at_once = everything(train(plan, tmp_path / "at_once", 1))
    assert [key for key in at_once if not torch.equal(at_once[key], continued[key])] == []


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_only_the_newest_checkpoints_are_kept(plan, tmp_path):
    engine = Engine(plan, plan.segments[0], tmp_path)
    names = []
    for _ in range(4):
        engine.train_step()
        names.append(engine.save().name)
    folder = tmp_path / "checkpoints"
    assert plan.keep_checkpoints == 2
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names[-2:]
    assert checkpoint.latest(folder) == folder / names[-1]


def test_the_checkpoint_that_latest_names_is_kept_beside_ones_with_more_tokens(plan, tmp_path):
    engine = Engine(plan, plan.segments[0], tmp_path)
    names = []
    for _ in range(3):
        engine.train_step()
        names.append(engine.save().name)
    folder = tmp_path / "checkpoints"
    # A person goes back to the checkpoint before the last; one step on, two newer ones are there.
    shutil.copytree(folder / names[2], folder / "000000000009999")
    (folder / checkpoint.LATEST).write_text(names[1] + "\n")
    continued = train(plan, tmp_path, 1)
    assert continued.save().name == names[2]
    assert checkpoint.latest(folder) == folder / names[2]
    checkpoint._remove_old(folder, 1)
    assert checkpoint.latest(folder) == folder / names[2]


@pytest.mark.parametrize("leftover", [".000000000000128.partial", ".latest"])
def test_what_a_killed_save_left_is_ignored_and_removed(plan, tmp_path, leftover):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if leftover == ".latest":
        (folder / leftover).write_text("000000000000064\n")
    else:
        (folder / leftover).mkdir()
        (folder / leftover / "__0_0.distcp").write_bytes(b"half of a shard")
    engine = train(plan, tmp_path, 1)
    assert engine.step == 1
    engine.save()
    assert sorted(path.name for path in folder.iterdir()) == ["000000000000128", "latest"]


def test_a_save_killed_before_latest_moved_is_done_again(plan, tmp_path):
    engine = train(plan, tmp_path, 1)
    engine.save()
    folder = tmp_path / "checkpoints"
    (folder / checkpoint.LATEST).unlink()
    again = train(plan, tmp_path, 1)
    assert again.step == 1
    again.save()
    assert checkpoint.latest(folder) == folder / "000000000000128"


def test_a_checkpoint_of_another_plan_is_refused(plan, tmp_path):
    train(plan, tmp_path, 1).save()
    other = replace(plan, seed=plan.seed + 1)
    with pytest.raises(CheckpointError) as caught:
        Engine(other, other.segments[0], tmp_path)
    folder = tmp_path / "checkpoints" / "000000000000128"
    assert str(caught.value) == f"{folder} belongs to another plan; use another run folder"


def test_a_missing_checkpoint_is_named(plan, tmp_path):
    shutil.rmtree(train(plan, tmp_path, 1).save())
    with pytest.raises(CheckpointError) as caught:
        Engine(plan, plan.segments[0], tmp_path)
    pointer = tmp_path / "checkpoints" / "latest"
    assert str(caught.value) == f"{pointer} names 000000000000128, which is missing"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("__0_0.distcp", "removed"),
        ("__0_0.distcp", "cut"),
        (".metadata", "removed"),
        (".metadata", "cut"),
        ("common.pt", "removed"),
        ("common.pt", "cut"),
        ("metadata.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(plan, tmp_path, file, damage):
    engine = Engine(plan, plan.segments[0], tmp_path)
    folder = engine.save()
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "cut":
        (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, engine.chunks, engine.optimizer, same_layout=True)
    message = str(caught.value)
    assert message.startswith(f"{folder} cannot be loaded: ")
    assert "\n" not in message


def test_each_weight_counts_its_own_steps_after_a_load(plan, tmp_path):
    train(plan, tmp_path, 2).save()
    states = list(adam_states(Engine(plan, plan.segments[0], tmp_path)).values())
    assert len({state["step"].data_ptr() for state in states}) == len(states) > 1
    assert {float(state["step"]) for state in states} == {2.0}


def test_megatron_still_shares_one_step_counter_among_loaded_weights(plan, tmp_path, monkeypatch):
    train(plan, tmp_path, 2).save()
    monkeypatch.setattr(checkpoint, "separate_steps", lambda optimizer: None)
    states = list(adam_states(Engine(plan, plan.segments[0], tmp_path)).values())
    shared = len({state["step"].data_ptr() for state in states}) < len(states)
    assert shared, "Megatron-core loads a counter for each weight: drop optim.separate_steps"


def test_megatron_still_cannot_save_a_torch_adam_before_its_first_step(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "_mend_torch_adam", lambda optimizer: None)
    engine = Engine(plan, plan.segments[0], tmp_path)
    with pytest.raises(AssertionError):  # it looks for the one step that all weights have made
        engine.save()


def test_megatron_still_cannot_load_a_torch_adam(plan, tmp_path):
    engine = train(plan, tmp_path, 1)
    folder = engine.save()
    for part in engine.optimizer.chained_optimizers:
        del part._set_main_param_and_optimizer_states  # what optim._mend_torch_adam put there
    with pytest.raises(KeyError, match="step"):
        checkpoint.load(folder, engine.chunks, engine.optimizer, same_layout=True)


def test_megatron_still_takes_experts_for_replicated_weights_without_expert_parallelism(
    plan, monkeypatch
):
    monkeypatch.setattr(model, "_mark_experts", lambda model: None)
    [chunk] = model.build_model(plan, plan.segments[0])
    experts = [weight for name, weight in chunk.named_parameters() if ".local_experts." in name]
    replicated = {getattr(weight, "allreduce", True) for weight in experts}
    assert replicated == {True}, "Megatron-core marks expert weights: drop model._mark_experts"
