"""Routing of an MoE layer and its balancing losses, written out: the oracle of the tests.

Training routes with Megatron-core (megamoe/mcore/router.py); only tests use this file for now.

Shapes: T tokens, E experts, K chosen experts, G groups of experts, Q sequences.
"""

from typing import Literal

import torch
from torch import Tensor

from megamoe.recipe import Experts

Score = Literal["sigmoid", "softmax"]


def route(
    logits_TE: Tensor, experts: Experts, expert_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token and weigh them.

    sigmoid (DeepSeek-V3, eq. 13-16): s = sigmoid(logit); chosen are the K largest s + bias;
    p = s / (sum of the chosen s) where there are several. The bias weighs nothing.
    softmax (Qwen3, Mixtral): chosen are the K largest logits; p is a softmax over them.
    Both: p times the scaling factor. With groups (DeepSeek-V3, 2.1.2), a token chooses among the
    `group_top_k` groups whose K / group_top_k best experts have the largest sum.

    Returns:
        The weights, [T, E], 0 where a token does not go; and where it goes, [T, E] of bool.
    """
    scores_TE = logits_TE.sigmoid() if experts.score == "sigmoid" else logits_TE
    choice_TE = scores_TE if expert_bias_E is None else scores_TE + expert_bias_E
    map_TE = _largest(_within_groups(choice_TE, experts), experts.top_k)
    if experts.score == "softmax":
        probs_TE = logits_TE.masked_fill(~map_TE, -torch.inf).softmax(dim=-1)
    else:
        probs_TE = scores_TE * map_TE
        if experts.top_k > 1:
            probs_TE = probs_TE / probs_TE.sum(dim=-1, keepdim=True)
    return probs_TE * experts.scaling_factor, map_TE


def balancing_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """Return each token's scores as shares of 1: what the balancing losses average.

    softmax (Switch Transformer, eq. 6), or sigmoid over its sum (DeepSeek-V3, eq. 19).
    """
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True)


def aux_loss(logits_TE: Tensor, *, top_k: int, score: Score) -> Tensor:
    """Return E * sum over experts of f * P over all tokens (Switch Transformer, eq. 4-6).

    f is the expert's share of the T * K choices by score alone, without bias and groups
    (DeepSeek-V3, eq. 18), and carries no gradient; P is its mean score. 1 when even.
    """
    scores_TE = balancing_scores(logits_TE, score)
    shares_E = _largest(scores_TE, top_k).to(scores_TE.dtype).mean(dim=0) / top_k
    return global_aux_loss(logits_TE, shares_E, score=score)


def sequence_aux_loss(logits_TE: Tensor, num_sequences: int, *, top_k: int, score: Score) -> Tensor:
    """Return the mean over sequences of the aux loss of each (DeepSeek-V3, eq. 17-20).

    Args:
        logits_TE: tokens as the model flattens them, of all sequences at one position together.
        num_sequences: sequences among them.
        top_k: choices of a token.
        score: of the router.
    """
    logits_SQE = logits_TE.reshape(-1, num_sequences, logits_TE.shape[1])
    losses = [aux_loss(logits, top_k=top_k, score=score) for logits in logits_SQE.unbind(dim=1)]
    return torch.stack(losses).mean()


def global_aux_loss(logits_TE: Tensor, shares_E: Tensor, *, score: Score) -> Tensor:
    """Return E * sum over experts of f * P with given f: shares of choices in a global batch.

    (Qiu et al. 2025, "Demons in the detail", eq. 3-4.)
    """
    scores_TE = balancing_scores(logits_TE, score)
    return logits_TE.shape[1] * (shares_E * scores_TE.mean(dim=0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean over tokens of log(sum over experts of exp(logit))^2 (ST-MoE, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def shares(map_TE: Tensor) -> Tensor:
    """Return each expert's share of all choices; they sum to 1."""
    counts_E = map_TE.sum(dim=0).double()
    return counts_E / counts_E.sum()


def _within_groups(choice_TE: Tensor, experts: Experts) -> Tensor:
    """Return the scores with those of every group but the best at minus infinity."""
    choice_TGE = choice_TE.reshape(len(choice_TE), experts.num_groups, -1)
    count = experts.top_k // experts.group_top_k
    best = choice_TGE.sort(dim=-1, descending=True).values[..., :count]
    chosen_TG = _largest(best.sum(dim=-1), experts.group_top_k)
    return choice_TGE.masked_fill(~chosen_TG[..., None], -torch.inf).flatten(1)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` largest values of each row are."""
    rank = values.argsort(dim=-1, descending=True).argsort(dim=-1)
    return rank < count
