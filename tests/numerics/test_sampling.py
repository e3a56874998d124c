"""Tokens are drawn as often as they should be."""

from collections import Counter

import pytest
import torch

from megamoe.generate.sampling import Sampling, draw, most_likely, probabilities

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()


def test_the_most_likely_token_is_the_first_of_several():
    assert most_likely(torch.tensor([1.0, 3.0, 3.0])) == 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16]),
        (0.5, 1.0, [64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86]),  # squared
        (1.0, 0.75, [2 / 3, 1 / 3, 0, 0, 0]),  # reached exactly
        (1.0, 0.7501, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
        (1.0, 0.9, [8 / 15, 4 / 15, 2 / 15, 1 / 15, 0]),  # of two alike, the first
        (1.0, 1e-9, [1, 0, 0, 0, 0]),  # the likeliest is always there
        (0.5, 0.75, [64 / 80, 16 / 80, 0, 0, 0]),  # the nucleus is that of the temperature
    ],
)
def test_probabilities_of_small_cases(temperature, top_p, expected):
    sampling = Sampling(temperature=temperature, top_p=top_p)
    got = probabilities(LOGITS, sampling)
    # The logits are float32, below 3, and are divided by 0.5 at least: 2 * 3 * 2^-24, in e^x.
    assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 6 * 2.0**-24
    assert got[got > 0].numel() == sum(value > 0 for value in expected)


def test_a_small_temperature_is_the_most_likely_token():
    sampling = Sampling(temperature=1e-4, top_p=1.0)
    generator = torch.Generator().manual_seed(0)
    assert {draw(LOGITS, sampling, generator) for _ in range(100)} == {0}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.7, 1.0), (0.8, 0.9)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p):
    sampling = Sampling(temperature=temperature, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(draw(LOGITS, sampling, generator) for _ in range(20_000))
    expected = {
        token: 20_000 * share
        for token, share in enumerate(probabilities(LOGITS, sampling).tolist())
        if share > 0
    }
    assert counts.keys() <= expected.keys()
    chi_square = sum((counts[token] - mean) ** 2 / mean for token, mean in expected.items())
    # The 0.999 quantiles of chi-square with 2 and 4 degrees of freedom.
    assert chi_square < {2: 13.82, 4: 18.47}[len(expected) - 1]


def test_the_same_seed_draws_the_same_tokens():
    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(LOGITS, Sampling(temperature=1, top_p=1), generator) for _ in range(50)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
