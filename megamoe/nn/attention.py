"""Causal attention, full or within a window: on a GPU by its kernels, anywhere by plain torch.

Shapes: S sequence, P positions up to its end, B batch, N query heads, M key-value heads (N a multiple of M),
D query and key head dimension, V value head dimension, C block of queries.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megamoe.nn import attention_gpu

_BOUNDED_BLOCK = 1_024  # queries whose mask is in memory at once


def causal_attention(
    q_SBND: Tensor,
    k_SBMD: Tensor,
    v_SBMV: Tensor,
    *,
    window: int | None,
    scale: float,
    kernel: str | None = None,
) -> Tensor:
    """Attend to the `window` last positions, the query's own included (None: all before it).

    Args:
        q_SBND: queries.
        k_SBMD: keys.
        v_SBMV: values.
        window: number of keys a query sees at most.
        scale: factor of the scores before the softmax.
        kernel: on a GPU, a name in `FULL` or `WINDOW` of megamoe/nn/attention_gpu.py, or "blocks";
            None for the first that works.

    Returns:
        [S, B, N * V], dtype of the queries.
    """
    seq_len, batch, num_heads, _ = q_SBND.shape
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBMD, v_SBMV))
    if window is not None and window >= seq_len:
        window = None
    if q.is_cuda and kernel is None:
        kind, has_window = attention_gpu.Kind.WHOLE, window is not None
        kernel = attention_gpu.choose(
            attention_gpu.case_of(q, k, v, kind=kind, has_window=has_window)
        )
    if q.is_cuda and kernel != attention_gpu.BLOCKS:
        out = attention_gpu.run(str(kernel), q, k, v, window, scale)
    elif window is None:
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        out = _blocked(q, k, v, window, scale)
    return out.permute(2, 0, 1, 3).reshape(seq_len, batch, num_heads * v.shape[-1])


def continued_attention(
    q_SBND: Tensor,
    k_PBMD: Tensor,
    v_PBMV: Tensor,
    *,
    window: int | None,
    scale: float,
    kernel: str | None = None,
) -> Tensor:
    """Attend as `causal_attention` does, where a sequence goes on after earlier positions.

    Args:
        q_SBND: queries of the last S positions.
        k_PBMD: keys of at least those that a query may see, up to the last.
        v_PBMV: values, as the keys.
        window: number of keys a query sees at most; None: all before it.
        scale: factor of the scores before the softmax.
        kernel: as there; used where nothing comes before the queries.

    Returns:
        [S, B, N * V], dtype of the queries.
    """
    (seq_len, batch, num_heads, _), num_keys = q_SBND.shape, len(k_PBMD)
    if seq_len == num_keys:
        return causal_attention(q_SBND, k_PBMD, v_PBMV, window=window, scale=scale, kernel=kernel)
    if window is not None:  # of one query there are then no keys to mask
        num_keys = min(num_keys, window + seq_len - 1)
        k_PBMD, v_PBMV = k_PBMD[-num_keys:], v_PBMV[-num_keys:]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_PBMD, v_PBMV))
    out = attention_gpu.run_last(q, k, v, window, scale) if q.is_cuda and seq_len > 1 else None
    if out is None and window is not None and 0 < num_keys - seq_len < seq_len:
        # Queries of zeros in front make it the attention of a whole sequence, which knows windows,
        # for at most twice the work, and with a window well below the shard little more.
        q_PBND = pad(q_SBND, (0, 0, 0, 0, 0, 0, num_keys - seq_len, 0))
        whole = causal_attention(q_PBND, k_PBMD, v_PBMV, window=window, scale=scale, kernel=kernel)
        return whole[-seq_len:]
    if out is None:
        mask = None if seq_len == 1 else _continued_mask(seq_len, num_keys, window, q.device)
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3).reshape(seq_len, batch, num_heads * v.shape[-1])


def bounded_attention(
    q_SBND: Tensor,
    k_PBMD: Tensor,
    v_PBMV: Tensor,
    *,
    first_SB: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend from the beginning of each query's document up to the query: documents, packed.

    On a GPU by a kernel for sequences of several lengths, else block of queries by block, with the
    mask of one written out at a time, and again in the backward pass.

    Args:
        q_SBND: queries of the last S positions.
        k_PBMD: keys of all P.
        v_PBMV: values, as the keys.
        first_SB: where the document of each query begins, counted among the P: at a query, or before
            the first of them; below 0: before the keys. Not to be written to afterwards.
        window: number of keys a query sees at most; None: all from that first one.
        scale: factor of the scores before the softmax.

    Returns:
        [S, B, N * V], dtype of the queries.
    """
    (seq_len, batch, num_heads, _), num_keys = q_SBND.shape, len(k_PBMD)
    # Kernels count documents by it, so that it must not be broadcast.
    assert first_SB.shape == (seq_len, batch), (first_SB.shape, q_SBND.shape)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_PBMD, v_PBMV))
    if q.is_cuda and seq_len > 1:
        whole = attention_gpu.run_documents(q, k, v, window, scale, first_SB)
        if whole is not None:
            return whole.permute(2, 0, 1, 3).reshape(seq_len, batch, num_heads * v.shape[-1])
    earlier, outputs = num_keys - seq_len, []
    for begin in range(0, seq_len, _BOUNDED_BLOCK):
        end = min(seq_len, begin + _BOUNDED_BLOCK)
        low = 0 if window is None else max(0, earlier + begin - window + 1)
        # Autograd would keep the masks of all blocks, S x P values a layer: they are made anew.
        out = checkpoint(
            partial(_bounded_block, window=window, scale=scale),
            q[:, :, begin:end],
            k[:, :, low : earlier + end],
            v[:, :, low : earlier + end],
            first_SB[begin:end] - low,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(out.permute(2, 0, 1, 3))
    return torch.cat(outputs).reshape(seq_len, batch, num_heads * v.shape[-1])


def describe(device: torch.device, key_dim: int, value_dim: int) -> dict[str, str]:
    """Return which kernels attention is given, in bfloat16, and tries them.

    Args:
        device: where attention would run.
        key_dim: head dimension of queries and keys.
        value_dim: head dimension of values.

    Returns:
        Of attention to everything, `full`; within a window; of queries after the halo of another rank;
        to packed documents.
    """
    blocks = attention_gpu.BLOCKS
    if device.type != "cuda":
        full = "scaled_dot_product_attention"
        return {"full": full, "window": blocks, "halo": blocks, "documents": blocks}
    kind = attention_gpu.Kind
    kinds = {
        "full": kind.WHOLE,
        "window": kind.WHOLE,
        "halo": kind.LAST,
        "documents": kind.DOCUMENTS,
    }
    chosen = {
        name: attention_gpu.choose(
            attention_gpu.Case(
                device=device,
                dtype=torch.bfloat16,
                key_dim=key_dim,
                value_dim=value_dim,
                group=1,
                kind=kind,
                has_window=name in {"window", "halo"},
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        )
        for name, kind in kinds.items()
    }
    # Without a kernel of its own, full attention is left to torch, which may write out all scores,
    # and a halo is a window with queries of zeros in front.
    full, halo = chosen["full"], chosen["halo"]
    return chosen | {
        "full": "torch's choice" if full == blocks else full,
        "halo": chosen["window"] if halo == blocks else halo,
    }


def window_mask(block: int, window: int, device: torch.device) -> Tensor:
    """Return [C, 2C]: which of the keys of the block before and its own each query sees."""
    distance = (
        torch.arange(block, device=device)[:, None]
        + block
        - torch.arange(2 * block, device=device)[None, :]
    )
    return (distance >= 0) & (distance < window)


def _continued_mask(
    seq_len: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor:
    """Return [S, P]: which keys each of the last S positions sees."""
    queries = torch.arange(num_keys - seq_len, num_keys, device=device)
    distance = queries[:, None] - torch.arange(num_keys, device=device)[None, :]
    return (distance >= 0) & (distance < (num_keys if window is None else window))


def _bounded_block(
    q: Tensor, k: Tensor, v: Tensor, first_CB: Tensor, *, window: int | None, scale: float
) -> Tensor:
    """Attend from a first key of its own for each query; the queries are of the last positions."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    keys = torch.arange(num_keys, device=q.device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    mask = (keys <= queries) & (keys >= first_CB.T[:, None, :, None])
    if window is not None:
        mask &= queries - keys < window
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


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
