"""Our layers as Megatron-core's modules: norms, attention with a window and positions of its own.

Shapes: S sequence, B batch, D hidden, N heads, H head dim.
"""

from copy import copy
from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamoe.mcore.compat import SpecifiedLatentAttention
from megamoe.mcore.context import share_grouped, share_latent
from megamoe.mcore.decode import attend_grouped, attend_latent
from megamoe.nn.attention import causal_attention
from megamoe.nn.cache import Cache
from megamoe.nn.norm import RMSNorm
from megamoe.nn.residual import NormedResidual
from megamoe.nn.rotary import yarn_frequencies, yarn_scale
from megamoe.recipe import Rope


class Norm(RMSNorm):
    """RMSNorm that works under sequence parallelism.

    Megatron-Core 0.16.1 transformer/torch_norm.py:26 (0.19.2: 44) refuses zero-centred weights and
    sequence parallelism without Transformer Engine.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Create a norm over `hidden_size`; its gradient is summed over tp where tokens are."""
        super().__init__(hidden_size, eps=eps, zero_centered=config.layernorm_zero_centered_gamma)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class OutputNormResidual(NormedResidual):
    """residual + norm(branch), as the `bda` submodule of a Megatron-core layer."""

    def __init__(self, config: TransformerConfig) -> None:
        """Create the norm over the hidden dimension."""
        super().__init__(Norm(config, config.hidden_size, config.layernorm_epsilon))


class CoreAttention(nn.Module):
    """Causal attention within a window or over everything, on torch's own kernels.

    Megatron-Core 0.16.1 and 0.19.2 transformer/dot_product_attention.py takes neither the head sizes of MLA
    (k_channels, v_channels) nor a window per layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        *,
        window: int | None,
        **_: Any,  # layer_number, attn_mask_type, ...: what other core attentions need
    ) -> None:
        """Take the window of this layer; the scale defaults to 1 / sqrt(head dim)."""
        super().__init__()
        self.window = window
        self.kernel: str | None = None  # by name, on a GPU; None: the first that works
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
    ) -> Tensor:
        """Return [S, B, N * H]; the mask is implied by the window."""
        assert attention_mask is None, "causal masks are implied"
        return causal_attention(
            query, key, value, window=self.window, scale=self.scale, kernel=self.kernel
        )


class ReplicatedLinear(nn.Module):
    """A linear map held whole by every tensor-parallel rank, applied to the rank's own tokens."""

    def __init__(self, config: TransformerConfig, in_dim: int, out_dim: int) -> None:
        """Create the weight; its gradient is summed over tp, where the tokens are spread."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the output and no bias, as Megatron-core's linears do."""
        return nn.functional.linear(x, self.weight), None


class LatentAttention(SpecifiedLatentAttention):
    """MLA whose rotary positions belong to the layer, not to the model.

    The down-projections are replicated: with column-parallel ones, the only choice without
    Transformer Engine, Megatron-Core 0.16.1 multi_latent_attention.py:612 (0.19.2: 739) gathers the
    rotary key and never sums its gradient over the heads of the other tensor-parallel ranks.
    """

    config: Any

    def __init__(self, *args: Any, rope: Rope | None, interpolation: float, **options: Any) -> None:
        """Replace the positions that Megatron-core makes, the same for all layers."""
        super().__init__(*args, **options)
        assert rope is not None, "MLA without positions is not a published model"
        config: Any = self.config
        self.rotary_pos_emb = rotary(config.qk_pos_emb_head_dim, rope, interpolation, self)
        if rope.yarn is not None:
            rotated = yarn_scale(rope.yarn, rope.yarn.mscale)
            everything = yarn_scale(rope.yarn, rope.yarn.mscale_all_dim)
            self.rotary_pos_emb = ScaledRotary(self.rotary_pos_emb, rotated / everything)
            self.core_attention.scale *= everything**2
            own = copy(config)  # of this layer only: another may have no YaRN
            own.rope_type = "yarn"
            self.config: Any = own
        key_dim = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, config.hidden_size, key_dim)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(
                config, config.hidden_size, config.q_lora_rank
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        inference_context: Cache | None = None,
        packed_seq_params: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Attend as Megatron-core does; with a cache, to what it holds, too.

        Where documents are masked, `packed_seq_params` says where each token's begins, [S, B].
        """
        if inference_context is not None:
            return attend_latent(self, hidden_states, inference_context)
        if packed_seq_params is not None or self.pg_collection.cp.size() > 1:
            return share_latent(self, hidden_states, packed_seq_params)
        return super().forward(hidden_states, attention_mask, **options)


class GroupedAttention(SelfAttention):
    """GQA whose rotary positions belong to the layer, or are absent."""

    def __init__(self, *args: Any, rope: Rope | None, interpolation: float, **options: Any) -> None:
        """Make the layer's own positions."""
        super().__init__(*args, **options)
        self.rotary = rotary(self.config.kv_channels, rope, interpolation, self) if rope else None
        if rope is not None and rope.yarn is not None:
            # all dimensions are rotated, so that scaled queries and keys are scaled scores
            self.core_attention.scale *= yarn_scale(rope.yarn, rope.yarn.mscale) ** 2

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        inference_context: Cache | None = None,
        packed_seq_params: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Rotate queries and keys by the layer's own positions; with a cache, go on after it.

        Where documents are masked, `packed_seq_params` says where each token's begins, [S, B].
        """
        if inference_context is not None:
            return attend_grouped(self, hidden_states, inference_context)
        if packed_seq_params is not None or self.pg_collection.cp.size() > 1:
            return share_grouped(self, hidden_states, packed_seq_params)
        if self.rotary is not None:
            seq_len = self.rotary.get_rotary_seq_len(None, None, hidden_states, self.config, None)
            options["rotary_pos_emb"] = self.rotary(seq_len)
        return super().forward(hidden_states, attention_mask, **options)


def rotary(dim: int, rope: Rope, interpolation: float, attention: Any) -> RotaryEmbedding:
    """Return the rotary embedding of one layer.

    Position interpolation (Chen et al. 2023) divides positions by `interpolation`.
    """
    cp_group = attention.pg_collection.cp
    embedding = RotaryEmbedding(
        dim,
        rotary_percent=1.0,
        rotary_base=rope.base,
        seq_len_interpolation_factor=interpolation if interpolation != 1 else None,
        cp_group=cp_group,
    )
    if rope.yarn is not None:
        # Megatron-Core 0.16.1 YarnRotaryEmbedding has the same, but every layer of it keeps cosines
        # and sines of the whole original length, which are never read: 17 MB a layer of A.X K1.
        embedding.inv_freq = yarn_frequencies(dim, rope).to(embedding.inv_freq.device)
    return embedding


class ScaledRotary(nn.Module):
    """Rotary positions with a scale of rotated queries and keys, as MLA takes them of YaRN."""

    def __init__(self, embedding: RotaryEmbedding, scale: float) -> None:
        """Take the positions and their scale."""
        super().__init__()
        self.embedding = embedding
        self.scale = scale
        self.get_rotary_seq_len = embedding.get_rotary_seq_len

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, float]:
        """Return the angles of the positions, and the scale."""
        return self.embedding(*args, **options), self.scale
