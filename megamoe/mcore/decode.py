"""Attention over what a cache holds and what is new: the layers of a model that generates.

The cache enters where Megatron-core's `inference_context` does, which it hands to each attention
untouched. Its own contexts keep a layer's expanded keys and values, all of them: no latents without
Flash-MLA, no windows.

Shapes: S new tokens, P these and the ones held before them, B batch, D hidden, N heads.
"""

from typing import Any

import torch
from torch import Tensor

from megamoe.mcore.projections import latent_queries, latent_rows, rotation
from megamoe.nn.attention import continued_attention
from megamoe.nn.cache import Cache, LayerCache, make_layer_cache
from megamoe.recipe import MLA, Model


def make_cache(
    model: Model, *, size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
) -> Cache:
    """Return an empty cache of a whole model.

    Args:
        model: the architecture.
        size: sequences, and tokens of each at most.
        dtype: that of the activations.
        device: of the model; on "meta" sizes alone exist.
    """
    attention = model.attention
    if isinstance(attention, MLA):
        shapes: tuple[tuple[int, ...], ...] = (
            (attention.kv_lora_rank,),
            (attention.qk_rope_head_dim,),
        )
    else:
        shapes = ((attention.num_kv_heads, attention.head_dim),) * 2
    return Cache(
        tuple(
            make_layer_cache(
                shapes,
                window=model.window if model.is_local(i) else None,
                size=size,
                dtype=dtype,
                device=device,
            )
            for i in range(model.num_layers)
        )
    )


def attend_grouped(attention: Any, hidden_SBD: Tensor, cache: Cache) -> tuple[Tensor, None]:
    """Return the output of a GroupedAttention for new tokens; their keys and values are cached."""
    layer = _layer(attention, cache)
    q, k, v = attention.get_query_key_value_tensors(hidden_SBD)
    if attention.rotary is not None:
        rotate = rotation(attention, attention.rotary(len(hidden_SBD), offset=layer.num_tokens))
        q, k = rotate(q), rotate(k)
    k_PBMD, v_PBMD = layer.extend(k, v)
    return _project(attention, q, k_PBMD, v_PBMD)


def attend_latent(attention: Any, hidden_SBD: Tensor, cache: Cache) -> tuple[Tensor, None]:
    """Return the output of a LatentAttention for new tokens; latents and rotary keys are cached.

    Keys and values are projected from the latents of all tokens that are held, anew in each step.
    """
    layer, config = _layer(attention, cache), attention.config
    positions = attention.rotary_pos_emb(len(hidden_SBD), offset=layer.num_tokens)
    rotate = rotation(attention, positions)
    queries = latent_queries(attention, hidden_SBD, rotate)
    latent, k_rope = latent_rows(attention, hidden_SBD)
    latents, k_rope = layer.extend(latent, rotate(k_rope[:, :, None])[:, :, 0])
    projected = attention.linear_kv_up_proj(latents)[0]
    keys_and_values = projected.unflatten(-1, (attention.num_attention_heads_per_partition, -1))
    k_nope, v_PBNV = torch.split(keys_and_values, [config.qk_head_dim, config.v_head_dim], dim=-1)
    num_heads = k_nope.shape[2]
    k_PBND = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, num_heads, -1)), dim=-1)
    return _project(attention, queries, k_PBND, v_PBNV)


def _layer(attention: Any, cache: Cache) -> LayerCache:
    return cache.layers[attention.layer_number - 1]


def _project(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    core = attention.core_attention
    mixed = continued_attention(q, k, v, window=core.window, scale=core.scale, kernel=core.kernel)
    return attention.linear_proj(mixed)
