"""Dispatch on one rank: Megatron-core's rows, sums and gradients, and nothing asked of the host.

Shapes: T tokens, E experts, D hidden.
"""

from dataclasses import replace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from megamoe.mcore.config import transformer_config
from megamoe.mcore.dispatch import LocalDispatcher
from megamoe.mcore.experts import GroupedExperts
from megamoe.mcore.model import build_model
from megamoe.nn.grouped import is_served
from tests.mcore import tiny
from tests.mcore.world import world_of_one

FLOAT32 = 2.0**-24  # the largest relative error of one rounding
NUM_EXPERTS, HIDDEN = 8, 12


@pytest.fixture
def dispatchers(tmp_path):
    """A function that makes ours and Megatron-core's for a number of experts a token."""

    def make(top_k):
        model = replace(tiny.LATENT, experts=replace(tiny.LATENT.experts, top_k=top_k))
        plan = tiny.tiny_plan(tmp_path / "data", model)
        with world_of_one(plan):
            config = transformer_config(plan, plan.segments[0])
            groups = ProcessGroupCollection.use_mpu_process_groups()
            theirs = MoEAlltoAllTokenDispatcher(
                NUM_EXPERTS, list(range(NUM_EXPERTS)), config, groups
            )
            return LocalDispatcher(config, theirs), theirs

    return make


def routed(num_tokens, top_k, generator):
    """Return probabilities and map; no token goes to the last expert."""
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    scores[:, -1] = -1
    map_TE = torch.zeros(num_tokens, NUM_EXPERTS, dtype=torch.bool)
    map_TE.scatter_(1, scores.topk(top_k, dim=1).indices, value=True)
    return (scores * map_TE).requires_grad_(), map_TE


def run(dispatcher, x, map_TE, probs):
    rows, weights = dispatcher.dispatch_preprocess(x, map_TE, probs)
    rows, counts, weights = dispatcher.dispatch_postprocess(
        *dispatcher.token_dispatch(rows, weights)
    )
    experts = rows * weights[:, None] + rows.sin()
    combined = dispatcher.token_combine(dispatcher.combine_preprocess(experts))
    return rows, counts, weights, dispatcher.combine_postprocess(combined)


@pytest.mark.parametrize("num_tokens", [1, 2, 63])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_rows_sums_and_gradients_are_megatrons(dispatchers, top_k, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 1, HIDDEN, generator=generator).requires_grad_()
    upstream = torch.randn(num_tokens, 1, HIDDEN, generator=generator)
    probs, map_TE = routed(num_tokens, top_k, generator)
    found = []
    for dispatcher in dispatchers(top_k):
        *parts, output = run(dispatcher, x, map_TE, probs)
        found.append([*parts, output, *torch.autograd.grad(output, (x, probs), upstream)])
    (*parts, output, x_grad, probs_grad), theirs = found
    for ours, expected in zip((*parts, probs_grad), (*theirs[:3], theirs[5]), strict=True):
        assert torch.equal(ours, expected)
    # Sums of top_k terms, of size up to 2 |x| or 2 |upstream| each, in another order.
    for ours, expected, size in ((output, theirs[3], x), (x_grad, theirs[4], upstream)):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= top_k**2 * FLOAT32 * 2 * size.abs().max()


def test_a_model_on_one_rank_uses_it(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        [chunk] = build_model(plan, plan.segments[0])
    found = [m.token_dispatcher for m in chunk.modules() if hasattr(m, "token_dispatcher")]
    assert len(found) == 3
    assert all(isinstance(dispatcher, LocalDispatcher) for dispatcher in found)


def forward_and_backward(dispatcher, experts, tokens, probs, map_TE):
    rows, weights = dispatcher.dispatch_preprocess(tokens, map_TE, probs)
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    output, _ = experts(rows, counts, weights)
    dispatcher.combine_postprocess(output).sum().backward()


def test_nothing_waits_for_a_value(dispatchers, tmp_path):
    """Tensors without values: whatever asks for one fails, as a GPU would be waited for."""
    ours, theirs = dispatchers(2)
    generator = torch.Generator().manual_seed(1)
    probs, map_TE = routed(16, 2, generator)
    with world_of_one(tiny.tiny_plan(tmp_path / "data")):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        experts = GroupedExperts(NUM_EXPERTS, ours.config, groups).bfloat16()
    assert is_served(torch.device("cpu"), torch.bfloat16, (32, 16)), "tried with real tensors"
    hidden = torch.randn(16, 1, ours.config.hidden_size, generator=generator).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(weight) for name, weight in experts.named_parameters()}
        inputs = [mode.from_tensor(x) for x in (hidden, probs, map_TE)]

        def call(*arguments):
            return torch.func.functional_call(experts, fake, arguments)

        forward_and_backward(ours, call, *inputs)
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            forward_and_backward(theirs, call, *inputs)
