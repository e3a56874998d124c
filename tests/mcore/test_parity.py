"""Layouts train the same model, and Megatron-core reads the checkpoint of each on one process.

All recipes, and more layouts, tensor by tensor: test_parity_recipes.py.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.checkpoints import folder as files
from megamoe.mcore import checkpoint
from megamoe.mcore.engine import Engine
from megamoe.mcore.sharing import attention_layer, scheme_of, sharing_of
from megamoe.nn.context_cost import wire_bytes
from megamoe.nn.context_heads import AttentionLayer
from megamoe.recipe import Layout
from tests.mcore.layouts import CASES, MODELS, ONE, plan_of, run_dir_of
from tests.mcore.world import adam_states, world_of_one

REPOSITORY = Path(__file__).parents[2]
OTHERS = [(model, layout) for model, layout in CASES if layout != ONE]

# Layouts differ in the order of float32 sums: heads and MLP rows over tp, experts and layers over
# the others; sums over tokens are float64. On the longest way from a token to its loss are some
# 1,800 additions (`roundings` in test_model.py). Their roundings, 2^-24 each, are a random walk:
# within 4 standard deviations, 4 * sqrt(1800) * 2^-24 = 1e-5 for a token, and a mean over 128 tokens
# divides that by sqrt(128).
LOSS = 1e-6
# A gradient has passed three times as many: 4 * sqrt(3 * 1800) * 2^-24.
GRADIENT = 2e-5


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint holds, read back on one process."""

    adam: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every layout of every model has left its results."""
    folder = tmp_path_factory.mktemp("layouts")
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.layouts", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Megatron-core's warning of ranks that write no state of an optimizer (checkpoint._settings).
    assert "common state dict differs" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def states(folder, tmp_path_factory):
    """A function that loads the checkpoint of any layout into one process, once."""
    place = tmp_path_factory.mktemp("states")

    @cache
    def load(model: str, layout: str) -> State:
        results_of(folder, model, layout)
        plan = plan_of(folder, model, ONE)
        latest = files.latest(run_dir_of(folder, model, layout) / "checkpoints")
        with world_of_one(plan):
            engine = Engine(plan, plan.segments[0], place / "empty")
            checkpoint.load(latest, engine.chunks, engine.optimizer, same_layout=False)
            return State(adam_states(engine), dict(engine.chunks[0].named_buffers()))

    return load


def results_of(
    folder: Path, model: str, layout: str, name: str = "result.json"
) -> list[dict[str, Any]]:
    """Return what each step of a layout measured, or with evaluation.json the held-out text before."""
    run_dir = run_dir_of(folder, model, layout)
    if (run_dir / "error.txt").exists():
        pytest.fail((run_dir / "error.txt").read_text())
    return json.loads((run_dir / name).read_text())


def relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / abs(expected)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two weights' states."""
    return float((actual.detach() - expected.detach()).abs().max())


@pytest.mark.parametrize(("model", "layout"), OTHERS)
def test_losses_and_gradient_norms_are_those_of_one_process(folder, model, layout):
    ours, one = results_of(folder, model, layout), results_of(folder, model, ONE)
    for step, (actual, expected) in enumerate(zip(ours, one, strict=True)):
        # What the first step's rounding does to the weights, the second step measures again.
        loss, gradient = LOSS * (step + 1), GRADIENT * (step + 1)
        assert relative(actual["loss"], expected["loss"]) <= loss
        assert relative(actual["grad_norm"], expected["grad_norm"]) <= gradient
        if expected["mtp_loss"] is not None:
            assert relative(actual["mtp_loss"], expected["mtp_loss"]) <= loss
        assert len(actual["aux_losses"]) == 4
        for (name, value), (_, wanted) in zip(
            actual["aux_losses"], expected["aux_losses"], strict=True
        ):
            assert relative(value, wanted) <= loss, name
        for exact in ("expert_load", "loss_tokens", "tokens_seen", "lr", "sequences"):
            assert actual[exact] == expected[exact]


@pytest.mark.parametrize(("model", "layout"), OTHERS)
def test_heldout_text_costs_what_it_costs_on_one_process(folder, model, layout):
    """13 windows in micro-batches of 2 are 7: no whole rounds of an interleaved pipeline of 2."""
    [ours], [one] = (results_of(folder, model, each, "evaluation.json") for each in (layout, ONE))
    assert ours["tokens"] == one["tokens"] == plan_of(folder, model, ONE).eval_tokens
    assert relative(ours["loss"], one["loss"]) <= LOSS


@pytest.mark.parametrize(("model", "layout"), OTHERS)
def test_a_checkpoint_of_any_layout_holds_the_model_of_one_process(states, model, layout):
    """Adam's mean of the gradient holds both steps: 0.1 * (0.9 * first + second)."""
    one, ours = states(model, ONE), states(model, layout)
    assert ours.adam.keys() == one.adam.keys()
    for name, expected in one.adam.items():
        actual = ours.adam[name]
        size = float(expected["exp_avg"].abs().max())
        # Two gradients, the second of weights that the first one's rounding has moved.
        assert largest_error(actual["exp_avg"], expected["exp_avg"]) <= 2 * GRADIENT * size, name
        # Squares err twice as much, relative to the largest square.
        size = float(expected["exp_avg_sq"].abs().max())
        assert largest_error(actual["exp_avg_sq"], expected["exp_avg_sq"]) <= 4 * GRADIENT * size
        assert actual["step"] == expected["step"] == 2
        # With eps 1 a step moves a weight by at most lr = 0.5 times its gradient, and the gradients
        # of both steps together are at most 20 times their mean above; a weight is rounded twice.
        bound = 0.5 * 20 * 2 * GRADIENT * float(expected["exp_avg"].abs().max())
        bound += 2 * 2.0**-24 * float(expected["weight"].detach().abs().max())
        assert largest_error(actual["weight"], expected["weight"]) <= bound, name


@pytest.mark.parametrize(("model", "layout"), OTHERS)
def test_router_state_of_any_layout_is_that_of_one_process(states, model, layout):
    """Shares of tokens and expert biases come from counts: they are equal, not close."""
    one, ours = states(model, ONE), states(model, layout)
    kept = [name for name in one.buffers if name.endswith(("previous_shares_E", "expert_bias"))]
    assert kept
    assert [name for name in kept if not torch.equal(ours.buffers[name], one.buffers[name])] == []


@pytest.mark.parametrize(
    ("model", "layout"), [*(case for case in CASES if case[1] == "dp2"), ("latent", "pp2")]
)
def test_data_parallelism_and_a_plain_pipeline_change_no_bit(states, model, layout):
    """Sums over micro-batches and ranks are float64; a pipeline only cuts between layers.

    Not so with a table that two stages share, whose gradients meet in another order.
    """
    one, ours = states(model, ONE), states(model, layout)
    differing = [
        f"{name} {key}"
        for name, state in one.adam.items()
        for key, value in state.items()
        if not torch.equal(value, ours.adam[name][key])
    ]
    assert differing == []


def layers_of_each_rank(model: str, layout: Layout) -> dict[str, list[AttentionLayer]]:
    """Return the attentions of any rank of a layout without pp, by kind."""
    assert layout.pp == 1
    whole = MODELS[model]
    kinds = ["LG"[not whole.is_local(i)] for i in range(whole.num_layers)]
    if whole.mtp is not None:
        kinds += "G" * whole.mtp.num_layers
    local, all_seen = (
        attention_layer(whole, layout.tp, has_window=has_window) for has_window in (True, False)
    )
    return {"local": [local] * kinds.count("L"), "global": [all_seen] * kinds.count("G")}


# Shards of 8 tokens and, with cp 4, of 4: both hold the 4 rows before them that a window of 5 sees.
@pytest.mark.parametrize(
    ("model", "layout"), [(model, layout) for model, layout in OTHERS if "cp" in layout]
)
def test_bytes_on_the_wire_are_those_of_the_formula(folder, model, layout):
    """Of the rank that received most: the first gets no halo forward, and the last none backward."""
    segment = plan_of(folder, model, layout).segments[0]
    layers = layers_of_each_rank(model, segment.layout)
    sharing = sharing_of(plan_of(folder, model, layout), segment)
    num_micro_batches = 8 // (segment.dp * segment.layout.micro_batch)
    for step in results_of(folder, model, layout):
        received = {kind: (forward, backward) for kind, forward, backward in step["cp_bytes"]}
        for kind, members in layers.items():
            wires = [
                [
                    wire_bytes(layer, scheme_of(layer, sharing), replace(sharing.extent, rank=rank))
                    for layer in members
                ]
                for rank in range(segment.layout.cp)
            ]
            expected = tuple(
                num_micro_batches
                * max(sum(getattr(wire, direction) for wire in of_rank) for of_rank in wires)
                for direction in ("forward", "backward")
            )
            assert min(expected) > 0
            assert received[kind] == expected, kind
