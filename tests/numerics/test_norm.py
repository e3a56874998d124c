"""RMSNorm against float64, outputs and gradients."""

import pytest
import torch

from megamoe.nn.norm import RMSNorm

EPS = 1e-5
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # the largest relative error of one rounding


def reference(x_TD, weight_D, upstream_TD, *, zero_centered):
    """Return output, gradient of input and of weight, by hand, in float64.

    With r = 1 / sqrt(mean(x^2) + eps), gain g and u = upstream * g:
    dx = r * u - r^3 * x * mean(u * x), dweight = sum over tokens of upstream * x * r.
    """
    x_TD, weight_D, upstream_TD = x_TD.double(), weight_D.double(), upstream_TD.double()
    gain_D = weight_D + 1 if zero_centered else weight_D
    scale_T1 = (x_TD.square().mean(dim=-1, keepdim=True) + EPS) ** -0.5
    gained_TD = upstream_TD * gain_D
    mean_T1 = (gained_TD * x_TD).mean(dim=-1, keepdim=True)
    x_grad_TD = scale_T1 * gained_TD - scale_T1**3 * x_TD * mean_T1
    return x_TD * scale_T1 * gain_D, x_grad_TD, (upstream_TD * x_TD * scale_T1).sum(dim=0)


def inputs(num_tokens, dim, dtype, generator, *, zero_centered):
    """Return input, weight and upstream gradient, all random; tokens differ in size by 100."""
    size_T1 = torch.logspace(-1, 1, num_tokens)[:, None]
    x_TD = (torch.randn(num_tokens, dim, generator=generator) * size_T1).to(dtype)
    weight_D = torch.randn(dim, generator=generator) * 0.2 + (0 if zero_centered else 1)
    upstream_TD = torch.randn(num_tokens, dim, generator=generator).to(dtype)
    return x_TD, weight_D, upstream_TD


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dim", [1, 63, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_float64(dtype, dim, zero_centered, generator):
    x_TD, weight_D, upstream_TD = inputs(37, dim, dtype, generator, zero_centered=zero_centered)
    norm = RMSNorm(dim, eps=EPS, zero_centered=zero_centered)
    with torch.no_grad():
        norm.weight.copy_(weight_D)
    x_TD.requires_grad_()
    output_TD = norm(x_TD)
    output_TD.backward(upstream_TD)
    expected = reference(x_TD.detach(), weight_D, upstream_TD, zero_centered=zero_centered)
    assert output_TD.dtype == x_TD.grad.dtype == dtype
    assert norm.weight.grad.dtype == torch.float32

    # A mean of `dim` squares errs by at most dim roundings, its root by half of that; square root,
    # reciprocal, division, eps and the two products add 6. Only the result is rounded to bfloat16.
    ulps = dim / 2 + 6
    storage = BFLOAT16 if dtype is torch.bfloat16 else 0.0
    bound_TD = (ulps * FLOAT32 + storage) * expected[0].abs()
    assert ((output_TD.double() - expected[0]).abs() <= bound_TD).all()

    # The two terms of dx cancel, so the error is relative to their sizes, not to their difference:
    # the second is a product of the scale cubed (three times its error) and a mean of dim products.
    gain_D = weight_D.double() + 1 if zero_centered else weight_D.double()
    x_double_TD = x_TD.detach().double()
    scale_T1 = (x_double_TD.square().mean(dim=-1, keepdim=True) + EPS) ** -0.5
    gained_TD = (upstream_TD.double() * gain_D).abs()
    mean_T1 = (gained_TD * x_double_TD.abs()).mean(dim=-1, keepdim=True)
    size_TD = scale_T1 * gained_TD + scale_T1**3 * x_double_TD.abs() * mean_T1
    bound_TD = (3 * ulps + dim + 6) * FLOAT32 * size_TD + storage * expected[1].abs()
    assert ((x_TD.grad.double() - expected[1]).abs() <= bound_TD).all()

    # A sum over 37 tokens of products that carry the scale's error; never rounded to bfloat16.
    size_D = (upstream_TD.double() * x_double_TD * scale_T1).abs().sum(dim=0)
    bound_D = (ulps + 37 + 3) * FLOAT32 * size_D
    assert ((norm.weight.grad.double() - expected[2]).abs() <= bound_D).all()


def test_a_new_norm_of_either_kind_scales_by_one():
    x_TD = torch.tensor([[3.0, 4.0]])
    expected_TD = x_TD / 12.5**0.5
    for zero_centered in (False, True):
        norm = RMSNorm(2, eps=1e-12, zero_centered=zero_centered)
        assert norm.weight.unique().tolist() == [0.0 if zero_centered else 1.0]
        # One value, four roundings: root, reciprocal and two products.
        torch.testing.assert_close(norm(x_TD), expected_TD, rtol=4 * FLOAT32, atol=0.0)


def test_the_statistic_of_bfloat16_is_a_float32_sum():
    # In bfloat16 a sum of ones stops at 256, and the scale of 4,096 ones would be 4.
    ones_TD = torch.ones(1, 4_096, dtype=torch.bfloat16)
    assert (RMSNorm(4_096, eps=1e-12, zero_centered=False)(ones_TD) == 1).all()


def test_eps_keeps_zeros_and_their_gradients_finite():
    x_TD = torch.zeros(2, 63, requires_grad=True)
    output_TD = RMSNorm(63, eps=EPS, zero_centered=False)(x_TD)
    output_TD.sum().backward()
    assert (output_TD == 0).all()
    # dy/dx = 1 / sqrt(eps) where x is 0.
    torch.testing.assert_close(x_TD.grad, torch.full((2, 63), EPS**-0.5), rtol=1e-6, atol=0.0)
