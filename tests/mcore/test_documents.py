"""Documents packed in a sequence: each as if it were alone, however ranks share the sequence.

Whole models, forward and backward, in float64: tests/mcore/packed.py. Layouts of the engine:
test_parity_recipes.py.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamoe.mcore.data import make_batch
from megamoe.mcore.engine import Engine
from megamoe.mcore.model import unwrap
from tests.mcore import tiny
from tests.mcore.packed import (
    END,
    ENDS,
    MODELS,
    SEQ_LEN,
    SHARED,
    Case,
    cases,
    documents,
    possible_schemes,
    sequences,
)
from tests.mcore.world import adam_states, everything, train, with_segment, world_of_one

REPOSITORY = Path(__file__).parents[2]
# Sums of at most 144 tokens and 96 words through three layers and back: some 3 * 1,800 additions
# (test_parity_recipes.py), whose roundings of 2^-53 are a random walk within 4 * sqrt(5400) * 2^-53 =
# 3e-14; products of matrices of other shapes add up in another order.
DOUBLE = 1e-12


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function that runs all numbers of ranks once, and returns what one of them left."""

    @cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("packed")
        command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.packed", str(folder)]
        done = subprocess.run(
            [*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3_000:]
        return folder

    return lambda cp, *options: torch.load(run(*options) / f"cp{cp}.pt")


def check(name: str, ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        difference, size = float((ours[key] - value).abs().max()), float(value.abs().max())
        # A query that sees one key alone has no gradient, but what rounding leaves of it.
        assert difference <= DOUBLE * (size if size > 1e-9 else 1), (name, key, difference, size)


def compare(ours: dict, one: dict, expected: list[Case]) -> None:
    assert list(ours) == [str(case) for case in expected]
    for case in expected:
        values, wanted = ours[str(case)], one[str(case.of_one_rank)]
        assert values.keys() == wanted.keys()
        check(str(case), values, wanted)


def test_documents_are_as_if_each_were_alone_in_its_sequence(results):
    """Losses of all depths, numbers of tokens and gradients: GQA, MLA and YaRN, windows of 3 and all."""
    _, found = results(1)
    assert len(found) == 5
    predicted = [int(document["loss_mask"].sum()) for document in documents()]
    for name, (packed, alone) in found.items():
        each = "loss of each token"
        assert packed.keys() == alone.keys()
        check(name, packed, {key: value for key, value in alone.items() if key != each})
        assert float(packed["tokens"]) == len(ENDS) * SEQ_LEN - sum(len(ends) for ends in ENDS)
        depths = range(1, MODELS[name.split(",")[0]].mtp.num_layers + 1)
        targets = sum(max(0, count - depth) for count in predicted for depth in depths)
        assert float(packed["targets"]) == targets


@pytest.mark.parametrize("cp", SHARED)
def test_ranks_that_share_sequences_give_what_one_rank_gives(results, cp):
    expected = cases(cp, every=False)
    assert len({case.scheme for case in expected}) == 2
    compare(results(cp), results(1)[0], expected)


@pytest.mark.parity
@pytest.mark.parametrize("cp", SHARED)
def test_every_window_and_scheme_packed_and_not_with_and_without_prediction(results, cp):
    expected = cases(cp, every=True)
    others = 1 if cp == 3 else 2  # of the schemes, all but the one that meets all windows
    assert len(expected) == 2 * (5 + others) * 2 * 2
    for model in ("latent", "grouped"):
        assert len(possible_schemes(model, cp)) == 1 + others
        of_model = {case.scheme for case in expected if case.model == model}
        assert of_model == set(possible_schemes(model, cp))
    compare(results(cp, "every"), results(1, "every")[0], expected)


def test_a_batch_has_the_beginning_of_each_token_s_document_and_no_loss_on_its_end(tmp_path):
    plan = tiny.tiny_plan(tmp_path, seq_len=SEQ_LEN)
    with world_of_one(plan):
        batch, whole = make_batch(sequences(), END), make_batch(sequences(), None)
    assert "starts" not in whole
    assert batch["starts"].shape == (SEQ_LEN, len(ENDS))
    for row, ends in enumerate(ENDS):
        begins = [0, *(end + 1 for end in ends)]
        expected = [max(begin for begin in begins if begin <= i) for i in range(SEQ_LEN)]
        assert batch["starts"][:, row].tolist() == expected
        assert batch["loss_mask"][row].tolist() == [float(i not in ends) for i in range(SEQ_LEN)]
        assert whole["loss_mask"][row].tolist() == [1.0] * SEQ_LEN


@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED], ids=["latent", "grouped"])
def test_micro_batches_weigh_by_the_tokens_they_predict(tmp_path, model):
    """A step in micro-batches of one sequence and of all: unlike numbers of ends change nothing."""
    router = replace(tiny.ROUTER, aux_loss=0.0)  # which balances each micro-batch by definition
    plan = tiny.tiny_plan(tmp_path / "data", model, document_mask=True, router=router)
    steps, gradients = [], []
    for micro_batch in (1, 8):
        layout = replace(tiny.LAYOUT, micro_batch=micro_batch)
        changed = with_segment(plan, layout=layout)
        with world_of_one(changed):
            engine = Engine(changed, changed.segments[0], tmp_path / str(micro_batch))
            [batch] = engine.text.micro_batches(0, 8, 8)
            steps.append(engine.train_step())
            gradients.append({k: v["exp_avg"] for k, v in adam_states(engine).items()})
    ends = int((batch["tokens"] == plan.data.eod_id).sum())
    assert ends > 0
    assert len({int(row.sum()) for row in batch["loss_mask"]}) > 1
    for step in steps:
        assert step.loss_tokens == step.step_tokens - ends
        assert step.step_tokens == step.tokens_seen == 8 * 16  # the ledger counts inputs
    few, one = steps
    # Losses: see LOSS and GRADIENT in test_parity.py.
    assert few.loss == pytest.approx(one.loss, rel=1e-6)
    assert few.grad_norm == pytest.approx(one.grad_norm, rel=2e-5)
    if model.mtp is not None:
        assert few.mtp_loss == pytest.approx(one.mtp_loss, rel=1e-6)
    for name, expected in gradients[1].items():
        difference = float((gradients[0][name] - expected).abs().max())
        assert difference <= 2e-5 * float(expected.abs().max()), name


def test_heldout_text_is_masked_as_training_is(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", document_mask=True)
    [(_, shard)] = plan.data.heldout
    with world_of_one(plan):
        engine = Engine(plan, plan.segments[0], tmp_path)
        [result] = engine.evaluate()
        text = engine.heldout[0][1].text
    assert shard.tokens > plan.eval_tokens
    ends = int((text[:-1] == plan.data.eod_id).sum())
    assert ends > 0
    assert result.tokens == plan.eval_tokens - ends


def test_masked_documents_are_resumed_bit_for_bit(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data", tiny.GROUPED, document_mask=True)
    with world_of_one(plan):
        through = everything(train(plan, tmp_path / "through", 3))
    with world_of_one(plan):
        train(plan, tmp_path / "stopped", 1).save(wait=True)
    with world_of_one(plan):
        resumed = everything(train(plan, tmp_path / "stopped", 2))
    assert through.keys() == resumed.keys()
    assert [name for name in through if not torch.equal(through[name], resumed[name])] == []


def test_a_step_without_a_target_further_ahead_has_no_loss_of_it(tmp_path):
    """Documents of two tokens: the second is predicted, and nothing after it."""
    plan = tiny.tiny_plan(tmp_path / "data", tiny.GROUPED, document_mask=True)
    with world_of_one(plan):
        engine = Engine(plan, plan.segments[0], tmp_path)
        tokens = torch.tensor([5, plan.data.eod_id] * 8 + [5])
        sample = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(16)}
        sample["position_ids"] = torch.arange(16)
        engine.text.samples = [sample] * 8
        result = engine.train_step()
        finite = [weight.isfinite().all() for weight in unwrap(engine.chunks[0]).parameters()]
    assert result.loss_tokens == 8 * 8
    assert result.mtp_loss is None
    assert all(finite)
