"""Steps of a ring by kernels: what they give, merged, and when they are not used.

That a ring of them is attention on one rank, in float64, is in test_context_parallel.py: the cases without a window.
"""

import sys
from dataclasses import replace

import pytest
import torch

from megamoe.nn.context_ring_kernels import KERNELS, StepCase, choose, is_right
from megamoe.nn.context_ring_step import Step, StepKernel, merge_into
from tests.numerics import attention_standins, ring_standins, torch_flash

CASE = StepCase(
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    key_dim=192,
    value_dim=128,
    has_documents=False,
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


@pytest.fixture
def installed(monkeypatch):
    """Put a package in place of what is installed, none unless named; return the module that is called."""
    everything = set(attention_standins.packages())
    everything.update(*(ring_standins.modules(name) for name in ring_standins.PACKAGES))

    def install(name=None):
        choose.cache_clear()
        modules = {} if name is None else ring_standins.modules(name)
        for each in everything:
            monkeypatch.setitem(sys.modules, each, modules.get(each))  # None: ImportError
        return list(modules.values())[-1] if modules else None

    yield install
    choose.cache_clear()


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128)])
@pytest.mark.parametrize("name", ring_standins.PACKAGES)
def test_a_package_that_is_installed_is_used(installed, name, widths, has_documents):
    installed(name)
    case = replace(CASE, key_dim=widths[0], value_dim=widths[1], has_documents=has_documents)
    kernel = KERNELS[name.split(" ")[0]]
    assert choose(case) is kernel
    assert not is_right(kernel, replace(case, dtype=torch.float32))
    installed()
    assert choose(case) is CPU


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("name", ring_standins.PACKAGES)
def test_steps_of_a_package_are_attention_with_all_scores(installed, name, is_cut, generator):
    """Two steps of a batch, one with fewer keys than queries; gradients of each by the merged result."""
    installed(name)
    kernel = KERNELS[name.split(" ")[0]]
    num_queries, num_earlier, num_heads = 37, 21, 3
    lengths = (num_queries, *(num_earlier + num_queries,) * 2, num_queries)
    *leaves, upstream = (
        # As a model has them: sequence first in memory.
        torch.randn(length, 2, num_heads, width, generator=generator).bfloat16().permute(1, 2, 0, 3)
        for length, width in zip(lengths, (192, 192, 128, 128), strict=True)
    )
    q, k, v = leaves
    steps = [
        Step(
            query=q,
            key=k[:, :, keys],
            value=v[:, :, keys],
            is_causal=is_causal,
            is_cut=is_cut,
            scale=0.1,
        )
        for keys, is_causal in ((slice(num_earlier), False), (slice(num_earlier, None), True))
    ]
    (earlier, log_sum), own = (kernel.forward(step) for step in steps)
    merged = earlier.float(), log_sum
    merge_into(merged, own)
    result = merged[0].bfloat16(), merged[1]
    (q1, *of_earlier), (q2, *of_own) = (kernel.backward(step, upstream, result) for step in steps)
    ours = [merged[0], q1.float() + q2.float()]
    ours += [torch.cat(both, dim=2) for both in zip(of_earlier, of_own, strict=True)]
    wide = [x.double().requires_grad_() for x in leaves]
    scores = torch.einsum("bnqd,bnkd->bnqk", *wide[:2]) * 0.1
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(num_earlier + 1)
    output = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ wide[2]
    expected = [output, *torch.autograd.grad(output, wide, upstream.double())]
    for mine, value in zip(ours, expected, strict=True):
        assert mine.shape == value.shape
        # Some 20 roundings of bfloat16, 2^-9 each, on the way to a gradient, as in attention_gpu.py.
        assert (mine.double() - value).norm() <= 20 * 2.0**-9 * value.norm()


@pytest.mark.parametrize("name", ["transformer_engine 2.14", "transformer_engine 2.18"])
def test_documents_of_any_length_take_few_plans_of_cudnn(installed, name, generator):
    standin = installed(name)
    kernel = KERNELS["transformer_engine"]
    lengths = [(1, 1), (3, 90), (129, 7), (7, 300), *((i, i) for i in range(120, 140))]
    for num_queries, num_keys in lengths:
        q, k, value = (
            torch.randn(1, 2, length, width, generator=generator).bfloat16()
            for length, width in ((num_queries, 192), (num_keys, 192), (1, 128))
        )
        is_causal = num_queries == num_keys
        v = value.expand(-1, -1, num_keys, -1)
        step = Step(query=q, key=k, value=v, is_causal=is_causal, is_cut=True, scale=0.1)
        output, log_sum = kernel.forward(step)
        assert (output - value).abs().max() <= 2.0**-7 * value.abs().max()  # weights sum to 1
        assert [x.shape for x in kernel.backward(step, output, (output, log_sum))] == [
            x.shape for x in step.tensors
        ]
    assert standin.lengths == {128, 256, 512}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ring_standins.PACKAGES)
def test_a_package_is_told_whether_results_must_be_the_same_again(installed, name, deterministic):
    standin = installed(name)
    torch.use_deterministic_algorithms(deterministic)  # conftest.py sets it back
    choose(replace(CASE, deterministic=deterministic))
    assert standin.deterministic == [deterministic] * 2


def test_a_version_with_other_arguments_is_not_used(installed, monkeypatch):
    standin = installed("flash_attn_2")
    monkeypatch.setattr(standin, "_flash_attn_backward", lambda dout, q, k, v, scale: None)
    assert choose(CASE) is CPU


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
