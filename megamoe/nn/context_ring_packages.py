"""Steps of a ring by packages that may be installed: flash-attn 3 and 2, Transformer Engine.

Attention as a whole has public functions (megamoe/nn/attention_packages.py); its gradients for a softmax over
other keys, too, are had from the functions below them alone, as these packages' own context parallelism has
them. Their arguments are those of flash-attn 2.7 to 2.8, of its `hopper` folder, which is flash-attn 3, from
2.8.0 to August 2026, and of Transformer Engine 2.0 to 2.18. With another version the trial of
megamoe/nn/context_ring_kernels.py fails, and the next kernel is tried.

Shapes: B batch, N heads, Q queries, K keys.
"""

from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megamoe.nn.attention_packages import widened
from megamoe.nn.context_ring_step import Result, Step, StepKernel, Tensors, narrowed


def _flash_attn_3(step: Step) -> Result:
    q, k, v = (x.transpose(1, 2) for x in step.tensors)
    # Of lengths, caches, positions and scales of 8-bit numbers there are none.
    found = import_module("flash_attn_interface")._flash_attn_forward(
        q, k, v, *[None] * 20, step.scale, step.is_causal
    )
    return found[0].transpose(1, 2), found[1]


def _flash_attn_3_gradients(step: Step, grad: Tensor, result: Result) -> Tensors:
    q, k, v, output, upstream = (x.transpose(1, 2) for x in (*step.tensors, result[0], grad))
    grads = _like(q, k, v)
    import_module("flash_attn_interface")._flash_attn_backward(
        *(upstream, q, k, v, output, result[1], *[None] * 6, *grads, step.scale, step.is_causal),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _transposed(grads)


def _flash_attn_2(step: Step) -> Result:
    q, k, v = (x.transpose(1, 2) for x in widened(*step.tensors))
    found = import_module("flash_attn.flash_attn_interface")._flash_attn_forward(
        *(q, k, v), return_softmax=False, **_flash_attn_2_options(step)
    )
    return found[0][..., : step.value.shape[-1]].transpose(1, 2), found[1]


def _flash_attn_2_gradients(step: Step, grad: Tensor, result: Result) -> Tensors:
    q, k, v, output, upstream = (x.transpose(1, 2) for x in widened(*step.tensors, result[0], grad))
    grads = _like(q, k, v)
    import_module("flash_attn.flash_attn_interface")._flash_attn_backward(
        *(upstream, q, k, v, output, result[1], *grads),
        **_flash_attn_2_options(step),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return narrowed(_transposed(grads), step)


def _flash_attn_2_options(step: Step) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": step.scale,
        "causal": step.is_causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _transformer_engine(step: Step) -> Result:
    fused = import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    rows = [_with_room(x, step) for x in step.tensors]
    output, (log_sum, *_) = fused.fused_attn_fwd(
        *(True, *_lengths(step), *rows, step.query.dtype),
        fused.FusedAttnBackend["F16_arbitrary_seqlen"],
        **_transformer_engine_options(step),
    )
    num_queries = step.query.shape[2]
    return output[:num_queries].permute(1, 2, 0, 3), log_sum[:, :, :num_queries, 0]


def _transformer_engine_gradients(step: Step, grad: Tensor, result: Result) -> Tensors:
    fused = import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    rows = [_with_room(x, step) for x in (*step.tensors, result[0], grad)]
    options = _transformer_engine_options(step)
    if "dqkv_dtype" in signature(fused.fused_attn_bwd).parameters:  # before 2.15
        dtypes = import_module("transformer_engine.pytorch.constants").TE_DType
        options["dqkv_dtype"] = dtypes[step.query.dtype]
    else:
        options["dqkv_layout"] = options["qkv_layout"]
    num_queries = step.query.shape[2]
    log_sum = result[1]
    if room := _room(num_queries, step) - num_queries:
        log_sum = pad(log_sum, (0, room))
    no_dropout = torch.zeros(2, dtype=torch.int64, device=grad.device)  # state of random numbers
    grads = fused.fused_attn_bwd(
        *(*_lengths(step), *rows),
        fake_dtype=step.query.dtype,
        aux_ctx_tensors=[log_sum[..., None], no_dropout],
        fused_attention_backend=fused.FusedAttnBackend["F16_arbitrary_seqlen"],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )
    grad_q, grad_k, grad_v = (
        found[: x.shape[2]].permute(1, 2, 0, 3)
        for found, x in zip(grads[:3], step.tensors, strict=True)
    )
    return grad_q, grad_k, grad_v


def _transformer_engine_options(step: Step) -> dict[str, Any]:
    mask = "causal" if step.is_causal else "no_mask"
    if step.is_cut:
        mask = "padding_causal" if step.is_causal else "padding"
    return {
        "attn_scale": step.scale,
        "qkv_layout": "sbhd_sbhd_sbhd",
        "attn_mask_type": mask,
        "window_size": (-1, 0 if step.is_causal else -1),
    }


def _lengths(step: Step) -> tuple[int, int, Tensor, Tensor]:
    """Return the room of queries and of keys, and the sums of their numbers over the batch."""
    batch = step.query.shape[0]
    num_queries, num_keys = step.query.shape[2], step.key.shape[2]
    begins_q, begins_k = (
        torch.arange(batch + 1, dtype=torch.int32, device=step.query.device) * length
        for length in (num_queries, num_keys)
    )
    return _room(num_queries, step), _room(num_keys, step), begins_q, begins_k


def _room(length: int, step: Step) -> int:
    """Return a length of which there are few: cuDNN makes a plan for each pair, and keeps it.

    What documents cut is of any length, so it gets a power of two, and the mask says how much is filled.
    From 128 on, cuDNN's tile: it has no gradients of one query and one key (cudnn-frontend 1.15 to 1.22,
    scaled_dot_product_flash_attention.h), and on Hopper NaN for some of keys that end with half a tile
    (cudnn-frontend pull request 628).
    """
    return max(128, 2 ** (length - 1).bit_length()) if step.is_cut else length


def _with_room(x_BNSD: Tensor, step: Step) -> Tensor:
    """Return [S, B, N, D], in this order in memory, too, with zeros after the rows of each of the batch."""
    length = x_BNSD.shape[2]
    rows = x_BNSD.permute(2, 0, 1, 3).contiguous()
    room = _room(length, step) - length
    return pad(rows, (0, 0) * 3 + (0, room)) if room else rows


def _like(*tensors: Tensor) -> Tensors:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    return q, k, v


def _transposed(grads: Tensors) -> Tensors:
    q, k, v = (grad.transpose(1, 2) for grad in grads)
    return q, k, v


FLASH_ATTN_3 = StepKernel(_flash_attn_3, _flash_attn_3_gradients)
FLASH_ATTN_2 = StepKernel(_flash_attn_2, _flash_attn_2_gradients)
TRANSFORMER_ENGINE = StepKernel(_transformer_engine, _transformer_engine_gradients)
