"""Causal attention on a GPU with torch alone: its kernels, and which of them a case is given.

A kernel is trusted for a case after it has given the right output and gradients for a small one.
None of them makes a matrix of S times S scores.

Shapes: B batch, N query heads, M key-value heads (N a multiple of M), S sequence, D query and key
head dimension, V value head dimension.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

Kernel = Callable[[Tensor, Tensor, Tensor, int | None, float], Tensor]
BLOCKS = "blocks"  # megamoe/nn/attention.py, which works anywhere
# Of the norm of a result: some 20 roundings of bfloat16, 2^-9 each, on the way to a gradient. A
# window wrong by one key of 96 is off by about 0.1.
_TOLERANCE = 0.04
_PROBE_LEN, _PROBE_WINDOW = 320, 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the choice of a kernel depends on."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    group: int  # query heads that share a key head
    has_window: bool
    deterministic: bool  # some kernels add up gradients in any order and refuse


def case_of(q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, *, has_window: bool) -> Case:
    """Return the case of these operands."""
    return Case(
        device=q_BNSD.device,
        dtype=q_BNSD.dtype,
        key_dim=q_BNSD.shape[-1],
        value_dim=v_BMSV.shape[-1],
        group=q_BNSD.shape[1] // k_BMSD.shape[1],
        has_window=has_window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@cache
def choose(case: Case) -> str:
    """Return the first kernel that does the case right; `blocks` where none does."""
    for name in WINDOW if case.has_window else FULL:
        if is_right(name, case):
            return name
    return BLOCKS


def run(
    name: str, q_BNSD: Tensor, k_BMSD: Tensor, v_BMSV: Tensor, window: int | None, scale: float
) -> Tensor:
    """Return [B, N, S, V] from a kernel by name."""
    kernels = FULL if window is None else WINDOW
    return kernels[name](q_BNSD, k_BMSD, v_BMSV, window, scale)


def is_right(name: str, case: Case) -> bool:
    """Tell whether a kernel gives output and gradients of a small example of the case."""
    window = _PROBE_WINDOW if case.has_window else None
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (1, 2 * case.group, _PROBE_LEN, case.key_dim),
        (1, 2, _PROBE_LEN, case.key_dim),
        (1, 2, _PROBE_LEN, case.value_dim),
        (1, 2 * case.group, _PROBE_LEN, case.value_dim),
    )
    *inputs, upstream = (
        torch.randn(shape, generator=generator).to(case.device, case.dtype) for shape in shapes
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells at length why it does not take a case
            actual = _with_gradients(partial(run, name), inputs, upstream, window)
    except Exception:  # whatever a kernel or a compiler refuses with
        return False
    wide = [x.float() for x in inputs]
    expected = _with_gradients(dense, wide, upstream.float(), window)
    errors = [
        float((ours.float() - value).norm() / value.norm())
        for ours, value in zip(actual, expected, strict=True)
    ]
    return all(error <= _TOLERANCE for error in errors)  # not so with NaN


def _with_gradients(
    kernel: Kernel, inputs: Sequence[Tensor], upstream: Tensor, window: int | None
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of q, k and v."""
    with torch.enable_grad():
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        output = kernel(q, k, v, window, q.shape[-1] ** -0.5)
        return (output.detach(), *torch.autograd.grad(output, (q, k, v), upstream))


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Return attention with all scores written out: what the kernels are tried against."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    positions = torch.arange(q.shape[2], device=q.device)
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= (window or q.shape[2]))
    return (scale * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


def _cudnn(q: Tensor, k: Tensor, v: Tensor, _: int | None, scale: float) -> Tensor:
    """On Hopper values may be narrower than keys, as in MLA."""
    return _by(SDPBackend.CUDNN_ATTENTION, q, k, v, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, _: int | None, scale: float) -> Tensor:
    """Wants one width: zeros add nothing to a score, and nothing is read of a value's."""
    width = v.shape[-1]
    q, k, v = _widened(q, k, v)
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


def _flash_window(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """FlashAttention as torch is built with it; scaled_dot_product_attention hides its window."""
    assert window is not None
    width, seq_len = v.shape[-1], q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in _widened(q, k, v))
    output: Tensor = torch.ops.aten._flash_attention_forward.default(
        *(q, k, v, None, None, seq_len, seq_len, 0.0, True, False),
        scale=scale,
        window_size_left=window - 1,
        window_size_right=0,
    )[0]
    return output[..., :width].transpose(1, 2)


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


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors with zeros up to one width, a multiple of 8 as FlashAttention wants."""
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return tuple(pad(x, (0, width - x.shape[-1])) for x in tensors)


FULL: dict[str, Kernel] = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}
WINDOW: dict[str, Kernel] = {"flash": _flash_window, "flex": _flex}
