"""Optimizers. The learning rate is a matter of the stage."""

from dataclasses import dataclass
from typing import Literal

from megamoe.recipe.check import Checked, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Checked):
    """AdamW (Loshchilov and Hutter 2019); weight decay spares norms and biases."""

    beta1: Fraction
    beta2: Fraction
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    grad_clip: PositiveFloat  # global L2 norm
    moments_dtype: Literal["float32", "bfloat16"]  # as they are kept between steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Muon(Checked):
    """Muon (Jordan et al. 2024) for matrices, AdamW for the rest."""

    momentum: Fraction
    newton_schulz_steps: PositiveInt
    beta1: Fraction
    beta2: Fraction
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    grad_clip: PositiveFloat
    moments_dtype: Literal["float32", "bfloat16"]  # of the momentum too
