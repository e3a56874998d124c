"""Causal attention, full or within a window, on torch's scaled_dot_product_attention.

Shapes: S sequence, B batch, N query heads, M key-value heads (N a multiple of M),
D query and key head dimension, V value head dimension, C block of queries.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def causal_attention(
    q_SBND: Tensor, k_SBMD: Tensor, v_SBMV: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """Attend to the `window` last positions, the query's own included (None: all before it).

    Args:
        q_SBND: queries.
        k_SBMD: keys.
        v_SBMV: values.
        window: number of keys a query sees at most.
        scale: factor of the scores before the softmax.

    Returns:
        [S, B, N * V], dtype of the queries.
    """
    seq_len, batch, num_heads, _ = q_SBND.shape
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBMD, v_SBMV))
    if window is None or window >= seq_len:
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        out = _blocked(q, k, v, window, scale)
    return out.permute(2, 0, 1, 3).reshape(seq_len, batch, num_heads * v.shape[-1])


def window_mask(block: int, window: int, device: torch.device) -> Tensor:
    """Return [C, 2C]: which of the keys of the block before and its own each query sees."""
    distance = (
        torch.arange(block, device=device)[:, None]
        + block
        - torch.arange(2 * block, device=device)[None, :]
    )
    return (distance >= 0) & (distance < window)


def _blocked(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attend block by block: queries of a block see at most the block before and their own.

    With blocks of `window` queries the work grows with S * window, not S squared.
    """
    batch, num_heads, seq_len, _ = q.shape
    num_blocks = -(-seq_len // window)
    tail = num_blocks * window - seq_len
    if k.shape[1] != num_heads:
        k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    q = pad(q, (0, 0, 0, tail)).reshape(batch, num_heads, num_blocks, window, -1)
    k, v = (
        pad(x, (0, 0, window, tail)).reshape(batch, num_heads, num_blocks + 1, window, -1)
        for x in (k, v)
    )
    k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3) for x in (k, v))
    mask = window_mask(window, window, q.device).expand(num_blocks, -1, -1).clone()
    mask[0, :, :window] = False  # the block before the first is padding
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, num_heads, num_blocks * window, -1)[:, :, :seq_len]
