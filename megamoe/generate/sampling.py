"""The next token: the most likely one, or one drawn by probability.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    Args:
        temperature: divides the logits, above 0; below 1 likely tokens become likelier.
        top_p: only the likeliest tokens that together reach this share are drawn; 1: all.
    """

    temperature: float
    top_p: float


def most_likely(logits_V: Tensor) -> int:
    """Return the token with the largest logit; the first of several."""
    return int(logits_V.argmax())


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token drawn from `probabilities`; the generator is a CPU's."""
    probabilities_V = probabilities(logits_V.cpu(), sampling)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Return [V] float64: how likely each token is drawn; nucleus sampling (Holtzman et al. 2020).

    The nucleus is the smallest set of the likeliest tokens whose probabilities reach `top_p`.
    """
    scaled_V = logits_V.double() / sampling.temperature
    probabilities_V = scaled_V.softmax(dim=-1)
    if sampling.top_p >= 1:
        return probabilities_V
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(dim=-1) - sorted_V
    kept_V = torch.where(before_V < sampling.top_p, sorted_V, 0.0)
    return torch.zeros_like(probabilities_V).scatter(-1, order_V, kept_V / kept_V.sum())
