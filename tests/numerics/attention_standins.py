"""What stands in for packages of attention kernels where there is no GPU to run them.

Plain torch behind the signatures of the real functions, which refuses what those refuse: flash-attn
2.8.4 (`flash_attn/flash_attn_interface.py` and `csrc/flash_attn/flash_api.cpp`), flash-attn 3 (its
`hopper/flash_attn_interface.py` and `hopper/flash_api.cpp`, on Hopper), and Transformer Engine 2.20
(`pytorch/attention/dot_product_attention`).
"""

from types import ModuleType

import torch
from torch import Tensor, nn


def hidden_keys(num_queries, num_keys, window_size, *, bottom_right=True) -> Tensor:
    """Return [S, P], as flash-attn documents a window; -1 is no bound."""
    left, right = window_size
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for i in range(num_queries):
        own = i + (num_keys - num_queries) * bottom_right
        if right >= 0:
            hidden[i, max(0, own + right + 1) :] = True
        if left >= 0:
            hidden[i, : max(0, own - left)] = True
    return hidden


def attend(q, k, v, *, scale, causal, window_size, bottom_right=True) -> Tensor:
    """Return [B, S, N, V] of [B, S, N, D], [B, P, M, D], [B, P, M, V]."""
    assert q.dtype in {torch.float16, torch.bfloat16}, "only supports fp16 and bf16"
    assert k.dtype == v.dtype == q.dtype
    assert k.shape[:3] == v.shape[:3]
    assert q.shape[2] % k.shape[2] == 0
    window_size = (window_size[0], 0 if causal else window_size[1])
    hidden = hidden_keys(q.shape[1], k.shape[1], window_size, bottom_right=bottom_right)
    wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(group, dim=2) for x in (wide_k, wide_v))
    scores = torch.einsum("bqnd,bknd->bnqk", wide_q, wide_k) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bnqk,bknd->bqnd", weights, wide_v).to(q.dtype)


def attend_each(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
) -> Tensor:
    """Return [T, N, V], sequence by sequence; what is of none has gradients that were never written."""
    assert q.dim() == k.dim() == v.dim() == 3
    for ends, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert isinstance(longest, int)
        assert ends.diff().max() <= longest
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    q, k, v = (
        _Covered.apply(x, int(ends[0]), int(ends[-1]))
        for x, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(ends[i], ends[i + 1]) for ends in (cu_seqlens_q, cu_seqlens_k))
        outputs.append(attend(q[None, queries], k[None, keys], v[None, keys], **options)[0])
    return torch.cat(outputs)


class _Covered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, begin, end):
        ctx.bounds = begin, end
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        begin, end = ctx.bounds
        written = torch.empty_like(grad)  # NaN: see conftest.py
        written[begin:end] = grad[begin:end]
        return written, None, None


class FlashAttn2(ModuleType):
    """`flash_attn`."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.deterministic: list[bool] = []

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert q.dim() == 4
        self._check(q, k, v, deterministic)
        return attend(q, k, v, scale=softmax_scale, causal=causal, window_size=window_size)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        self._check(q, k, v, deterministic)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        options = {"scale": softmax_scale, "causal": causal, "window_size": window_size}
        return attend_each(q, k, v, *lengths, **options)

    def _check(self, q, k, v, deterministic) -> None:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        self.deterministic.append(deterministic)


class FlashAttn3(ModuleType):
    """`flash_attn_interface`; `returns_sum` as it did before 2.8."""

    def __init__(self, *, returns_sum=False) -> None:
        super().__init__("flash_attn_interface")
        self.deterministic: list[bool] = []
        self.returns_sum = returns_sum

    def flash_attn_func(
        self,
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert q.dim() == 4
        self._check(q, k, v, deterministic)
        out = attend(q, k, v, scale=softmax_scale, causal=causal, window_size=window_size)
        return (out, None) if self.returns_sum else out

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        self._check(q, k, v, deterministic)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        options = {"scale": softmax_scale, "causal": causal, "window_size": window_size}
        out = attend_each(q, k, v, *lengths, **options)
        return (out, None) if self.returns_sum else out

    def _check(self, q, k, v, deterministic) -> None:
        width, value_width = q.shape[-1], v.shape[-1]
        assert width == k.shape[-1] <= 256
        assert width % 8 == value_width % 8 == 0
        if width != value_width:
            wide = 128 < width <= 192 and 96 < value_width <= 128
            assert wide or (width <= 64 and value_width <= 512)
        assert not deterministic or width <= 192, "Deterministic backward not supported"
        self.deterministic.append(deterministic)


class DotProductAttention(nn.Module):
    """Transformer Engine's; of its arguments those that concern one rank."""

    has_fused_kernel = True

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        softmax_scale=None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0, "the default; anything else draws random numbers"
        self.num_heads, self.num_groups = num_attention_heads, num_gqa_groups
        self.widths, self.qkv_format = kv_channels, qkv_format
        self.window_size, self.scale = window_size, softmax_scale
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.unfused_attention = Unfused()

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
    ):
        assert self.qkv_format == "sbhd"
        assert self.window_size == (-1, 0) or (self.window_size[0] >= 0 == self.window_size[1])
        assert self.deterministic == torch.are_deterministic_algorithms_enabled()
        assert query_layer.shape[-2:] == (self.num_heads, self.widths[0])
        assert key_layer.shape[-2:] == (self.num_groups, self.widths[0])
        assert value_layer.shape[-2:] == (self.num_groups, self.widths[1])
        inputs = query_layer, key_layer, value_layer
        options = {"scale": self.scale, "causal": True, "window_size": self.window_size}
        options["bottom_right"] = attn_mask_type.endswith("causal_bottom_right")
        if qkv_format == "thd":
            assert attn_mask_type in {"padding_causal", "padding_causal_bottom_right"}
            lengths = (cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
            attended = attend_each if self.has_fused_kernel else self.unfused_attention
            return attended(*inputs, *lengths, **options).flatten(1)
        assert attn_mask_type in {"causal", "causal_bottom_right"}
        attended = attend if self.has_fused_kernel else self.unfused_attention
        return attended(*(x.transpose(0, 1) for x in inputs), **options).transpose(0, 1).flatten(2)


class Unfused(nn.Module):
    def forward(self, q, k, v, *lengths, **options):
        return (attend_each if lengths else attend)(q, k, v, *lengths, **options)


def transformer_engine(attention: type[nn.Module] = DotProductAttention) -> dict[str, ModuleType]:
    """Return `transformer_engine` and what is in it."""
    package = ModuleType("transformer_engine")
    package.pytorch = ModuleType("transformer_engine.pytorch")
    package.pytorch.DotProductAttention = attention
    return {package.__name__: package, package.pytorch.__name__: package.pytorch}


def packages() -> dict[str, ModuleType]:
    """Return all of them, by the names they are imported by."""
    flash = {"flash_attn": FlashAttn2(), "flash_attn_interface": FlashAttn3()}
    return flash | transformer_engine()
