"""What is trained: typed, frozen, standard library only."""

from dataclasses import replace

from megamoe.recipe.layout import Layout
from megamoe.recipe.model import (
    GQA,
    MLA,
    DualNorm,
    Experts,
    Model,
    Mtp,
    PeriNorm,
    PreNorm,
    Rope,
    Yarn,
)
from megamoe.recipe.optim import AdamW, Muon
from megamoe.recipe.precision import Bf16, Fp8Block, Fp8Delayed, Fp32
from megamoe.recipe.recipe import Published, Recipe, Tokenizer
from megamoe.recipe.stage import LearningRate, Router, Stage

__all__ = [
    "GQA",
    "MLA",
    "AdamW",
    "Bf16",
    "DualNorm",
    "Experts",
    "Fp8Block",
    "Fp8Delayed",
    "Fp32",
    "Layout",
    "LearningRate",
    "Model",
    "Mtp",
    "Muon",
    "PeriNorm",
    "PreNorm",
    "Published",
    "Recipe",
    "Rope",
    "Router",
    "Stage",
    "Tokenizer",
    "Yarn",
    "replace",
]
