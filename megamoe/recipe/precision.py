"""Number formats of a stage. Master weights, norms, routing and sums are float32 in all of them."""

from dataclasses import dataclass
from typing import Literal

from megamoe.recipe.check import Checked, NaturalInt, PositiveInt


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp32(Checked):
    """Everything in float32: for parity and for CPU runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16(Checked):
    """Parameters and activations in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Delayed(Checked):
    """FP8 with one delayed scale per tensor (Micikevicius et al. 2022); weights and activations E4M3."""

    gradient_format: Literal["e4m3", "e5m2"]
    amax_history: PositiveInt  # steps
    bf16_first_layers: NaturalInt
    bf16_last_layers: NaturalInt


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Block(Checked):
    """FP8 with a scale per 1x128 activation and 128x128 weight block (DeepSeek-V3, 3.3.2)."""

    bf16_first_layers: NaturalInt
    bf16_last_layers: NaturalInt
