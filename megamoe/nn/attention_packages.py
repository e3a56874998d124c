"""Attention kernels of packages that may be installed: flash-attn 3 and 2, Transformer Engine.

None is needed, and a package is imported when a kernel of it is first tried: without it the trial of
megamoe/nn/attention_gpu.py fails and the next kernel is tried. Arguments are those of flash-attn 2.8.4
and of its `hopper` folder, which is flash-attn 3, and of Transformer Engine 1.10 to 2.20.

All align queries with the last keys: a query sees the keys up to its own, and the keys may be of more
positions than the queries.

Shapes: B batch, N query heads, M key-value heads (N a multiple of M), S queries, P keys (P at least S),
D query and key head dimension, V value head dimension, T all tokens of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megamoe.nn.attention_documents import Boundaries, in_one_row, in_rows


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Return [B, N, S, V]. On Hopper values may be 128 wide and keys 192, as in MLA."""
    output = import_module("flash_attn_interface").flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)), **_masked(window, scale)
    )
    return _only_output(output).transpose(1, 2)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Return [B, N, S, V]. Wants one width."""
    width = v.shape[-1]
    output: Tensor = import_module("flash_attn").flash_attn_func(
        *(x.transpose(1, 2) for x in widened(q, k, v)), **_masked(window, scale)
    )
    return output[..., :width].transpose(1, 2)


def transformer_engine(
    q_BNSD: Tensor, k_BMPD: Tensor, v_BMPV: Tensor, window: int | None, scale: float
) -> Tensor:
    """Return [B, N, S, V] from cuDNN or flash-attn, as Transformer Engine chooses."""
    same = q_BNSD.shape[2] == k_BMPD.shape[2]
    output = _module_for(q_BNSD, k_BMPD, v_BMPV, window, scale)(
        *(x.permute(2, 0, 1, 3) for x in (q_BNSD, k_BMPD, v_BMPV)),
        attn_mask_type="causal" if same else "causal_bottom_right",
    )
    return torch.unflatten(output, -1, (q_BNSD.shape[1], -1)).permute(1, 2, 0, 3)


def flash_attn_3_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, documents: Boundaries
) -> Tensor:
    """Return [B, N, S, V] where a query sees its own document alone."""
    output = import_module("flash_attn_interface").flash_attn_varlen_func(
        *(in_one_row(x) for x in (q, k, v)), **_masked(window, scale), **_lengths(q, k, documents)
    )
    return in_rows(_only_output(output), len(q))


def flash_attn_2_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, documents: Boundaries
) -> Tensor:
    """Return [B, N, S, V] where a query sees its own document alone. Wants one width."""
    output: Tensor = import_module("flash_attn").flash_attn_varlen_func(
        *(in_one_row(x) for x in widened(q, k, v)),
        **_masked(window, scale),
        **_lengths(q, k, documents),
    )
    return in_rows(output[..., : v.shape[-1]], len(q))


def transformer_engine_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, documents: Boundaries
) -> Tensor:
    """Return [B, N, S, V] where a query sees its own document alone."""
    same = q.shape[2] == k.shape[2]
    output = _module_for(q, k, v, window, scale)(
        *(in_one_row(x) for x in (q, k, v)),
        qkv_format="thd",
        attn_mask_type="padding_causal" if same else "padding_causal_bottom_right",
        cu_seqlens_q=documents.queries,
        cu_seqlens_kv=documents.keys,
        max_seqlen_q=q.shape[2],
        max_seqlen_kv=k.shape[2],
    )
    return in_rows(torch.unflatten(output, -1, (q.shape[1], -1)), len(q))


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors with zeros up to one width, a multiple of 8 as FlashAttention wants.

    Zeros add nothing to a score, and nothing is read of a value's.
    """
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return tuple(pad(x, (0, width - x.shape[-1])) for x in tensors)


def reach(window: int | None) -> tuple[int, int]:
    """Return the keys before and after a query's own that it sees; -1 is no bound."""
    return (-1, -1) if window is None else (window - 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What a module of Transformer Engine is made for."""

    num_heads: int
    num_kv_heads: int
    widths: tuple[int, int]  # of keys and of values
    num_before: int  # keys before a query's own that it sees; -1 is all
    scale: float
    deterministic: bool  # asked of torch by the module itself, when it is made


def _module_for(
    q_BNSD: Tensor, k_BMPD: Tensor, v_BMPV: Tensor, window: int | None, scale: float
) -> Callable[..., Tensor]:
    return _dot_product_attention(
        _Settings(
            num_heads=q_BNSD.shape[1],
            num_kv_heads=k_BMPD.shape[1],
            widths=(q_BNSD.shape[-1], v_BMPV.shape[-1]),
            num_before=-1 if window is None else window - 1,
            scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    )


@cache  # making one takes a while
def _dot_product_attention(settings: _Settings) -> Callable[..., Tensor]:
    module: Any = import_module("transformer_engine.pytorch").DotProductAttention(
        num_attention_heads=settings.num_heads,
        num_gqa_groups=settings.num_kv_heads,
        kv_channels=settings.widths,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=(settings.num_before, 0),
        softmax_scale=settings.scale,
    )
    # It is what the module falls back to without a word, and it writes out all scores.
    module.unfused_attention.register_forward_pre_hook(_refuse)
    called: Callable[..., Tensor] = module
    return called


def _refuse(*_: object) -> None:
    raise NotImplementedError("Transformer Engine has no fused kernel for this attention")


def _masked(window: int | None, scale: float) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": True,
        "window_size": reach(window),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _lengths(q_BNSD: Tensor, k_BMPD: Tensor, documents: Boundaries) -> dict[str, Any]:
    """Return where documents begin, and the length of the longest, or more."""
    return {
        "cu_seqlens_q": documents.queries,
        "cu_seqlens_k": documents.keys,
        "max_seqlen_q": q_BNSD.shape[2],
        "max_seqlen_k": k_BMPD.shape[2],
    }


def _only_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output; flash-attn 3 before 2.8 returned the logarithm of the sum with it."""
    return output[0] if isinstance(output, tuple) else output
