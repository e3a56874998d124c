"""One stage of the curriculum. Training is measured in tokens; steps and samples are derived."""

from dataclasses import dataclass
from typing import Literal

from megamoe.recipe.check import (
    Checked,
    FieldError,
    Fraction,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from megamoe.recipe.layout import Layout
from megamoe.recipe.precision import Bf16, Fp8Block, Fp8Delayed, Fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate(Checked):
    """Warm-up, stable, decay (WSD), in tokens of the stage.

    Rises linearly from 0 to `peak` over `warmup_tokens`, stays there, and falls to `final` over
    the last `decay_tokens` of the stage by `decay`. A constant rate has
    `final=None, decay_tokens=0`; a plain
    cosine decays over all that follows the warm-up.
    """

    peak: PositiveFloat
    final: NonNegativeFloat | None  # None: the rate does not decay
    warmup_tokens: NaturalInt
    decay_tokens: NaturalInt
    decay: Literal["linear", "cosine"]

    def check(self) -> None:
        """A final rate needs a decay to reach it, and lies under the peak."""
        if (self.final is None) != (self.decay_tokens == 0):
            raise FieldError(
                "final",
                f"{self.final} contradicts decay_tokens {self.decay_tokens:,}; give "
                + ("None, or a decay" if self.decay_tokens == 0 else "the rate at the end"),
            )
        if self.final is not None and self.final > self.peak:
            raise FieldError(
                "final", f"{self.final:g} is above peak {self.peak:g}; give at most that"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(Checked):
    """Load balancing of the routed experts during one stage.

    Coefficients multiply losses averaged over tokens and layers' own scale, as in the papers:
    `aux_loss` over a micro-batch (Switch Transformer, eq. 4), `sequence_aux_loss` over each
    sequence (DeepSeek-V3, eq. 17), `global_aux_loss` over the global batch (Qiu et al. 2025),
    `z_loss` (ST-MoE, eq. 5). `bias_update_rate` moves the expert bias (DeepSeek-V3, 2.1.2).
    """

    aux_loss: NonNegativeFloat
    sequence_aux_loss: NonNegativeFloat
    global_aux_loss: NonNegativeFloat
    z_loss: NonNegativeFloat
    bias_update_rate: NonNegativeFloat


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Checked):
    """One stage: a token budget with one sequence length, layout and precision."""

    name: str
    tokens: PositiveInt
    seq_len: PositiveInt
    lr: LearningRate
    batch_ramp: tuple[tuple[int, int], ...]  # (tokens of the stage seen, sequences per step)
    mixture: tuple[tuple[str, float], ...]  # (source, weight); weights are normalised
    fim_rate: Fraction  # share of the stage's tokens in fill-in-the-middle form
    document_mask: bool  # a token sees its own document only, of those packed in a sequence
    router: Router
    mtp_loss: PositiveFloat | None  # weight of the MTP loss; None where the model has no MTP
    rope_interpolation: PositiveFloat  # positions of global layers are divided by it; 1: off
    precision: Bf16 | Fp32 | Fp8Delayed | Fp8Block
    layout: Layout

    def check(self) -> None:
        """Schedules must be well-formed and fit the budget."""
        if not self.name.isidentifier():
            raise FieldError(
                "name", f"{self.name!r} is not a plain word; give for example 'general'"
            )
        if self.lr.warmup_tokens + self.lr.decay_tokens > self.tokens:
            raise FieldError(
                "lr",
                f"warmup_tokens {self.lr.warmup_tokens:,} + decay_tokens {self.lr.decay_tokens:,} "
                f"exceed the stage's tokens {self.tokens:,}; give at most that together",
            )
        self._check_batch_ramp()
        self._check_mixture()

    def _check_batch_ramp(self) -> None:
        starts = [start for start, _ in self.batch_ramp]
        if not starts or starts[0] != 0:
            raise FieldError(
                "batch_ramp", f"{self.batch_ramp!r} does not start at 0; give ((0, n), ...)"
            )
        if starts != sorted(set(starts)):
            raise FieldError(
                "batch_ramp", f"starts {starts} do not ascend; give them in order, once each"
            )
        if starts[-1] >= self.tokens:
            raise FieldError(
                "batch_ramp",
                f"start {starts[-1]:,} is beyond the stage's tokens {self.tokens:,}; give an earlier one",
            )
        if min(size for _, size in self.batch_ramp) < 1:
            raise FieldError("batch_ramp", "has a batch under 1 sequence; give at least 1")

    def _check_mixture(self) -> None:
        sources = [source for source, _ in self.mixture]
        if not sources:
            raise FieldError("mixture", "() names no source; give (('source', weight), ...)")
        if len(set(sources)) != len(sources):
            raise FieldError("mixture", f"{sources} names a source twice; give each once")
        for source, weight in self.mixture:
            if not 0 < weight < float("inf"):
                raise FieldError(
                    "mixture", f"weight {weight!r} of {source!r} is not a positive number"
                )
