"""Causal attention on a GPU: the kernels there are, and which of them a case is given.

Those of packages come first, where they are installed (megamoe/nn/attention_packages.py), then torch's
own. A kernel is trusted for a case after it has given the right output and gradients for a small one.
None of them makes a matrix of S times S scores.

Shapes: B batch, N query heads, M key-value heads (N a multiple of M), S queries, P keys, D query and
key head dimension, V value head dimension.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megamoe.nn import attention_packages
from megamoe.nn.attention_documents import Boundaries, boundaries, in_one_row, in_rows
from megamoe.nn.attention_packages import reach, widened

Kernel = Callable[[Tensor, Tensor, Tensor, int | None, float], Tensor]
DocumentKernel = Callable[[Tensor, Tensor, Tensor, int | None, float, Boundaries], Tensor]
BLOCKS = "blocks"  # megamoe/nn/attention.py, which works anywhere
# Of the norm of a result: some 20 roundings of bfloat16, 2^-9 each, on the way to a gradient. A
# window wrong by one key of 96 is off by about 0.1.
_TOLERANCE = 0.04
_PROBE_LEN, _PROBE_WINDOW, _PROBE_EARLIER = 320, 96, 95
# Where documents begin: the first after keys that nobody sees, one of a single token, and one long
# enough that a window wrong by one key shows.
_PROBE_DOCUMENTS = (20, 130, 131)


class Kind(StrEnum):
    """Which keys there are for the queries."""

    WHOLE = "whole"  # those of the same positions
    LAST = "last"  # those of earlier positions, too: after a halo or a cache
    DOCUMENTS = "documents"  # as LAST; a query sees its own document alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the choice of a kernel depends on."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    group: int  # query heads that share a key head
    kind: Kind
    has_window: bool
    deterministic: bool  # some kernels add up gradients in any order and refuse


def case_of(
    q_BNSD: Tensor, k_BMPD: Tensor, v_BMPV: Tensor, *, kind: Kind, has_window: bool
) -> Case:
    """Return the case of these operands."""
    return Case(
        device=q_BNSD.device,
        dtype=q_BNSD.dtype,
        key_dim=q_BNSD.shape[-1],
        value_dim=v_BMPV.shape[-1],
        group=q_BNSD.shape[1] // k_BMPD.shape[1],
        kind=kind,
        has_window=has_window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@cache
def choose(case: Case) -> str:
    """Return the first kernel that does the case right; `blocks` where none does."""
    names: dict[Kind, Iterable[str]] = {
        Kind.WHOLE: WINDOW if case.has_window else FULL,
        Kind.LAST: LAST,
        Kind.DOCUMENTS: DOCUMENTS,
    }
    for name in names[case.kind]:
        if is_right(name, case):
            return name
    return BLOCKS


def run(
    name: str, q_BNSD: Tensor, k_BMPD: Tensor, v_BMPV: Tensor, window: int | None, scale: float
) -> Tensor:
    """Return [B, N, S, V] from a kernel by name."""
    whole = FULL if window is None else WINDOW
    kernels = whole if q_BNSD.shape[2] == k_BMPD.shape[2] else LAST
    return kernels[name](q_BNSD, k_BMPD, v_BMPV, window, scale)


def run_last(
    q_BNSD: Tensor, k_BMPD: Tensor, v_BMPV: Tensor, window: int | None, scale: float
) -> Tensor | None:
    """Return [B, N, S, V] where the queries are of the last positions; None: no kernel does it."""
    kernel = choose(case_of(q_BNSD, k_BMPD, v_BMPV, kind=Kind.LAST, has_window=window is not None))
    return None if kernel == BLOCKS else run(kernel, q_BNSD, k_BMPD, v_BMPV, window, scale)


def run_documents(
    q_BNSD: Tensor,
    k_BMPD: Tensor,
    v_BMPV: Tensor,
    window: int | None,
    scale: float,
    first_SB: Tensor,
) -> Tensor | None:
    """Return [B, N, S, V] where a query sees its own document alone; None: no kernel does it.

    Args:
        q_BNSD: queries of the last positions.
        k_BMPD: keys.
        v_BMPV: values.
        window: number of keys a query sees at most.
        scale: factor of the scores before the softmax.
        first_SB: where the document of each query begins, counted among the keys.
    """
    kernel = choose(
        case_of(q_BNSD, k_BMPD, v_BMPV, kind=Kind.DOCUMENTS, has_window=window is not None)
    )
    if kernel == BLOCKS:
        return None
    documents = boundaries(first_SB, k_BMPD.shape[2])
    return DOCUMENTS[kernel](q_BNSD, k_BMPD, v_BMPV, window, scale, documents)


def is_right(name: str, case: Case) -> bool:
    """Tell whether a kernel gives output and gradients of a small example of the case."""
    window = _PROBE_WINDOW if case.has_window else None
    num_queries = _PROBE_LEN - (0 if case.kind is Kind.WHOLE else _PROBE_EARLIER)
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (1, 2 * case.group, num_queries, case.key_dim),
        (1, 2, _PROBE_LEN, case.key_dim),
        (1, 2, _PROBE_LEN, case.value_dim),
        (1, 2 * case.group, num_queries, case.value_dim),
    )
    *inputs, upstream = (
        torch.randn(shape, generator=generator).to(case.device, case.dtype) for shape in shapes
    )
    kernel: Kernel = partial(run, name)
    reference: Kernel = dense
    if case.kind is Kind.DOCUMENTS:
        first_SB = _first_of_probe(case.device)
        documents = boundaries(first_SB, _PROBE_LEN)
        kernel = _within(documents, DOCUMENTS[name])
        reference = partial(dense, first_SB=first_SB)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells at length why it does not take a case
            actual = _with_gradients(kernel, inputs, upstream, window)
    except Exception:  # whatever a kernel or a compiler refuses with; a package that is not there
        return False
    wide = [x.float() for x in inputs]
    expected = _with_gradients(reference, wide, upstream.float(), window)
    return agree(actual, expected)


def agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Tell whether output and gradients of a trial are those expected, up to rounding."""
    errors = [
        float((ours.float() - value).norm() / value.norm())
        for ours, value in zip(actual, expected, strict=True)
    ]
    return all(error <= _TOLERANCE for error in errors)  # not so with NaN


def _within(documents: Boundaries, kernel: DocumentKernel) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        return kernel(q, k, v, window, scale, documents)

    return attend


def _first_of_probe(device: torch.device) -> Tensor:
    queries = torch.arange(_PROBE_EARLIER, _PROBE_LEN)
    starts = torch.tensor(_PROBE_DOCUMENTS)
    return starts[torch.searchsorted(starts, queries, right=True) - 1][:, None].to(device)


def _with_gradients(
    kernel: Kernel, inputs: Sequence[Tensor], upstream: Tensor, window: int | None
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of q, k and v."""
    with torch.enable_grad():
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        output = kernel(q, k, v, window, q.shape[-1] ** -0.5)
        return (output.detach(), *torch.autograd.grad(output, (q, k, v), upstream))


def dense(
    q_BNSD: Tensor,
    k_BMPD: Tensor,
    v_BMPV: Tensor,
    window: int | None,
    scale: float,
    first_SB: Tensor | None = None,
) -> Tensor:
    """Return attention with all scores written out: what the kernels are tried against."""
    k, v = (x.repeat_interleave(q_BNSD.shape[1] // x.shape[1], dim=1) for x in (k_BMPD, v_BMPV))
    keys = torch.arange(k.shape[2], device=q_BNSD.device)
    distance = keys[k.shape[2] - q_BNSD.shape[2] :, None] - keys
    hidden = (distance < 0) | (distance >= (window or k.shape[2]))
    if first_SB is not None:
        hidden = hidden | (keys < first_SB.T[:, None, :, None])
    scores = (scale * q_BNSD @ k.mT).masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1) @ v


def _cudnn(q: Tensor, k: Tensor, v: Tensor, _: int | None, scale: float) -> Tensor:
    """On Hopper values may be narrower than keys, as in MLA."""
    return _by(SDPBackend.CUDNN_ATTENTION, q, k, v, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, _: int | None, scale: float) -> Tensor:
    """Wants one width."""
    width = v.shape[-1]
    q, k, v = widened(q, k, v)
    return _by(SDPBackend.FLASH_ATTENTION, q, k, v, scale)[..., :width]


def _efficient(q: Tensor, k: Tensor, v: Tensor, _: int | None, scale: float) -> Tensor:
    """Slower, less particular about widths; it does not share key heads."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return _by(SDPBackend.EFFICIENT_ATTENTION, q, k, v, scale)


def _by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )


def _flash_last(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """FlashAttention as torch is built with it; scaled_dot_product_attention hides its window.

    Queries are aligned with the last keys.
    """
    rows = [x.transpose(1, 2) for x in widened(q, k, v)]
    output = _flash_attention(rows, (None, None), (q.shape[2], k.shape[2]), window, scale)
    return output[..., : v.shape[-1]].transpose(1, 2)


def _flash_documents(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, documents: Boundaries
) -> Tensor:
    """The same with sequences of several lengths."""
    rows = [in_one_row(x) for x in widened(q, k, v)]
    begins = (documents.queries, documents.keys)
    output = _flash_attention(rows, begins, (q.shape[2], k.shape[2]), window, scale)
    return in_rows(output[..., : v.shape[-1]], len(q))


def _flash_attention(
    rows: Sequence[Tensor],
    begins: tuple[Tensor | None, Tensor | None],
    longest: tuple[int, int],
    window: int | None,
    scale: float,
) -> Tensor:
    before, after = reach(window)
    output: Tensor = torch.ops.aten._flash_attention_forward.default(
        *(*rows, *begins, *longest, 0.0, True, False),
        scale=scale,
        window_size_left=before,
        window_size_right=after,
    )[0]
    return output


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """FlexAttention, compiled by triton for each shape, with a map of the blocks to visit."""
    assert window is not None
    mask = block_mask(q.shape[2], window, q.device)
    output: Tensor = _compiled_flex()(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output


@cache
def block_mask(seq_len: int, window: int, device: torch.device) -> BlockMask:
    """Return which blocks of keys the blocks of queries see; kept, as making it takes a while."""

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(sees, None, None, seq_len, seq_len, device=str(device))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


_PACKAGES: dict[str, Kernel] = {
    "flash_attn_3": attention_packages.flash_attn_3,
    "transformer_engine": attention_packages.transformer_engine,
    "flash_attn_2": attention_packages.flash_attn_2,
}
FULL: dict[str, Kernel] = _PACKAGES | {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}
WINDOW: dict[str, Kernel] = _PACKAGES | {"flash": _flash_last, "flex": _flex}
LAST: dict[str, Kernel] = _PACKAGES | {"flash": _flash_last}
DOCUMENTS: dict[str, DocumentKernel] = {
    "flash_attn_3": attention_packages.flash_attn_3_documents,
    "transformer_engine": attention_packages.transformer_engine_documents,
    "flash_attn_2": attention_packages.flash_attn_2_documents,
    "flash": _flash_documents,
}
