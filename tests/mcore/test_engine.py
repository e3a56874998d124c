"""A segment on one process: precision, padding, learning rate, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe.errors import DataError, LaunchError, PlanError, TrainingError
from megamoe.mcore import groups
from megamoe.mcore.engine import Engine
from megamoe.mcore.model import unwrap
from megamoe.plan.schedule import learning_rate_at
from megamoe.recipe import Bf16, Fp8Block, Fp8Delayed, LearningRate, Muon
from tests.mcore import tiny
from tests.mcore.world import everything, train, with_segment, world_of_one

FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # the largest relative error of one rounding


@pytest.fixture
def plan(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        yield plan


@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED], ids=["latent", "grouped"])
def test_bfloat16_begins_with_the_loss_of_float32(tmp_path, model):
    results = {}
    plan = tiny.tiny_plan(tmp_path / "data", model)
    for name, precision in (("float32", plan.segments[0].precision), ("bfloat16", Bf16())):
        changed = with_segment(plan, precision=precision)
        with world_of_one(changed):
            engine = Engine(changed, changed.segments[0], tmp_path / name)
            results[name] = engine.train_step()
            dtypes = {weight.dtype for weight in unwrap(engine.chunks[0]).parameters()}
        assert dtypes == {torch.float32 if name == "float32" else torch.bfloat16}
    # Weights and the results of about 12 operations a layer are rounded to bfloat16, independently:
    # within 4 standard deviations, 4 * sqrt(4 * 2 * 12) of the size of a logit, which is
    # init_std * sqrt(hidden_dim) after a norm; a mean over 128 tokens divides it by sqrt(128).
    size = model.init_std * model.hidden_dim**0.5
    bound = 4 * (4 * 2 * 12) ** 0.5 * BFLOAT16 * size / 128**0.5
    assert 0 < abs(results["bfloat16"].loss - results["float32"].loss) <= bound


def test_counts_and_shares_of_a_bfloat16_model_keep_their_precision(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", tiny.GROUPED, precision=Bf16())
    with world_of_one(plan):
        [chunk] = Engine(plan, plan.segments[0], tmp_path).chunks
        dtypes = {
            (name.split(".")[-1], buffer.dtype)
            for name, buffer in chunk.named_buffers()
            if ".router." in name
        }
    assert dtypes == {
        ("batch_counts_E", torch.float64),
        ("previous_shares_E", torch.float32),
        ("expert_bias", torch.float32),
        ("local_tokens_per_expert", torch.float32),
        ("global_tokens_per_expert", torch.float32),
        ("ga_steps", torch.float32),
    }


@pytest.mark.parametrize(("eval_tokens", "measured"), [(200, 200), (160, 160), (10_000, None)])
def test_the_padding_of_heldout_text_counts_no_token(tmp_path, eval_tokens, measured):
    plan = replace(tiny.tiny_plan(tmp_path / "data"), eval_tokens=eval_tokens)
    [(name, shard)] = plan.data.heldout
    expected_tokens = measured or shard.tokens - 1  # each token but the first is predicted
    with world_of_one(plan):
        engine = Engine(plan, plan.segments[0], tmp_path)
        [result] = engine.evaluate()
        text = torch.from_numpy(engine.heldout[0][1].text)
        total, seq_len = 0.0, plan.segments[0].seq_len
        with torch.no_grad():
            for start in range(0, expected_tokens, seq_len):
                window = text[start : start + seq_len + 1][None]
                tokens = window[:, :-1]
                position_ids = torch.arange(tokens.shape[1])[None]
                losses = engine.chunks[0](tokens, position_ids, None, labels=window[:, 1:])
                total += float(losses.double().sum())
    assert (result.source, result.tokens) == (name, expected_tokens)
    # Positive terms: a rounding each, and those of a loss itself (1,800 additions, a random walk).
    bound = (expected_tokens + 4 * 1_800**0.5) * FLOAT32
    assert abs(result.loss / (total / expected_tokens) - 1) <= bound


@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED], ids=["latent", "grouped"])
def test_evaluation_changes_nothing_of_the_training_after_it(tmp_path, model):
    """Expert biases of the second model neither: they follow the tokens that are trained on."""
    plan = tiny.tiny_plan(tmp_path / "data", model)
    with world_of_one(plan):
        with_evaluation = Engine(plan, plan.segments[0], tmp_path / "with")
        without = Engine(plan, plan.segments[0], tmp_path / "without")
        for _ in range(2):
            with_evaluation.evaluate()
            ours, other = with_evaluation.train_step(), without.train_step()
            assert replace(ours, seconds=0, memory_bytes=0) == replace(
                other, seconds=0, memory_bytes=0
            )
        states = [everything(engine) for engine in (with_evaluation, without)]
    assert [name for name in states[0] if not torch.equal(*(s[name] for s in states))] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(plan, tmp_path, value):
    engine = train(plan, tmp_path, 1)
    with torch.no_grad():
        unwrap(engine.chunks[0]).output_layer.weight.fill_(value)
    with pytest.raises(TrainingError) as caught:
        engine.train_step()
    message = str(caught.value)
    assert message.startswith("step 2 (256 tokens): loss nan, gradient norm ")
    assert "lower learning rate" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "precision",
    [
        Fp8Block(bf16_first_layers=0, bf16_last_layers=0),
        Fp8Delayed(
            gradient_format="e4m3", amax_history=16, bf16_first_layers=0, bf16_last_layers=0
        ),
    ],
)
def test_fp8_is_refused_in_one_line(plan, tmp_path, precision):
    changed = with_segment(plan, precision=precision)
    with pytest.raises(PlanError) as caught:
        Engine(changed, changed.segments[0], tmp_path)
    name = type(precision).__name__
    assert f"precision {name} has no engine yet; give --set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_muon_is_refused_in_one_line(plan, tmp_path):
    muon = Muon(
        momentum=0.95,
        newton_schulz_steps=5,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        grad_clip=1.0,
        moments_dtype="float32",
    )
    changed = replace(plan, optimizer=muon)
    with pytest.raises(PlanError) as caught:
        Engine(changed, changed.segments[0], tmp_path)
    assert "optimizer Muon has no engine yet; give --set 'optimizer=AdamW(" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_says_what_it_does_not_recompute(plan, tmp_path):
    changed = with_segment(plan, layout=replace(tiny.LAYOUT, recompute=("layer",)))
    assert Engine(changed, changed.segments[0], tmp_path).notes == (
        "general: layout.recompute layer has no engine yet: activations are kept, with the same "
        "result and more memory",
    )


def test_a_softmax_over_one_expert_is_refused_in_one_line(plan, tmp_path):
    experts = replace(tiny.SOFTMAX.experts, top_k=1)
    changed = replace(plan, model=replace(tiny.SOFTMAX, experts=experts))
    with pytest.raises(PlanError) as caught:
        Engine(changed, changed.segments[0], tmp_path)
    assert "model.experts.top_k 1 with score 'softmax' has no engine yet" in str(caught.value)
    assert "give --set model.experts.top_k=2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["one", "one.heldout"])
def test_text_that_changed_since_the_plan_is_refused(plan, tmp_path, prefix):
    index = Path(plan.data.folder) / f"{prefix}.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError) as caught:
        Engine(plan, plan.segments[0], tmp_path)
    assert str(caught.value) == (
        f"{index} changed since the plan was made; restore it or plan again"
    )


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_text_that_is_missing_is_named(plan, tmp_path, suffix):
    file = Path(plan.data.folder) / f"two.{suffix}"
    file.unlink()
    with pytest.raises(DataError) as caught:
        Engine(plan, plan.segments[0], tmp_path)
    assert str(caught.value) == f"{file} is missing; restore it or plan again"


def test_text_that_cannot_be_read_is_named(plan, tmp_path):
    index = Path(plan.data.folder) / "two.idx"
    index.unlink()
    index.symlink_to("/proc/self/mem")  # a file that gives no byte of its first page
    with pytest.raises(DataError) as caught:
        Engine(plan, plan.segments[0], tmp_path)
    assert str(caught.value) == (
        f"{index} cannot be read (Input/output error); restore it or plan again"
    )


def test_every_step_has_the_learning_rate_and_batch_of_its_schedule(tmp_path):
    lr = LearningRate(peak=1e-2, final=1e-4, warmup_tokens=100, decay_tokens=300, decay="cosine")
    # 4 sequences of 16 tokens up to token 128, then 8: 64, 128, 256, 384, 512.
    plan = tiny.tiny_plan(
        tmp_path / "data", lr=lr, batch_ramp=((0, 4), (128, 8)), tokens=512, num_steps=5
    )
    with world_of_one(plan):
        engine = Engine(plan, plan.segments[0], tmp_path)
        results = []
        while not engine.is_done:
            results.append(engine.train_step())
            rates = {group["lr"] for group in engine.optimizer.param_groups}
            assert rates == {results[-1].lr}
    assert [result.tokens_seen for result in results] == [64, 128, 256, 384, 512]
    assert [result.sequences for result in results] == [4, 4, 8, 8, 8]
    assert [result.loss_tokens for result in results] == [64, 64, 128, 128, 128]
    expected = [learning_rate_at(lr, 512, tokens) for tokens in (64, 128, 256, 384, 512)]
    assert [result.lr for result in results] == expected
    assert expected[0] == 1e-2 * 64 / 100
    assert expected[-1] == 1e-4


def test_a_wrong_number_of_processes_is_refused(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    two = with_segment(plan, world_size=2, dp=2)
    with world_of_one(plan), pytest.raises(LaunchError) as caught:
        groups.form(two, two.segments[0])
    assert str(caught.value) == ("segment 0 (general) is planned for 2 processes, 1 were started")
