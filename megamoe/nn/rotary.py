"""YaRN (Peng et al. 2023): rotary frequencies for sequences longer than those of before.

Shapes: R rotary dimension.
"""

import math

import torch
from torch import Tensor

from megamoe.recipe import Rope, Yarn


def yarn_frequencies(dim: int, rope: Rope) -> Tensor:
    """Return the angles by which each pair of dimensions turns from one position to the next.

    Pair i turns base^(-2i / R) a position. Within `original_seq_len` that is `beta_fast` times
    at pair `low` and `beta_slow` times at pair `high`, rounded outwards; pairs up to `low` stay,
    pairs from `high` on are divided by `factor`, and between them the two are blended in
    proportion to i, as DeepSeek-V3, transformers and Megatron-core have it.

    Args:
        dim: R, even.
        rope: with YaRN.

    Returns:
        [R / 2], float32.
    """
    yarn = rope.yarn
    assert yarn is not None, "positions without YaRN"
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    frequencies = rope.base ** (-2 * pairs / dim)
    low = max(math.floor(_pair_that_turns(yarn.beta_fast, dim, rope.base, yarn)), 0)
    high = min(math.ceil(_pair_that_turns(yarn.beta_slow, dim, rope.base, yarn)), dim - 1)
    # the least ramp where both are one pair, as the others have it
    divided = ((pairs - low) / (high - low or 1e-3)).clamp(0, 1)
    return (frequencies * (1 - divided) + frequencies / yarn.factor * divided).float()


def yarn_scale(yarn: Yarn, weight: float) -> float:
    """Return m(weight) = 0.1 * weight * ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    return 0.1 * weight * math.log(yarn.factor) + 1


def _pair_that_turns(times: float, dim: int, base: float, yarn: Yarn) -> float:
    """Return the pair (not rounded) that turns so many times within the original length."""
    return dim * math.log(yarn.original_seq_len / (times * 2 * math.pi)) / (2 * math.log(base))
