"""The router that trains equals the oracle of megamoe/nn/routing.py.

Shapes: S sequence, B batch, D hidden, T = S * B tokens, E experts.
"""

from dataclasses import replace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megamoe.mcore.config import transformer_config
from megamoe.mcore.measure import AUX_LOSSES
from megamoe.mcore.router import BalancedRouter
from megamoe.nn import routing
from megamoe.recipe import Router
from tests.mcore import tiny
from tests.mcore.world import world_of_one

SEQ_LEN, BATCH, HIDDEN, EXPERTS, TOP_K = 31, 3, 32, 8, 2
TOKENS = SEQ_LEN * BATCH
FLOAT32 = 2.0**-24  # the largest relative error of one rounding
COEFFICIENTS = Router(
    aux_loss=0.3, sequence_aux_loss=0.5, global_aux_loss=0.7, z_loss=0.11, bias_update_rate=0.0
)
VARIANTS = {
    "sigmoid": tiny.LATENT.experts,
    "sigmoid, one expert a token": replace(tiny.LATENT.experts, top_k=1),
    "sigmoid with bias, scaled": tiny.GROUPED.experts,
    "sigmoid with bias in groups": replace(
        tiny.GROUPED.experts, num_groups=4, group_top_k=2, top_k=4
    ),
    "softmax": tiny.SOFTMAX.experts,
    "softmax, scaled": replace(tiny.SOFTMAX.experts, scaling_factor=1.6, top_k=3),
}


@pytest.fixture(params=VARIANTS)
def experts(request):
    return VARIANTS[request.param]


@pytest.fixture
def build(tmp_path):
    """A function that makes a router of experts of some kind, in a world of one."""
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):

        def make(experts, coefficients=COEFFICIENTS):
            segment = replace(plan.segments[0], router=coefficients)
            config = transformer_config(
                replace(plan, model=replace(plan.model, experts=experts)), segment
            )
            groups = ProcessGroupCollection.use_mpu_process_groups()
            router = BalancedRouter(config=config, pg_collection=groups)
            router.set_layer_number(1)
            generator = torch.Generator().manual_seed(11)
            with torch.no_grad():
                router.weight.normal_(std=0.3, generator=generator)
            shares_E = torch.rand(EXPERTS, generator=generator)
            router.previous_shares_E.copy_(shares_E / shares_E.sum())
            if experts.expert_bias:
                router.expert_bias.normal_(std=0.1, generator=generator)
            return router

        yield make


def hidden_states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(12)
    return torch.randn(SEQ_LEN, BATCH, HIDDEN, generator=generator, dtype=dtype)


def oracle_losses(logits_TE, experts, shares_E):
    """Return each loss times its coefficient, by the name the router gives it."""
    options = {"top_k": experts.top_k, "score": experts.score}
    return {
        "load_balancing_loss": 0.3 * routing.aux_loss(logits_TE, **options),
        "seq_load_balancing_loss": 0.5 * routing.sequence_aux_loss(logits_TE, BATCH, **options),
        "global_aux_loss": 0.7 * routing.global_aux_loss(logits_TE, shares_E, score=experts.score),
        "z_loss": 0.11 * routing.z_loss(logits_TE),
    }


def test_choices_and_weights_are_those_of_the_oracle(build, experts):
    router = build(experts)
    with torch.no_grad():
        logits_SBE = router.gating(hidden_states())
        probs_TE, map_TE = router(hidden_states())
    bias_E = router.expert_bias.double() if experts.expert_bias else None
    logits_TE = logits_SBE.double().flatten(0, 1)
    expected_probs_TE, expected_map_TE = routing.route(logits_TE, experts, bias_E)
    assert torch.equal(map_TE, expected_map_TE)
    assert (map_TE.sum(dim=1) == experts.top_k).all()
    # A score, a sum of top_k of them, a division and the scaling: each a rounding or two.
    bound = (experts.top_k + 8) * FLOAT32
    torch.testing.assert_close(probs_TE.double(), expected_probs_TE, rtol=bound, atol=0.0)
    sums_T = probs_TE.sum(dim=1)
    if experts.top_k > 1 or experts.score == "softmax":
        bound = (2 * experts.top_k + 8) * FLOAT32 * experts.scaling_factor
        assert (sums_T - experts.scaling_factor).abs().max() <= bound


def test_each_loss_is_that_of_the_oracle(build, experts):
    router = build(experts)
    logits_SBE = router.gating(hidden_states())
    router.routing(logits_SBE)
    shares_E = router.previous_shares_E.double()
    expected = oracle_losses(logits_SBE.detach().double().flatten(0, 1), experts, shares_E)
    assert router.loss_sums.keys() == expected.keys() == {name for _, name in AUX_LOSSES}
    for name, loss in expected.items():
        # Means over the tokens of sums over the experts, all terms positive (those of the z-loss
        # are squares): a rounding a term.
        bound = (TOKENS + EXPERTS + 10) * FLOAT32
        measured = router.loss_sums[name].double() / TOKENS
        torch.testing.assert_close(measured, loss, rtol=bound, atol=0.0)


def test_gradients_of_input_and_weight_are_those_of_the_oracle(build, experts):
    """The losses count TOKENS times: the engine divides all sums by the global token count once."""
    router = build(experts)
    generator = torch.Generator().manual_seed(13)
    upstream_TE = torch.randn(TOKENS, EXPERTS, generator=generator)
    x_SBD = hidden_states().requires_grad_()
    probs_TE, _ = router(x_SBD)
    (probs_TE * upstream_TE).sum().backward()

    x_TD = hidden_states().double().flatten(0, 1).requires_grad_()
    weight_ED = router.weight.detach().double().requires_grad_()
    logits_TE = x_TD @ weight_ED.T
    bias_E = router.expert_bias.double() if experts.expert_bias else None
    probs_TE, _ = routing.route(logits_TE, experts, bias_E)
    losses = oracle_losses(logits_TE, experts, router.previous_shares_E.double())
    (probs_TE * upstream_TE).sum().backward(retain_graph=True)
    sum(losses.values()).mul(TOKENS).backward()

    # A logit is a sum of 32 products below 8 in size together, so it errs by 33 roundings of 8;
    # scores and probabilities err by that relatively. The gradient of a logit is made of at most
    # 4 terms below 5 in size (upstream times scaling, and the losses), each with that error twice.
    logit_error = (HIDDEN + 1) * 8 * FLOAT32
    grad_error = 4 * 5 * 2 * logit_error
    x_bound = grad_error * router.weight.detach().double().abs().sum(dim=0)
    error_TD = (x_SBD.grad.double().flatten(0, 1) - x_TD.grad).abs()
    assert (error_TD <= x_bound).all()
    # The gradient of the weight adds up such gradients, times the inputs, over the tokens.
    weight_bound = (grad_error + TOKENS * FLOAT32 * 20) * x_TD.detach().abs().sum(dim=0)
    assert ((router.weight.grad.double() - weight_ED.grad).abs() <= weight_bound).all()


def test_the_bias_chooses_but_does_not_weigh(build):
    router = build(VARIANTS["sigmoid with bias, scaled"])
    logits_SBE = torch.zeros(SEQ_LEN, BATCH, EXPERTS)
    router.expert_bias.copy_(torch.tensor([-1.0, 5, -1, -1, 3, -1, -1, -1]))
    with torch.no_grad():
        probs_TE, map_TE = router.routing(logits_SBE)
    assert map_TE.any(dim=0).nonzero().flatten().tolist() == [1, 4]
    assert probs_TE[:, [1, 4]].unique().tolist() == [1.25]  # halves, times the factor 2.5


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_an_expert_without_tokens_keeps_losses_and_gradients_finite(build, name):
    experts = VARIANTS[name]
    router = build(experts)
    logits_SBE = torch.zeros(SEQ_LEN, BATCH, EXPERTS)
    logits_SBE[..., 2:] = -100.0  # all tokens go to the first two
    logits_SBE.requires_grad_()
    probs_TE, map_TE = router.routing(logits_SBE)
    probs_TE.sum().backward()
    assert map_TE.sum(dim=0).tolist() == [TOKENS, TOKENS, 0, 0, 0, 0, 0, 0]
    assert logits_SBE.grad.isfinite().all()
    # All choices go to 2 of 8 experts, with a score of 1/2 each: 8 * (1/4 + 1/4).
    measured = router.loss_sums["load_balancing_loss"] / TOKENS
    torch.testing.assert_close(float(measured), 0.3 * 4.0, rtol=TOKENS * FLOAT32, atol=0.0)


def test_the_global_loss_weighs_with_the_shares_of_the_batch_before(build):
    only_global = replace(COEFFICIENTS, aux_loss=0.0, sequence_aux_loss=0.0, z_loss=0.0)
    router = build(VARIANTS["sigmoid"], only_global)
    for shares_E in (torch.full((EXPERTS,), 1 / EXPERTS), torch.eye(EXPERTS)[3]):
        router.loss_sums.clear()
        router.previous_shares_E.copy_(shares_E)
        logits_SBE = router.gating(hidden_states())
        router.routing(logits_SBE)
        logits_TE = logits_SBE.detach().double().flatten(0, 1)
        expected = 0.7 * routing.global_aux_loss(logits_TE, shares_E.double(), score="sigmoid")
        measured = router.loss_sums["global_aux_loss"].double() / TOKENS
        assert router.loss_sums.keys() == {"global_aux_loss"}
        bound = (TOKENS + EXPERTS + 10) * FLOAT32
        torch.testing.assert_close(measured, expected, rtol=bound, atol=0.0)


def test_even_shares_make_the_global_loss_flat(build):
    only_global = replace(COEFFICIENTS, aux_loss=0.0, sequence_aux_loss=0.0, z_loss=0.0)
    router = build(VARIANTS["softmax"], only_global)
    router.previous_shares_E.fill_(1 / EXPERTS)
    logits_SBE = router.gating(hidden_states()).detach().requires_grad_()
    probs_TE, _ = router.routing(logits_SBE)
    (probs_TE * 0).sum().backward()
    # The scores of a token sum to 1: what is left of its gradient (times TOKENS, over the mean) is
    # the rounding of 8 terms below 1.
    assert logits_SBE.grad.abs().max() <= 0.7 * 3 * EXPERTS * FLOAT32


def test_a_finished_batch_gives_its_shares_to_the_next(build):
    router = build(VARIANTS["sigmoid with bias, scaled"])
    maps = [router(hidden_states() * size)[1] for size in (1.0, -2.0)]
    counts_E = sum(map_TE.sum(dim=0) for map_TE in maps)
    assert torch.equal(router.batch_counts_E, counts_E.double())
    router.finish_batch(router.batch_counts_E.clone())
    expected = routing.shares(torch.cat(maps))
    assert torch.equal(router.previous_shares_E, expected.float())
    assert not router.batch_counts_E.any()
    assert router.loss_sums == {}


def test_tokens_are_counted_while_training_only(build):
    router = build(VARIANTS["sigmoid"])
    router.eval()
    router(hidden_states())
    router.train()
    with torch.no_grad():
        router(hidden_states())
    assert not router.batch_counts_E.any()
    assert router.loss_sums == {}


def test_a_coefficient_of_zero_leaves_its_loss_out(build):
    none = Router(
        aux_loss=0.0, sequence_aux_loss=0.0, global_aux_loss=0.0, z_loss=0.0, bias_update_rate=0.0
    )
    router = build(VARIANTS["sigmoid"], none)
    router(hidden_states())
    assert router.loss_sums == {}
