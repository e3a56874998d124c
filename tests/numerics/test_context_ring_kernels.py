"""Steps of a ring by kernels: what they give, merged, and when they are not used.

That a ring of them is attention on one rank, in float64, is in test_context_parallel.py: the cases without a window
and documents.
"""

from dataclasses import replace

import pytest
import torch

from megamoe.nn.context_ring_kernels import KERNELS, StepCase, StepKernel, choose, is_right
from tests.numerics import torch_flash

CASE = StepCase(
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    key_dim=192,
    value_dim=128,
    deterministic=True,
)
CPU = KERNELS["flash_on_cpu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(192, 128), (24, 16), (5, 3)])
def test_a_cpu_has_a_kernel(dtype, widths):
    case = replace(CASE, dtype=dtype, key_dim=widths[0], value_dim=widths[1])
    assert not is_right(KERNELS["flash"], case)  # only a GPU has it
    assert choose(case) is CPU


def test_the_kernel_of_a_gpu_is_given_what_it_wants():
    library = torch_flash.library()
    try:
        assert is_right(KERNELS["flash"], CASE)
        assert is_right(KERNELS["flash"], replace(CASE, key_dim=20, value_dim=12))
    finally:
        library._destroy()


def all_seen(step):
    return CPU.forward(replace(step, is_causal=False))


def gradients_of_all_seen(step, grad, result):
    return CPU.backward(replace(step, is_causal=False), grad, result)


def sum_of_powers_of_two(step):
    output, log_sum = CPU.forward(step)
    return output, log_sum / torch.log(torch.tensor(2.0))


def gradients_of_the_step_alone(step, grad, _):
    return CPU.backward(step, grad, CPU.forward(step))


@pytest.mark.parametrize(
    "kernel",
    [
        StepKernel(all_seen, CPU.backward),
        StepKernel(CPU.forward, gradients_of_all_seen),
        StepKernel(sum_of_powers_of_two, CPU.backward),
        StepKernel(CPU.forward, gradients_of_the_step_alone),
    ],
    ids=lambda kernel: f"{kernel.forward.__name__} {kernel.backward.__name__}",
)
def test_a_kernel_that_is_wrong_is_not_used(kernel):
    assert is_right(CPU, CASE)
    assert not is_right(kernel, CASE)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128)])
def test_a_gpu_has_a_kernel(widths, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    key_dim, value_dim = widths
    case = replace(CASE, device=torch.device("cuda"), key_dim=key_dim, value_dim=value_dim)
    assert is_right(KERNELS["flash"], replace(case, deterministic=deterministic))
