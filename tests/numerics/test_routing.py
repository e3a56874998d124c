"""The routing oracle against cases small enough to work out by hand."""

import pytest
import torch

from megamoe.nn import routing
from megamoe.recipe import Experts


def experts(num_routed: int, **changes: object) -> Experts:
    plain = {
        "num_shared": 0,
        "ffn_dim": 1,
        "score": "sigmoid",
        "scaling_factor": 1.0,
        "expert_bias": False,
        "num_groups": 1,
        "group_top_k": 1,
    }
    return Experts(num_routed=num_routed, **(plain | changes))


def logit(score: float) -> float:
    return float(torch.tensor(score, dtype=torch.float64).logit())


def scores(*rows: list[float]) -> torch.Tensor:
    """Return logits whose sigmoids are the given scores."""
    return torch.tensor([[logit(score) for score in row] for row in rows], dtype=torch.float64)


def test_sigmoid_scores_are_shared_out_over_the_chosen():
    chosen = experts(4, top_k=2, scaling_factor=2.5)
    probs_TE, map_TE = routing.route(scores([0.8, 0.1, 0.4, 0.2]), chosen)
    expected = torch.tensor([[2.5 * 2 / 3, 0, 2.5 / 3, 0]], dtype=torch.float64)
    torch.testing.assert_close(probs_TE, expected)
    assert map_TE.tolist() == [[True, False, True, False]]


def test_one_sigmoid_expert_keeps_its_score():
    probs_TE, _ = routing.route(scores([0.3, 0.1]), experts(2, top_k=1))
    torch.testing.assert_close(probs_TE, torch.tensor([[0.3, 0.0]], dtype=torch.float64))


def test_softmax_over_the_chosen_is_the_full_softmax_renormalised():
    logits_TE = torch.tensor([[2.0, -1.0, 0.5, 1.0]], dtype=torch.float64)
    probs_TE, map_TE = routing.route(logits_TE, experts(4, top_k=3, score="softmax"))
    full_TE = logits_TE.softmax(dim=-1) * map_TE
    torch.testing.assert_close(probs_TE, full_TE / full_TE.sum())
    assert map_TE.tolist() == [[True, False, True, True]]


def test_a_bias_changes_the_choice_and_not_the_weights():
    bias_E = torch.tensor([0.0, 0.9, 0.0, 0.0])
    probs_TE, _ = routing.route(scores([0.8, 0.1, 0.4, 0.2]), experts(4, top_k=2), bias_E)
    expected = torch.tensor([[0.8 / 0.9, 0.1 / 0.9, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(probs_TE, expected)


def test_groups_are_chosen_by_the_sum_of_their_best_experts():
    # Of the pairs (0.9, 0.1), (0.6, 0.5), (0.7, 0.05), (0.2, 0.2) the first two have the largest sums
    # of top_k / group_top_k = 2 experts, so the fourth-best expert overall is out of reach.
    logits_TE = scores([0.9, 0.1, 0.6, 0.5, 0.7, 0.05, 0.2, 0.2])
    _, map_TE = routing.route(logits_TE, experts(8, top_k=4, num_groups=4, group_top_k=2))
    assert map_TE.nonzero()[:, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_losses_of_an_even_router_are_one(score):
    logits_TE = torch.eye(4, dtype=torch.float64).repeat(3, 1)  # each token prefers another expert
    even_E = torch.full((4,), 0.25, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(routing.aux_loss(logits_TE, top_k=1, score=score), one)
    torch.testing.assert_close(routing.global_aux_loss(logits_TE, even_E, score=score), one)
    # 12 tokens are 4 positions of 3 sequences, or 3 of 4: only the latter put a sequence's tokens
    # on one expert, with its share of the score (largest of four).
    sequence = routing.sequence_aux_loss(logits_TE, 3, top_k=1, score=score)
    torch.testing.assert_close(sequence, one)
    share = routing.balancing_scores(logits_TE, score)[0, 0]
    sequence = routing.sequence_aux_loss(logits_TE, 4, top_k=1, score=score)
    torch.testing.assert_close(sequence, 4 * share)


def test_the_z_loss_is_the_square_of_the_log_of_the_sum():
    logits_TE = torch.zeros(5, 8, dtype=torch.float64)
    expected = torch.tensor(8.0, dtype=torch.float64).log().square()
    torch.testing.assert_close(routing.z_loss(logits_TE), expected)


def test_shares_carry_no_gradient_and_scores_do():
    logits_TE = torch.randn(63, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits_TE.requires_grad_()
    [gradient] = torch.autograd.grad(
        routing.aux_loss(logits_TE, top_k=2, score="sigmoid"), logits_TE
    )
    step = 1e-6  # small enough to change no choice
    direction = torch.randn(63, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ahead, behind = (
        routing.aux_loss(logits_TE.detach() + sign * step * direction, top_k=2, score="sigmoid")
        for sign in (1, -1)
    )
    # A central difference errs by step^2, and by the rounding of 1 divided by the step.
    torch.testing.assert_close(
        (gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=0.0, atol=1e-9
    )
