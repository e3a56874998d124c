"""config.json of the models of modeling_megamoe.py, and the positions that follow from it.

Shapes: B batch, S new tokens, R pairs of rotary dimensions.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

LOCAL = "sliding_attention"
GLOBAL = "full_attention"
Rope = dict[str, Any]
# Half of a layer, by name: the norm before, the module, and the norm after it, if there is one.
Branch = tuple[str, str, str | None]


class DecoderConfig(PreTrainedConfig):
    """config.json: what it may leave out, and what no key of it says."""

    attention: ClassVar[Branch]
    mlp: ClassVar[Branch]
    zero_centered: ClassVar[bool] = False  # norms multiply by 1 + weight
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    first_k_dense_replace: int = 0
    kv_lora_rank: int = 0  # 0: grouped-query attention
    max_position_embeddings: int | None = None
    n_group: int = 1
    n_shared_experts: int = 0
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 0
    rope_interleave: bool = False
    rope_parameters: Rope | None = None
    routed_scaling_factor: float = 1.0
    scoring_func: str = "softmax"
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    topk_group: int = 1
    topk_method: str | None = None  # noaux_tc: experts are chosen with a bias
    use_cache: bool = True

    def kind_of(self, layer: int) -> str:
        """Return what a layer, counted from 0, attends to."""
        kinds = getattr(self, "layer_types", None)  # absent: transformers take None for a list
        return kinds[layer] if kinds else GLOBAL

    def rope_of(self, kind: str) -> Rope:  # noqa: ARG002 (some have one for each kind)
        """Return the positions of a kind of layer."""
        assert self.rope_parameters is not None, "config.json has no rope_parameters"
        return self.rope_parameters

    def rotations(self, position_BS: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return cosines and sines [B, 1, S, R] by kind of layer."""
        dim = self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim
        kinds = {self.kind_of(layer) for layer in range(self.num_hidden_layers)}
        return {kind: _rotation(self.rope_of(kind), dim, position_BS) for kind in kinds}


class KeuralConfig(DecoderConfig):
    """Keural: grouped queries, softmax over the chosen experts, tied embeddings."""

    model_type = "keural_moe"
    attribute_map: ClassVar[dict[str, str]] = {
        "n_routed_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
    }
    attention = ("attn_norm", "attn", None)
    mlp = ("moe_norm", "moe", None)


class VaetkiConfig(DecoderConfig):
    """VAETKI: latents, zero-centred norms on both sides of each branch, two kinds of positions."""

    model_type = "vaetki"
    attention = ("input_layernorm", "self_attn", "post_attention_layernorm")
    mlp = ("pre_mlp_layernorm", "mlp", "post_mlp_layernorm")
    zero_centered = True

    rope_theta_local: float = 10_000.0
    rope_theta_global: float = 1_000_000.0

    def rope_of(self, kind: str) -> Rope:
        """Return the positions of a kind of layer; without `linear` those of global ones are divided by 8."""
        if kind == LOCAL:
            return {"rope_type": "default", "rope_theta": self.rope_theta_local}
        given = self.rope_parameters or {}
        factor = given["factor"] if given.get("rope_type") == "linear" else 8.0
        return {"rope_type": "linear", "rope_theta": self.rope_theta_global, "factor": factor}


class NormedAXK1Config(DecoderConfig):
    """A.X K1 as it was trained: the output of dense MLPs is normed too."""

    model_type = "AXK1"
    attention = ("input_layernorm", "self_attn", None)
    mlp = ("post_attention_layernorm", "mlp", "post_mlp_layernorm")


def score_scale(rope: Rope, head_dim: int) -> float:
    """Return what products of queries and keys are multiplied by."""
    all_dim = rope.get("mscale_all_dim") or 0.0
    return head_dim**-0.5 * (_mscale(rope, all_dim) if all_dim else 1.0) ** 2


def _rotation(rope: Rope, dim: int, position_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [B, 1, S, R] of `dim` dimensions, times the scale of rotated vectors."""
    pair_R = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    frequency_R, scale = rope["rope_theta"] ** (-2 * pair_R / dim), 1.0
    if rope["rope_type"] == "yarn":
        frequency_R, scale = _yarn(rope, frequency_R, pair_R)
    elif rope["rope_type"] == "linear":
        frequency_R = frequency_R / rope["factor"]
    frequency_R = frequency_R.float().to(position_BS.device)
    angle_B1SR = position_BS[:, None, :, None].float() * frequency_R
    return angle_B1SR.cos() * scale, angle_B1SR.sin() * scale


def _mscale(rope: Rope, weight: float) -> float:
    return 0.1 * weight * math.log(rope["factor"]) + 1.0


def _yarn(rope: Rope, frequency_R: Tensor, pair_R: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): fast pairs stay, slow ones are divided, those between are blended."""
    dim, length = 2 * len(pair_R), rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(pair_that_turns(rope.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(pair_that_turns(rope.get("beta_slow") or 1.0)), dim - 1)
    divided_R = ((pair_R - low) / (high - low or 1e-3)).clamp(0, 1)
    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
        both = mscale and all_dim
        scale = _mscale(rope, mscale) / _mscale(rope, all_dim) if both else _mscale(rope, 1.0)
    return frequency_R * (1 - divided_R) + frequency_R / rope["factor"] * divided_R, scale
