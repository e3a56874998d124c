"""Every recipe at tiny scale trains to the golden losses, whichever Megatron-core trains it.

The file was written under Megatron-core 0.16.1. Renew, there: python -m tests.mcore.test_losses.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe.mcore import compat, cpu
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cli import local_cluster
from megamoe.plan.plan import Data, Plan, Source
from megamoe.recipe import AdamW
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.scale import scale_tiny
from tests.mcore import tiny
from tests.mcore.world import train, world_of_one

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
NUM_STEPS = 20
# Two versions gave the same bits on one machine. Sums in another order (two threads for one) move a
# loss by 2e-7 in these steps, before a router sends the first token to another expert.
RELATIVE = 1e-6
ADAMW = AdamW(
    beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0, moments_dtype="float32"
)


def plan_of(name: str, folder: Path) -> Plan:
    """Return a recipe's tiny plan over generated text, two micro-batches of two sequences a step.

    Muon has no engine yet: AdamW is in its place.
    """
    recipe = scale_tiny(load_recipe(name)).recipe
    if not isinstance(recipe.optimizer, AdamW):
        recipe = replace(recipe, optimizer=ADAMW)
    plan = build_plan(recipe, local_cluster(1, "cpu"), Options(scale="tiny"))
    shards = [tiny.write_text(folder, text, seed=seed) for seed, text in enumerate(("one", "two"))]
    first = replace(
        plan.segments[0],
        sources=tuple(Source(name=shard.prefix, weight=0.5, shard=shard) for shard in shards),
        batch_ramp=((0, 4),),
        layout=replace(plan.segments[0].layout, micro_batch=2),
    )
    vocab_size = plan.model.vocab_size
    data = Data(folder=str(folder), eod_id=0, pad_id=1, vocab_size=vocab_size, heldout=())
    return replace(plan, segments=(first,), data=data)


def losses_of(name: str, folder: Path) -> dict[str, list[float]]:
    """Return what the first steps of a recipe measured."""
    plan = plan_of(name, folder / "data")
    with world_of_one(plan):
        engine = train(plan, folder, 0)
        results = [engine.train_step() for _ in range(NUM_STEPS)]
    losses = {"loss": [result.loss for result in results]}
    if plan.model.mtp is not None:
        losses["mtp_loss"] = [result.mtp_loss for result in results]
    return losses


@pytest.mark.parametrize("name", recipe_names())
def test_the_losses_are_the_golden_ones(tmp_path, name):
    golden = json.loads(GOLDEN.read_text())[name]
    losses = losses_of(name, tmp_path)
    assert losses.keys() == golden.keys()
    for kind, values in golden.items():
        assert losses[kind] == pytest.approx(values, rel=RELATIVE, abs=0), kind


def test_there_are_no_golden_losses_of_a_recipe_that_is_gone():
    golden = json.loads(GOLDEN.read_text())
    assert sorted(golden) == sorted(recipe_names())
    for losses in golden.values():
        assert all(len(values) == NUM_STEPS for values in losses.values())
        assert all(values[-1] < values[0] for values in losses.values())  # it learns


def renew() -> None:
    assert compat.MEGATRON_CORE == (0, 16), "the golden losses are those of 0.16.1"
    cpu.enable()
    golden = {}
    for name in recipe_names():
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = losses_of(name, Path(folder))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    renew()
