"""Exact floating-point operations per token. A multiplication and an addition are two.

Counted: every matrix product and the attention products, recomputation excluded. Not counted:
norms, activations, softmax, rotary positions, the optimizer. Backward is twice forward.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megamoe.plan.params import attention_matrices, dense_mlp, one_expert
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe.model import MLA, Model

Pairs = Callable[[int, int | None], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCount:
    """Operations per input token, forward unless it says train. Attention is a mean over positions."""

    linear: int  # matrices of the layers
    attention_global: float
    attention_local: float
    lm_head: int
    mtp_linear: int  # projection, layers and their passes through the output table
    mtp_attention: float

    @property
    def attention(self) -> float:
        """Attention products of the main layers."""
        return self.attention_global + self.attention_local

    @property
    def forward(self) -> float:
        """Everything once."""
        mtp = self.mtp_linear + self.mtp_attention
        return self.linear + self.attention + self.lm_head + mtp

    @property
    def train(self) -> float:
        """Forward and backward."""
        return 3 * self.forward


def visible_pairs(seq_len: int, window: int | None) -> int:
    """Return the (query, key) pairs of a causal mask over one sequence.

    Args:
        seq_len: tokens of the sequence.
        window: keys a query sees at most, itself included; None for all before it.
    """
    if window is None or window >= seq_len:
        return seq_len * (seq_len + 1) // 2
    return seq_len * window - window * (window - 1) // 2


def all_pairs(seq_len: int, window: int | None) -> int:  # noqa: ARG001  (one signature for both)
    """Return the pairs a kernel computes that skips nothing of the mask."""
    return seq_len * seq_len


def flops_per_token(
    model: Model, seq_len: int, *, with_mtp: bool, pairs: Pairs = visible_pairs
) -> FlopCount:
    """Count the operations of one token in sequences of `seq_len`.

    MLA is counted as it trains, with keys and values expanded from the latent. Attention of one
    layer: 2 * heads * (d_qk + d_v) * pairs / seq_len. Multi-token-prediction layers attend globally.

    Args:
        model: the model.
        seq_len: tokens of a sequence.
        with_mtp: count the multi-token-prediction layers too.
        pairs: counts the pairs that attention computes; `all_pairs` for one that masks afterwards.
    """
    experts, hidden = model.experts, model.hidden_dim
    moe = hidden * experts.num_routed + (experts.top_k + experts.num_shared) * one_expert(model)
    moe_layers = model.num_layers - model.num_dense_layers
    num_local = sum(model.is_local(layer) for layer in range(model.num_layers))
    per_pair = _attention_per_pair(model) / seq_len
    attention_global = per_pair * pairs(seq_len, None)
    head = model.vocab_size * hidden
    mtp_layers = model.mtp.num_layers if model.mtp is not None and with_mtp else 0
    mtp_ffn = moe if model.mtp is not None and model.mtp.ffn == "moe" else dense_mlp(model)
    mtp_layer = 2 * hidden * hidden + attention_matrices(model) + mtp_ffn + head
    return FlopCount(
        linear=2
        * (
            model.num_layers * attention_matrices(model)
            + model.num_dense_layers * dense_mlp(model)
            + moe_layers * moe
        ),
        attention_global=(model.num_layers - num_local) * attention_global,
        attention_local=num_local * per_pair * pairs(seq_len, model.window),
        lm_head=2 * head,
        mtp_linear=2 * mtp_layers * mtp_layer,
        mtp_attention=mtp_layers * attention_global,
    )


def train_flops_per_token(plan: Plan, segment: Segment) -> float:
    """Return the operations of a training token of the segment."""
    with_mtp = segment.mtp_loss is not None
    return flops_per_token(plan.model, segment.seq_len, with_mtp=with_mtp).train


def _attention_per_pair(model: Model) -> int:
    """Return the operations of one query with one key, all heads: scores and weighted values."""
    attention = model.attention
    if isinstance(attention, MLA):
        width = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    else:
        width = 2 * attention.head_dim
    return 2 * attention.num_heads * width
