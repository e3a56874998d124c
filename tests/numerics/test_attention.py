"""Causal attention, full and windowed, against a dense mask in float64, outputs and gradients.

Shapes: S sequence (queries or keys), B batch, N query heads, M key-value heads, D key head dim,
V value head dim.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megamoe.nn.attention import causal_attention, window_mask

FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # the largest relative error of one rounding
BATCH = 2
SEQUENCES = [
    *((seq_len, None) for seq_len in (1, 63, 100)),
    *((1, 1), (63, 1), (63, 5), (100, 16), (63, 62), (63, 63), (63, 64), (100, 300), (64, 16)),
]


@dataclass(frozen=True, slots=True)
class Heads:
    num_query: int
    num_kv: int
    key_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        return self.num_query // self.num_kv


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention in float64: its output, its gradients, and a bound of the error of each."""

    values: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]


def reference(
    inputs: tuple[Tensor, ...],
    upstream_SBNV: Tensor,
    window: int | None,
    scale: float,
    stored: float,
) -> Attention:
    """Return output and gradients of q, k and v, written out, and how far float32 may be from them.

    A sum of n products errs by at most n roundings of the sum of their sizes. `stored` is the
    relative error of a value kept in the dtype of the inputs, 0 for float32: scores, weights,
    their gradients and each result may be. The bounds follow the formulas, sizes in place of values:
        weights w = softmax(s), s = scale * q.k; out = w v
        dv = w' up; dp = up.v; ds = w * (dp - sum(w * dp)); dq = scale * ds k; dk = scale * ds' q
    """
    q, k, v, upstream = (x.detach().double() for x in (*inputs, upstream_SBNV))
    seq_len, group = len(q), q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    visible = (distance >= 0) & (distance < (window or seq_len))
    seen = min(seq_len, window or seq_len)

    scores = scale * torch.einsum("qbnd,kbnd->bnqk", q, k)
    sizes = scale * torch.einsum("qbnd,kbnd->bnqk", q.abs(), k.abs())
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    score_errors = (q.shape[-1] + 2) * FLOAT32 * sizes + stored * scores.abs()
    # A weight is an exponential over a sum of them: each carries the error of the scores.
    weight_error = 2 * (score_errors * visible).amax(dim=-1, keepdim=True)
    weight_error = weight_error + (seen + 4) * FLOAT32 + stored

    output = torch.einsum("bnqk,kbnv->qbnv", weights, v)
    output_bound = torch.einsum(
        "bnqk,kbnv->qbnv", (weight_error + seen * FLOAT32 + stored) * weights, v.abs()
    )
    v_grad = torch.einsum("bnqk,qbnv->kbnv", weights, upstream)
    v_error = weight_error + (seq_len + group) * FLOAT32 + 2 * stored
    v_bound = torch.einsum("bnqk,qbnv->kbnv", v_error * weights, upstream.abs())

    products = torch.einsum("qbnv,kbnv->bnqk", upstream, v)
    product_sizes = torch.einsum("qbnv,kbnv->bnqk", upstream.abs(), v.abs())
    score_grad = weights * (products - (weights * products).sum(dim=-1, keepdim=True))
    grad_sizes = weights * (product_sizes + (weights * product_sizes).sum(dim=-1, keepdim=True))
    grad_error = 2 * weight_error + (v.shape[-1] + seen + 4) * FLOAT32 + 3 * stored
    grad_error = grad_error + (seq_len + group + 2) * FLOAT32 + 2 * stored  # the last product
    q_grad = scale * torch.einsum("bnqk,kbnd->qbnd", score_grad, k)
    q_bound = scale * torch.einsum("bnqk,kbnd->qbnd", grad_error * grad_sizes, k.abs())
    k_grad = scale * torch.einsum("bnqk,qbnd->kbnd", score_grad, q)
    k_bound = scale * torch.einsum("bnqk,qbnd->kbnd", grad_error * grad_sizes, q.abs())

    def shared(x: Tensor) -> Tensor:
        """Add up what the heads of a group give to the key head they share."""
        return x.unflatten(2, (-1, group)).sum(dim=3)

    return Attention(
        values=(output, q_grad, shared(k_grad), shared(v_grad)),
        bounds=(output_bound, q_bound, shared(k_bound), shared(v_bound)),
    )


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(Heads(3, 3, 8, 8), id="own_keys"),
        pytest.param(Heads(6, 2, 8, 8), id="grouped"),
        pytest.param(Heads(4, 1, 8, 8), id="one_key_head"),
        pytest.param(Heads(3, 3, 12, 6), id="narrow_values"),
        pytest.param(Heads(6, 2, 5, 9), id="grouped_wide_values"),
    ],
)
@pytest.mark.parametrize(("seq_len", "window"), SEQUENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_a_dense_mask(dtype, seq_len, window, heads, generator):
    shapes = (
        (seq_len, BATCH, heads.num_query, heads.key_dim),
        (seq_len, BATCH, heads.num_kv, heads.key_dim),
        (seq_len, BATCH, heads.num_kv, heads.value_dim),
        (seq_len, BATCH, heads.num_query, heads.value_dim),
    )
    *inputs, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    for x in inputs:
        x.requires_grad_()
    scale = heads.key_dim**-0.5
    output = causal_attention(*inputs, window=window, scale=scale)
    assert output.dtype == dtype
    assert output.shape == (seq_len, BATCH, heads.num_query * heads.value_dim)
    gradients = torch.autograd.grad(output, inputs, upstream.flatten(2))
    stored = 0.0 if dtype is torch.float32 else BFLOAT16
    expected = reference(tuple(inputs), upstream, window, scale, stored)
    actual = (output.unflatten(2, (heads.num_query, heads.value_dim)), *gradients)
    for name, ours, value, bound in zip(
        ("output", "q", "k", "v"), actual, expected.values, expected.bounds, strict=True
    ):
        excess = ((ours.double() - value).abs() - bound).max()
        assert excess <= 0, f"{name} is {excess:.1e} beyond its bound"


def test_the_bounds_are_tight_enough_to_notice_one_key_too_many(generator):
    q, k, v, upstream = (torch.randn(63, 1, 2, 8, generator=generator) for _ in range(4))
    for stored in (0.0, BFLOAT16):
        right = reference((q, k, v), upstream, 5, 8**-0.5, stored)
        wrong = reference((q, k, v), upstream, 6, 8**-0.5, stored)
        for value, other, bound in zip(right.values, wrong.values, right.bounds, strict=True):
            assert ((value - other).abs() > bound).any()


@pytest.mark.parametrize(("block", "window"), tuple(itertools.product([1, 2, 5, 16], repeat=2)))
def test_the_mask_of_a_block_is_the_distance_of_key_and_query(block, window):
    mask = window_mask(block, window, torch.device("cpu"))
    assert mask.shape == (block, 2 * block)
    for query, key in itertools.product(range(block), range(2 * block)):
        distance = query - (key - block)  # the first `block` keys are of the block before
        assert bool(mask[query, key]) == (0 <= distance < window)


@pytest.mark.parametrize("window", [1, 5, 16, None])
def test_no_query_sees_beyond_its_window_or_the_future(window, generator):
    seq_len = 63
    q, k, v = (torch.randn(seq_len, 1, 1, 4, generator=generator) for _ in range(3))
    before = causal_attention(q, k, v, window=window, scale=0.5)
    for changed in (0, 20, 62):
        other_k, other_v = k.clone(), v.clone()
        other_k[changed], other_v[changed] = 0.0, 1e4
        after = causal_attention(q, other_k, other_v, window=window, scale=0.5)
        moved = (after != before).any(dim=-1)[:, 0]
        seen = [changed <= t < changed + (window or seq_len) for t in range(seq_len)]
        assert moved.tolist() == seen
