"""torch's FlashAttention, which only a GPU has, in plain torch on a CPU: the same operators, by their schemas.

Below autograd, so gradients are written out. Of torch 2.13, `aten/src/ATen/native/native_functions.yaml`.
"""

import torch
from torch import Tensor

from tests.numerics.attention_standins import hidden_keys


def forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, debug, *, scale=None, **window
):
    """`_flash_attention_forward`: [B, S, N, D], or with lengths [T, N, D]."""
    assert (dropout_p, debug) == (0.0, False)
    _check(q, k, v)
    outputs, sums = [], []
    for queries, keys in _rows(cu_q, cu_k, max_q, max_k, q.dim()):
        mine = (x[None] if x.dim() == 3 else x for x in (q[queries], k[keys], v[keys]))
        output, log_sum = _attend(*mine, _window(is_causal, window), scale)
        outputs.append(output if q.dim() == 4 else output[0])
        sums.append(log_sum if q.dim() == 4 else log_sum[0])
    state = torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)
    return torch.cat(outputs), torch.cat(sums, dim=0 if q.dim() == 4 else 1), *state


def backward(
    grad,
    q,
    k,
    v,
    out,
    log_sum,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    seed,
    unused,
    *,
    scale=None,
    **window,
):
    """`_flash_attention_backward`."""
    assert dropout_p == 0.0
    assert seed.dtype is torch.uint64
    assert log_sum.is_contiguous()  # read without its strides
    _check(q, k, v)
    grads = [torch.empty_like(x) for x in (q, k, v)]  # NaN where nothing is written
    for queries, keys in _rows(cu_q, cu_k, max_q, max_k, q.dim()):
        rows = (grad[queries], q[queries], k[keys], v[keys], out[queries])
        sums = log_sum if q.dim() == 4 else log_sum[None, :, queries]
        rows = [x[None] if x.dim() == 3 else x for x in rows]
        found = _gradients(*rows, sums, _window(is_causal, window), scale)
        for whole, place, mine in zip(grads, (queries, keys, keys), found, strict=True):
            whole[place] = mine if q.dim() == 4 else mine[0]
    return tuple(grads)


def sdpa_forward(q, k, v, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
    """`_scaled_dot_product_flash_attention`: [B, N, S, D]; a causal one is square."""
    assert not is_causal or q.shape[2] == k.shape[2]
    rows = (x.transpose(1, 2) for x in (q, k, v))
    lengths = (None, None, q.shape[2], k.shape[2])
    output, log_sum, *state = forward(*rows, *lengths, dropout_p, is_causal, debug, scale=scale)
    return (
        output.transpose(1, 2),
        log_sum,
        torch.empty(0),
        torch.empty(0),
        q.shape[2],
        k.shape[2],
        *state,
    )


def sdpa_backward(grad, q, k, v, out, log_sum, *rest, scale=None):
    """`_scaled_dot_product_flash_attention_backward`."""
    rows = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    grads = backward(*rows, log_sum, *rest, scale=scale)
    return tuple(x.transpose(1, 2) for x in grads)


def library() -> torch.library.Library:
    """Return what gives a CPU these operators until it is destroyed."""
    found = torch.library.Library("aten", "IMPL")
    for name, function in (
        ("_flash_attention_forward", forward),
        ("_flash_attention_backward", backward),
        ("_scaled_dot_product_flash_attention", sdpa_forward),
        ("_scaled_dot_product_flash_attention_backward", sdpa_backward),
    ):
        found.impl(name, function, "CPU")
    return found


def _check(q, k, v) -> None:
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


def _window(is_causal, window) -> tuple[int, int]:
    left, right = (window.get(f"window_size_{side}") for side in ("left", "right"))
    return -1 if left is None else left, 0 if is_causal else (-1 if right is None else right)


def _rows(cu_q, cu_k, max_q, max_k, num_dims):
    if num_dims == 4:
        assert cu_q is None
        assert cu_k is None
        return [(slice(None), slice(None))]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert len(cu_q) == len(cu_k)
    assert cu_q.diff().max() <= max_q
    assert cu_k.diff().max() <= max_k
    pairs = zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in pairs]


def _scores(q, k, window, scale) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqnd,bknd->bnqk", q.float(), k.float()) * scale
    return scores.masked_fill(hidden_keys(q.shape[1], k.shape[1], window), -torch.inf)


def _attend(q, k, v, window, scale) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, window, scale)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    output = torch.einsum("bnqk,bknd->bqnd", scores.softmax(dim=-1), v.float())
    return output.to(q.dtype), scores.logsumexp(dim=-1)


def _gradients(grad, q, k, v, out, log_sum, window, scale):
    group = q.shape[2] // k.shape[2]
    weights = (_scores(q, k, window, scale) - log_sum[..., None]).exp()
    wide_k, wide_v = (x.float().repeat_interleave(group, dim=2) for x in (k, v))
    delta = (grad.float() * out.float()).sum(dim=-1).transpose(1, 2)[..., None]
    products = torch.einsum("bqnd,bknd->bnqk", grad.float(), wide_v)
    score_grads = weights * (products - delta) * scale
    grad_q = torch.einsum("bnqk,bknd->bqnd", score_grads, wide_k)
    grad_k = torch.einsum("bnqk,bqnd->bknd", score_grads, q.float())
    grad_v = torch.einsum("bnqk,bqnd->bknd", weights, grad.float())
    shared = (x.unflatten(2, (-1, group)).sum(dim=3) for x in (grad_k, grad_v))
    return tuple(x.to(q.dtype) for x in (grad_q, *shared))
