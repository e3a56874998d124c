"""Kernels of flash-attn and Transformer Engine: what they are asked for, and when they are not used.

On a CPU plain torch stands in for them (attention_standins.py). Shapes: S queries, P keys, B batch, N query
heads, M key-value heads, D key head dim, V value head dim.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from megamoe.nn import attention_packages
from megamoe.nn.attention import bounded_attention, causal_attention, continued_attention
from megamoe.nn.attention_documents import boundaries
from megamoe.nn.attention_gpu import (
    BLOCKS,
    DOCUMENTS,
    Case,
    Kind,
    choose,
    is_right,
    run,
    run_documents,
    run_last,
)
from tests.numerics import attention_standins as standins

MODULES = {
    "flash_attn_3": "flash_attn_interface",
    "transformer_engine": "transformer_engine",
    "flash_attn_2": "flash_attn",
}
CASE = Case(
    device=torch.device("cpu"),
    dtype=torch.bfloat16,
    key_dim=192,  # MLA of VAETKI and A.X K1
    value_dim=128,
    group=1,
    kind=Kind.WHOLE,
    has_window=False,
    deterministic=True,
)
MLA, GQA = CASE, replace(CASE, key_dim=64, value_dim=64, group=2)
# Some 20 roundings of bfloat16, 2^-9 each, on the way to a gradient, as in attention_gpu.py.
TOLERANCE = 20 * 2.0**-9
WRONG = {  # of a window of 96 keys, as the trial has it
    "no_window": {"window_size": (-1, -1)},
    "one_key_more": {"window_size": (96, 0)},
    "one_key_less": {"window_size": (94, 0)},
    "aligned_with_the_first_keys": {"bottom_right": False},
    "sees_what_comes": {"causal": False, "window_size": (95, -1)},
    "no_scale": {"scale": 1.0},
}
KINDS = [(name, kind) for name in MODULES for kind in Kind]


@pytest.fixture(autouse=True)
def no_choice_is_remembered():
    yield
    choose.cache_clear()
    attention_packages._dot_product_attention.cache_clear()
    boundaries.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Put packages in place of what is installed, none unless named."""

    def install(modules):
        choose.cache_clear()
        attention_packages._dot_product_attention.cache_clear()
        for name in standins.packages():
            monkeypatch.setitem(sys.modules, name, modules.get(name))  # None: ImportError
        return modules

    return install


def only(name):
    wanted = MODULES[name]
    return {key: m for key, m in standins.packages().items() if key.split(".")[0] == wanted}


@pytest.mark.parametrize("case", [MLA, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_package_that_is_installed_is_used(installed, name, kind, has_window, case):
    installed(only(name))
    assert choose(replace(case, kind=kind, has_window=has_window)) == name


def reference(q, k, v, window, first_SB=None):
    """Return attention in float64, [B, N, S, V]."""
    q, k, v = (x.double() for x in (q, k, v))
    group, earlier = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    distance = torch.arange(q.shape[2])[:, None] + earlier - torch.arange(k.shape[2])
    hidden = (distance < 0) | (distance >= (window or k.shape[2]))
    if first_SB is not None:
        hidden = hidden | (torch.arange(k.shape[2]) < first_SB.T[:, None, :, None])
    scores = torch.einsum("bnsd,bnpd->bnsp", q, k) * 0.1
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


def first_keys(num_queries, num_earlier, begins):
    """Return where the document of each query begins among the keys, [S, B]."""
    positions = torch.arange(num_earlier, num_earlier + num_queries)
    columns = [
        torch.tensor(b)[torch.searchsorted(torch.tensor(b), positions, right=True) - 1]
        for b in begins
    ]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("heads", [(3, 3, 192, 128), (6, 2, 64, 64), (4, 1, 16, 24)])
@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_outputs_and_gradients_are_those_of_all_scores(
    installed, name, kind, window, heads, generator
):
    installed(only(name))
    num_heads, num_kv_heads, key_dim, value_dim = heads
    num_queries, num_keys = 63, 63 if kind is Kind.WHOLE else 100
    shapes = (
        (num_queries, 2, num_heads, key_dim),
        (num_keys, 2, num_kv_heads, key_dim),
        (num_keys, 2, num_kv_heads, value_dim),
        (num_queries, 2, num_heads, value_dim),
    )
    *leaves, upstream = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    for x in leaves:
        x.requires_grad_()
    # As a model has them: sequence first in memory.
    inputs = [x.permute(1, 2, 0, 3) for x in leaves]
    if kind is Kind.WHOLE:
        first, ours = None, run(name, *inputs, window, 0.1)
    elif kind is Kind.LAST:
        first, ours = None, run_last(*inputs, window, 0.1)
    else:
        # Keys that nobody sees, a document before the keys, one of a token, one that ends with the last.
        first = first_keys(num_queries, num_keys - num_queries, [[9, 41, 42, 99], [-5, 60, 70]])
        ours = run_documents(*inputs, window, 0.1, first)
    assert ours is not None
    expected = reference(*inputs, window, first)
    upstream = upstream.permute(1, 2, 0, 3)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, leaves, upstream)),
        (expected, *torch.autograd.grad(expected, leaves, upstream.double())),
        strict=True,
    )
    for mine, value in pairs:
        assert mine.shape == value.shape
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - value).norm() <= TOLERANCE * value.norm()


def test_documents_lie_end_to_end_after_the_keys_that_nobody_sees():
    first = first_keys(4, 2, [[1, 3, 5], [-1, 2]])  # of queries at 2, 3, 4, 5 among 6 keys
    assert first.T.tolist() == [[1, 3, 3, 5], [2, 2, 2, 2]]
    found = boundaries(first, 6)
    #                               first sequence | second
    assert found.queries.tolist() == [0, 0, 1, 3, 4, 4, 8]
    assert found.keys.tolist() == [0, 1, 3, 5, 6, 8, 12]


def test_documents_are_counted_once_for_a_tensor():
    first = torch.zeros(4, 1, dtype=torch.int32)
    assert boundaries(first, 4) is boundaries(first, 4)
    assert boundaries(first.clone(), 4) is not boundaries(first, 4)
    one_document = boundaries(first, 4)
    first[2:] = 2  # a buffer that the next batch is written to
    assert one_document.queries.tolist() == [0, 0, 4]
    assert boundaries(first, 4).queries.tolist() == [0, 0, 2, 4]
    with torch.inference_mode():  # where nothing tells that a tensor is written to
        first = torch.zeros(4, 1, dtype=torch.int32)
        assert boundaries(first, 4).queries.tolist() == [0, 0, 4]
        first[2:] = 2
        assert boundaries(first, 4).queries.tolist() == [0, 0, 2, 4]


def test_the_fastest_that_does_a_case_comes_first(installed):
    modules = installed(standins.packages())
    assert choose(MLA) == "flash_attn_3"
    assert choose(replace(MLA, key_dim=160, value_dim=80)) == "transformer_engine"
    for name, following in (
        ("flash_attn_interface", "transformer_engine"),
        ("transformer_engine.pytorch", "flash_attn_2"),
        ("flash_attn", "flash"),  # torch's own, which a CPU has for a whole sequence
    ):
        del modules[name]
        installed(modules)
        assert choose(MLA) == following
    assert choose(replace(MLA, kind=Kind.LAST)) == BLOCKS
    assert choose(replace(MLA, kind=Kind.DOCUMENTS)) == BLOCKS


def test_nothing_is_imported_on_a_cpu(monkeypatch, generator):
    imported = []
    monkeypatch.setattr(attention_packages, "import_module", imported.append)
    q, k, v = (torch.randn(9, 1, 2, 8, generator=generator).bfloat16() for _ in range(3))
    causal_attention(q, k, v, window=None, scale=1.0)
    continued_attention(q[4:], k, v, window=3, scale=1.0)
    first_SB = torch.zeros(5, 1, dtype=torch.int32)
    bounded_attention(q[4:], k, v, first_SB=first_SB, window=None, scale=1.0)
    assert not imported
    assert not is_right("flash_attn_3", CASE)
    assert imported == ["flash_attn_interface"]


def test_flash_attn_3_may_return_the_logarithm_of_the_sum_as_well(installed):
    installed({"flash_attn_interface": standins.FlashAttn3(returns_sum=True)})
    for kind in Kind:
        assert is_right("flash_attn_3", replace(CASE, kind=kind))


@pytest.mark.parametrize("mode", [False, True])
def test_kernels_are_deterministic_when_torch_is(installed, mode):
    modules = installed(standins.packages())
    torch.use_deterministic_algorithms(mode)
    for name, kind in KINDS:
        assert is_right(name, replace(CASE, kind=kind))
    for name in ("flash_attn", "flash_attn_interface"):
        assert set(modules[name].deterministic) == {mode}
    torch.use_deterministic_algorithms(not mode)  # the module asserts that it was made in this mode
    assert is_right("transformer_engine", CASE)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_package_that_is_wrong_is_not_used(installed, monkeypatch, name, kind, wrong):
    if kind is Kind.WHOLE and wrong == "aligned_with_the_first_keys":
        pytest.skip("it is the same for as many keys as queries")
    installed(only(name))
    right, change = standins.attend, WRONG[wrong]
    monkeypatch.setattr(standins, "attend", lambda *args, **o: right(*args, **(o | change)))
    assert not is_right(name, replace(GQA, kind=kind, has_window=True))


@pytest.mark.parametrize("name", DOCUMENTS.keys() & MODULES.keys())
def test_a_package_that_mixes_documents_is_not_used(installed, monkeypatch, name):
    def mixed(q, k, v, *_, **options):
        return standins.attend(q[None], k[None], v[None], **options)[0]

    installed(only(name))
    monkeypatch.setattr(standins, "attend_each", mixed)
    assert not is_right(name, replace(CASE, kind=Kind.DOCUMENTS))


def test_transformer_engine_may_not_write_out_all_scores(installed, generator):
    class OnlyUnfused(standins.DotProductAttention):
        has_fused_kernel = False

    installed(standins.transformer_engine(OnlyUnfused))
    assert not is_right("transformer_engine", CASE)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator).bfloat16() for _ in range(3))
    with pytest.raises(NotImplementedError, match="no fused kernel for this attention"):
        run("transformer_engine", q, k, v, None, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [MLA, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_package_is_right_on_this_gpu(name, kind, has_window, case):
    if find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed")
    here = replace(case, device=torch.device("cuda"), kind=kind, has_window=has_window)
    assert is_right(name, here)
