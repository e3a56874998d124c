"""Products of groups of rows against float64, outputs and gradients, however the rows fall.

Shapes: T rows sorted by group, E groups, I inner and O outer dimension.
"""

import pytest
import torch

from megamoe.nn.grouped import OneByOne, OneKernel, grouped_linear, is_served

FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # the largest relative error of one rounding
COUNTS = {
    "uneven": [31, 2, 50, 17],
    "empty groups": [0, 63, 0, 37],
    "one row": [0, 0, 1, 0],
    "all in one": [0, 100, 0, 0],
    "one a group": [1, 1, 1, 1],
    "no rows": [0, 0, 0, 0],
}
SHAPES = [(32, 48), (8, 16), (63, 100), (5, 7)]  # the first two are rows of whole 16 bytes


def operands(counts, inner, outer, dtype, generator):
    rows = sum(counts)
    shapes = ((rows, inner), (len(counts), outer, inner), (rows, outer))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def by_group(x, weight, upstream, counts):
    """Return output, gradient of the rows and of the weights."""
    parts = list(zip(x.split(counts), weight, upstream.split(counts), strict=True))
    return (
        torch.cat([rows @ matrix.T for rows, matrix, _ in parts]),
        torch.cat([up @ matrix for _, matrix, up in parts]),
        torch.stack([up.T @ rows for rows, _, up in parts]),
    )


def check(function, counts, inner, outer, dtype, generator):
    """A sum of n products errs by at most n roundings of the sum of their sizes, and one stored."""
    x, weight, upstream = operands(counts, inner, outer, dtype, generator)
    x.requires_grad_()
    weight.requires_grad_()
    output = function(x, weight)
    assert output.dtype == dtype
    actual = (output, *torch.autograd.grad(output, (x, weight), upstream))
    inputs = [tensor.detach().double() for tensor in (x, weight, upstream)]
    values = by_group(*inputs, counts)
    sizes = by_group(*(tensor.abs() for tensor in inputs), counts)
    stored = 0.0 if dtype is torch.float32 else BFLOAT16
    for ours, value, size, terms in zip(
        actual, values, sizes, (inner, outer, max(counts)), strict=True
    ):
        assert not ours.isnan().any()
        assert ((ours.double() - value).abs() <= (terms * FLOAT32 + stored) * size).all()


def ends(counts):
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_those_of_each_group(dtype, inner, outer, counts, generator):
    def function(x, weight):
        return grouped_linear(x, weight, torch.tensor(counts))

    check(function, counts, inner, outer, dtype, generator)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_by_one_gives_the_same_where_torch_could_do_all(dtype, counts, generator):
    check(lambda x, weight: OneByOne.apply(x, weight, counts), counts, 32, 48, dtype, generator)


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "no rows"])
def test_the_kernel_of_a_gpu_gives_the_same_as_torch_does_it_here(name, generator):
    counts = COUNTS[name]
    assert is_served(torch.device("cpu"), torch.bfloat16, (48, 32)), "grouped_mm is not tested"
    check(
        lambda x, weight: OneKernel.apply(x, weight, ends(counts)),
        counts,
        32,
        48,
        torch.bfloat16,
        generator,
    )


@pytest.mark.parametrize("shape", [(48, 31), (47, 32), (48, 4)])
def test_rows_that_are_not_whole_16_bytes_go_one_by_one(shape):
    assert not is_served(torch.device("cpu"), torch.bfloat16, shape)
    assert not is_served(torch.device("cuda"), torch.bfloat16, shape)


def test_float64_goes_one_by_one(generator):
    x, weight, _ = operands([3, 0, 5, 1], 8, 16, torch.float64, generator)
    assert not is_served(x.device, x.dtype, weight.shape[1:])
    x.requires_grad_()
    weight.requires_grad_()
    counts = torch.tensor([3, 0, 5, 1])
    assert torch.autograd.gradcheck(lambda *both: grouped_linear(*both, counts), (x, weight))


def test_the_bound_notices_a_row_in_the_wrong_group(generator):
    counts, wrong = [31, 2, 50, 17], [32, 1, 50, 17]
    with pytest.raises(AssertionError):
        check(
            lambda x, weight: grouped_linear(x, weight, torch.tensor(wrong)),
            counts,
            32,
            48,
            torch.bfloat16,
            generator,
        )


def test_a_gradient_that_is_not_contiguous_is_taken(generator):
    x, weight, _ = operands([3, 0, 5, 1], 32, 48, torch.float32, generator)
    x.requires_grad_()
    weight.requires_grad_()
    grouped_linear(x, weight, torch.tensor([3, 0, 5, 1])).sum().backward()  # strides of 0
    assert torch.equal(weight.grad[1], torch.zeros(48, 32))
    assert x.grad is not None
