"""The kernels for a GPU, as far as a CPU can run them, and the trial that each has to pass.

Shapes: B batch, N heads, S sequence, D head dimension of keys, V of values.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from megamoe.nn import attention_gpu
from megamoe.nn.attention import causal_attention, describe
from megamoe.nn.attention_gpu import BLOCKS, FULL, WINDOW, Case, Kind, choose, dense, is_right
from tests.numerics import torch_flash

CPU = torch.device("cpu")
CASE = Case(
    device=CPU,
    dtype=torch.bfloat16,
    key_dim=24,
    value_dim=16,
    group=1,
    kind=Kind.WHOLE,
    has_window=False,
    deterministic=True,
)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [None, 5, 16])
def test_the_dense_form_is_the_attention_that_trains_on_a_cpu(window, group, generator):
    q, k, v = (
        torch.randn(2, heads, 37, width, generator=generator)
        for heads, width in ((2 * group, 24), (2, 24), (2, 16))
    )
    ours = dense(q, k, v, window, 0.2)
    theirs = causal_attention(*(x.permute(2, 0, 1, 3) for x in (q, k, v)), window=window, scale=0.2)
    # Scores of 24 products, sums over 37 keys, two ways: some 70 roundings each of values below 4.
    assert (ours.permute(2, 0, 1, 3).flatten(2) - theirs).abs().max() <= 2 * 70 * 2.0**-24 * 4


@pytest.mark.parametrize("widths", [(24, 16), (16, 24), (20, 12), (64, 64)])
@pytest.mark.parametrize("group", [1, 2])
def test_flash_takes_keys_and_values_of_two_widths(widths, group):
    key_dim, value_dim = widths
    assert is_right("flash", replace(CASE, key_dim=key_dim, value_dim=value_dim, group=group))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_sees_the_window(monkeypatch, generator):
    monkeypatch.setattr(attention_gpu, "_compiled_flex", lambda: flex_attention)
    q, k, v = (torch.randn(1, 2, 256, width, generator=generator) for width in (16, 16, 16))
    with torch.no_grad():  # torch has no gradient of it on a CPU
        ours = WINDOW["flex"](q, k, v, 96, 0.25)
    expected = dense(q, k, v, 96, 0.25)
    # Scores of 16 products and sums over 96 keys, in blocks: as above.
    assert (ours - expected).abs().max() <= 2 * 120 * 2.0**-24 * 4


def test_a_block_mask_is_made_once():
    assert attention_gpu.block_mask(256, 96, CPU) is attention_gpu.block_mask(256, 96, CPU)


@pytest.mark.parametrize("widths", [(192, 128), (20, 12)])
@pytest.mark.parametrize("group", [1, 2])
def test_the_flash_of_a_gpu_is_given_what_it_wants(widths, group):
    key_dim, value_dim = widths
    case = replace(CASE, key_dim=key_dim, value_dim=value_dim, group=group)
    library = torch_flash.library()
    try:
        for has_window in (False, True):
            for kind in (Kind.LAST, Kind.DOCUMENTS):
                assert is_right("flash", replace(case, kind=kind, has_window=has_window))
        assert is_right("flash", replace(case, has_window=True))
    finally:
        library._destroy()


def test_a_kernel_that_cannot_run_is_not_chosen():
    for name in ("cudnn", "efficient"):
        assert not is_right(name, CASE)
    assert choose(CASE) == "flash"
    assert choose(replace(CASE, has_window=True)) == BLOCKS


def shifted(by, q, k, v, window, scale):
    """Attention whose window is off."""
    return dense(q, k, v, window + by, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize("group", [1, 8])
def test_the_flash_of_this_gpu_is_right(kind, has_window, group):
    cuda = torch.device("cuda")
    case = replace(CASE, device=cuda, key_dim=128, value_dim=128, group=group, kind=kind)
    assert is_right("flash", replace(case, has_window=has_window))


@pytest.mark.parametrize("by", [-1, 1])
def test_a_window_that_is_off_by_one_does_not_pass(monkeypatch, by):
    case = replace(CASE, has_window=True, key_dim=192, value_dim=128)
    monkeypatch.setitem(WINDOW, "flash", dense)
    assert is_right("flash", case)
    monkeypatch.setitem(WINDOW, "flash", partial(shifted, by))
    assert not is_right("flash", case)


def test_a_kernel_that_forgets_the_scale_does_not_pass(monkeypatch):
    monkeypatch.setitem(FULL, "flash", lambda q, k, v, window, _: dense(q, k, v, window, 1.0))
    assert not is_right("flash", CASE)


def test_a_kernel_that_gives_nan_does_not_pass(monkeypatch):
    monkeypatch.setitem(FULL, "flash", lambda q, k, v, *_: (q + k) / 0 * v.sum())
    assert not is_right("flash", replace(CASE, value_dim=24))


def test_what_is_described_for_a_cpu_is_what_it_does():
    others = dict.fromkeys(("window", "halo", "documents"), "blocks")
    assert describe(CPU, 192, 128) == {"full": "scaled_dot_product_attention"} | others
