"""The residual of Peri-LN: residual + norm(branch), and nothing else."""

import pytest
import torch

from megamoe.nn.norm import RMSNorm
from megamoe.nn.residual import NormedResidual

FLOAT32 = 2.0**-24


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_branch_is_normed_and_the_residual_is_not(has_bias, generator):
    branch_TD, residual_TD = (torch.randn(100, 63, generator=generator) for _ in range(2))
    bias_D = torch.randn(63, generator=generator) if has_bias else None
    norm = RMSNorm(63, eps=1e-5, zero_centered=True)
    with torch.no_grad():
        norm.weight.normal_(std=0.2, generator=generator)
    for x in (branch_TD, residual_TD):
        x.requires_grad_()
    add = NormedResidual(norm)(training=True, fused=False)
    output_TD = add((branch_TD, bias_D), residual_TD, 0.0)
    output_TD.backward(torch.ones_like(output_TD))

    biased_TD = branch_TD.detach().double() + (bias_D.double() if has_bias else 0)
    scale_T1 = (biased_TD.square().mean(dim=-1, keepdim=True) + 1e-5) ** -0.5
    normed_TD = biased_TD * scale_T1 * (1 + norm.weight.detach().double())
    # Half of 63 roundings of the statistic, 6 of the norm, one of each sum.
    bound_TD = (63 / 2 + 8) * FLOAT32 * (normed_TD.abs() + residual_TD.detach().abs() + 1)
    expected_TD = residual_TD.detach().double() + normed_TD
    assert ((output_TD.detach().double() - expected_TD).abs() <= bound_TD).all()
    assert (residual_TD.grad == 1).all()
    assert branch_TD.grad.abs().sum() > 0


def test_dropout_is_of_the_normed_branch_and_only_while_training(generator):
    branch_TD, residual_TD = torch.ones(2, 1_000, 2).unbind()
    connect = NormedResidual(RMSNorm(2, eps=1e-12, zero_centered=True))
    torch.manual_seed(7)
    dropped_TD = connect(training=True, fused=False)((branch_TD, None), residual_TD, 0.5)
    assert set(dropped_TD.unique().tolist()) == {1.0, 3.0}
    kept_TD = connect(training=False, fused=False)((branch_TD, None), residual_TD, 0.5)
    assert kept_TD.unique().tolist() == [2.0]
