"""The model: attention, positions, norms, experts, multi-token prediction.

Variants are types (`MLA | GQA`, `PreNorm | PeriNorm | DualNorm`), never names of models.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from megamoe.recipe.check import (
    Checked,
    FieldError,
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA(Checked):
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    num_heads: PositiveInt
    q_lora_rank: PositiveInt | None  # None: queries are projected from the hidden state directly
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt

    def check(self) -> None:
        """Rotary dimensions come in pairs."""
        if self.qk_rope_head_dim % 2:
            raise FieldError(
                "qk_rope_head_dim", f"{self.qk_rope_head_dim} is odd; give an even one"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GQA(Checked):
    """Grouped-query attention (Ainslie et al. 2023); `qk_norm` norms queries and keys per head."""

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    qk_norm: bool

    def check(self) -> None:
        """Query heads are shared out evenly over key-value heads."""
        if self.num_heads % self.num_kv_heads:
            raise FieldError(
                "num_kv_heads",
                f"{self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"give a divisor of {self.num_heads}",
            )
        if self.head_dim % 2:
            raise FieldError("head_dim", f"{self.head_dim} is odd; give an even one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn(Checked):
    """YaRN (Peng et al. 2023), with the scales of DeepSeek-V3: m(x) = 0.1 * x * ln(factor) + 1.

    Frequencies that turn more than `beta_fast` times within `original_seq_len` stay, those that
    turn less than `beta_slow` times are divided by `factor`, those between are blended. Rotated
    queries and keys are multiplied by m(mscale) / m(mscale_all_dim), the scores of all
    dimensions, rotated or not, by m(mscale_all_dim)^2.
    """

    factor: Annotated[float, Range(low=1)]
    original_seq_len: PositiveInt
    beta_fast: PositiveFloat
    beta_slow: PositiveFloat
    mscale: NonNegativeFloat
    mscale_all_dim: NonNegativeFloat

    def check(self) -> None:
        """What turns fast turns more often than what turns slowly."""
        if self.beta_slow > self.beta_fast:
            raise FieldError(
                "beta_slow",
                f"{self.beta_slow:g} is above beta_fast {self.beta_fast:g}; give at most that",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Checked):
    """Rotary positions (Su et al. 2021) of one kind of layer.

    `interleaved` pairs dimension 2i with 2i+1; otherwise i with i + d/2.
    """

    base: PositiveFloat
    interleaved: bool
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreNorm(Checked):
    """RMSNorm at the input of attention and of the MLP."""

    eps: PositiveFloat
    zero_centered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriNorm(Checked):
    """RMSNorm at the input and the output of attention and of the MLP (Kim et al. 2025)."""

    eps: PositiveFloat
    zero_centered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DualNorm(Checked):
    """RMSNorm at the input of attention, and before and after the MLP (A.X K1).

    `after_dense_mlp` tells whether the output of a dense MLP is normed too, not of MoE layers alone.
    """

    eps: PositiveFloat
    zero_centered: bool
    after_dense_mlp: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts(Checked):
    """Routed and shared experts of an MoE layer.

    Router probabilities: `sigmoid` scores of the chosen experts divided by their sum, or a
    `softmax` over the chosen logits (equal to a full softmax, top-k, renormalised); both times
    `scaling_factor`. The choice is by score, plus the expert bias where there is one
    (DeepSeek-V3, eq. 16).
    """

    num_routed: PositiveInt
    num_shared: NaturalInt
    top_k: PositiveInt
    ffn_dim: PositiveInt  # of one expert; the shared experts are one MLP of num_shared * ffn_dim
    score: Literal["sigmoid", "softmax"]
    scaling_factor: PositiveFloat
    expert_bias: bool
    num_groups: PositiveInt  # 1: no grouping
    group_top_k: PositiveInt

    def check(self) -> None:
        """A token cannot visit more experts, or groups, than there are."""
        if self.top_k > self.num_routed:
            raise FieldError(
                "top_k",
                f"{self.top_k} is more than num_routed {self.num_routed}; give at most that",
            )
        if self.num_routed % self.num_groups:
            raise FieldError(
                "num_groups", f"{self.num_groups} does not divide num_routed {self.num_routed}"
            )
        if self.group_top_k > self.num_groups:
            raise FieldError(
                "group_top_k", f"{self.group_top_k} is more than num_groups {self.num_groups}"
            )
        if self.expert_bias and self.score == "softmax":
            raise FieldError("expert_bias", "True needs score 'sigmoid'; give False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mtp(Checked):
    """Multi-token prediction (DeepSeek-V3, section 2.2): layers that predict one token further."""

    num_layers: PositiveInt
    ffn: Literal["dense", "moe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Checked):
    """A decoder-only transformer.

    `window_pattern` is tiled over the layers: 'L' attends to `window` keys (itself included),
    'G' to all before it. `local_rope` / `global_rope` are the positions of the two kinds of layer;
    None means no positions (NoPE).
    """

    num_layers: PositiveInt
    num_dense_layers: NaturalInt  # the first ones; the others are MoE
    hidden_dim: PositiveInt
    dense_ffn_dim: PositiveInt | None
    vocab_size: PositiveInt
    attention: MLA | GQA
    window_pattern: str
    window: PositiveInt | None
    local_rope: Rope | None
    global_rope: Rope | None
    norm: PreNorm | PeriNorm | DualNorm
    experts: Experts
    mtp: Mtp | None
    tied_embeddings: bool
    init_std: PositiveFloat

    def check(self) -> None:
        """Layers, windows and dense parts must agree."""
        if self.num_dense_layers >= self.num_layers:
            raise FieldError(
                "num_dense_layers",
                f"{self.num_dense_layers} leaves no MoE layer of num_layers {self.num_layers}; "
                f"give at most {self.num_layers - 1}",
            )
        self._check_windows()
        self._check_yarn()
        needs_dense = self.num_dense_layers > 0 or (
            self.mtp is not None and self.mtp.ffn == "dense"
        )
        if needs_dense != (self.dense_ffn_dim is not None):
            raise FieldError(
                "dense_ffn_dim",
                f"{self.dense_ffn_dim} with num_dense_layers {self.num_dense_layers} and mtp "
                f"{self.mtp}; give " + ("the width of the dense MLP" if needs_dense else "None"),
            )

    def _check_windows(self) -> None:
        if not self.window_pattern or set(self.window_pattern) - {"L", "G"}:
            raise FieldError(
                "window_pattern",
                f"{self.window_pattern!r} has letters other than L (local) and G (global); "
                "give for example 'LLLLLG'",
            )
        has_local = "L" in self.window_pattern
        if has_local != (self.window is not None):
            raise FieldError(
                "window",
                f"{self.window} contradicts window_pattern {self.window_pattern!r}; give "
                + ("a number of keys" if has_local else "None"),
            )
        for letter, name in (("L", "local_rope"), ("G", "global_rope")):
            if letter not in self.window_pattern and getattr(self, name) is not None:
                raise FieldError(
                    name,
                    f"is set, but window_pattern {self.window_pattern!r} has no {letter}; give None",
                )

    def _check_yarn(self) -> None:
        if isinstance(self.attention, MLA):
            return
        for name in ("local_rope", "global_rope"):
            rope: Rope | None = getattr(self, name)
            if rope is not None and rope.yarn is not None and rope.yarn.mscale_all_dim != 0:
                raise FieldError(
                    f"{name}.yarn.mscale_all_dim",
                    f"{rope.yarn.mscale_all_dim:g} with GQA, which rotates all dimensions; give 0",
                )

    def is_local(self, layer: int) -> bool:
        """Tell whether layer `layer` (counted from 0) attends within the window."""
        return self.window_pattern[layer % len(self.window_pattern)] == "L"

    def is_dense(self, layer: int) -> bool:
        """Tell whether layer `layer` (counted from 0) has a dense MLP."""
        return layer < self.num_dense_layers

    def norms_mlp_output(self, *, is_dense: bool) -> bool:
        """Tell whether there is a norm after an MLP of this kind."""
        match self.norm:
            case PreNorm():
                return False
            case PeriNorm():
                return True
            case DualNorm(after_dense_mlp=after_dense_mlp):
                return after_dense_mlp or not is_dense
