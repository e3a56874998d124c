"""Decoders that transformers have no class for: VAETKI, Keural, and A.X K1 with the norm of its dense MLPs.

`megamoe convert to-hf` puts this file beside their weights. config.json names its classes, and
`from_pretrained(folder, trust_remote_code=True)` runs it. It needs torch and transformers 5 alone;
tensors have the names of the published models.

Shapes: B batch, S new tokens, P tokens so far with the new ones, T tokens of all sequences (B * S),
D hidden, N heads, M heads of keys and values, H head dim, C latent, R pairs of rotary dimensions,
E experts, K experts of a token, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_megamoe import (
    LOCAL,
    Branch,
    DecoderConfig,
    KeuralConfig,
    NormedAXK1Config,
    VaetkiConfig,
    score_scale,
)

# What models return has the cache under one name only: transformers renamed it in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


@dataclass(frozen=True)
class Step:
    """What all layers share while some tokens go through them."""

    rotations: dict[str, tuple[Tensor, Tensor]]  # by kind of layer: cosines, sines [B, 1, S, R]
    mask: Tensor | None  # [B, P], 0 where there is padding
    cache: Cache | None


def linear(from_dim: int, to_dim: int) -> nn.Linear:
    """Return a linear map without a bias; none of these models has one."""
    return nn.Linear(from_dim, to_dim, bias=False)


class Norm(nn.Module):
    """RMSNorm in float32; zero-centred ones multiply by 1 + weight."""

    def __init__(self, config: DecoderConfig, dim: int) -> None:
        """Create a norm over `dim` values."""
        super().__init__()
        self.eps, self.shift = config.rms_norm_eps, float(config.zero_centered)
        self.weight = nn.Parameter(torch.full((dim,), 1 - self.shift))

    def forward(self, x_D: Tensor) -> Tensor:
        """Return the same shape and dtype."""
        x32_D = x_D.float()
        scale = torch.rsqrt(x32_D.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32_D * scale * (self.weight.float() + self.shift)).to(x_D.dtype)


class Attention(nn.Module):
    """What both kinds of attention have: a window, positions, a place in the cache."""

    def __init__(self, config: DecoderConfig, index: int, head_dim: int) -> None:
        """Take what concerns layer `index`."""
        super().__init__()
        self.config, self.index, self.kind = config, index, config.kind_of(index)
        self.window = config.sliding_window if self.kind == LOCAL else None
        self.scale = score_scale(config.rope_of(self.kind), head_dim)

    def rotated(self, x_BNSH: Tensor, step: Step) -> Tensor:
        """Turn pairs of dimensions, 2i with 2i+1 or i with i + H/2; the former come out in halves too."""
        cos_B1SR, sin_B1SR = step.rotations[self.kind]
        x32_BNSH, interleaved = x_BNSH.float(), self.config.rope_interleave
        first, second = (
            (x32_BNSH[..., 0::2], x32_BNSH[..., 1::2]) if interleaved else x32_BNSH.chunk(2, dim=-1)
        )
        turned = (first * cos_B1SR - second * sin_B1SR, second * cos_B1SR + first * sin_B1SR)
        return torch.cat(turned, dim=-1).to(x_BNSH.dtype)

    def attend(self, q_BNSH: Tensor, k_BMPH: Tensor, v_BMPH: Tensor, step: Step) -> Tensor:
        """Return [B, S, N * H]; keys are those so far, or the last of them."""
        # A cache may have dropped what no window sees any more, so places are counted from the end.
        num_new, num_keys, device = q_BNSH.shape[2], k_BMPH.shape[2], q_BNSH.device
        place_P = torch.arange(num_keys, device=device)
        distance_SP = place_P[num_keys - num_new :, None] - place_P
        seen = distance_SP >= 0
        if self.window is not None:
            seen = seen & (distance_SP < self.window)
        if step.mask is not None:
            # Padding sees itself: a softmax over nothing is NaN, and spreads.
            real_B11P = step.mask[:, None, None, -num_keys:].bool()
            seen = (seen & real_B11P) | (distance_SP == 0)
        repeats = q_BNSH.shape[1] != k_BMPH.shape[1]
        mixed_BNSH = functional.scaled_dot_product_attention(
            q_BNSH, k_BMPH, v_BMPH, attn_mask=seen, scale=self.scale, enable_gqa=repeats
        )
        return mixed_BNSH.transpose(1, 2).flatten(2)


class GroupedAttention(Attention):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        """Create the projections."""
        super().__init__(config, index, config.head_dim)
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = linear(config.hidden_size, queries * config.head_dim)
        self.k_proj = linear(config.hidden_size, keys * config.head_dim)
        self.v_proj = linear(config.hidden_size, keys * config.head_dim)
        self.o_proj = linear(queries * config.head_dim, config.hidden_size)

    def forward(self, x_BSD: Tensor, step: Step) -> Tensor:
        """Return [B, S, D]."""
        q_BNSH, k_BMPH, v_BMPH = (
            projection(x_BSD).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BNSH, k_BMPH = self.rotated(q_BNSH, step), self.rotated(k_BMPH, step)
        if step.cache is not None:
            k_BMPH, v_BMPH = step.cache.update(k_BMPH, v_BMPH, self.index)
        return self.o_proj(self.attend(q_BNSH, k_BMPH, v_BMPH, step))


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1); the cache holds latents."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        """Create the projections and the norms of latents."""
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        super().__init__(config, index, head_dim)
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = Norm(config, config.q_lora_rank)
        self.q_b_proj = linear(config.q_lora_rank, heads * head_dim)
        self.kv_a_proj_with_mqa = linear(config.hidden_size, latent + config.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(config, latent)
        self.kv_b_proj = linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = linear(heads * config.v_head_dim, config.hidden_size)

    def forward(self, x_BSD: Tensor, step: Step) -> Tensor:
        """Return [B, S, D]."""
        config = self.config
        heads = (config.num_attention_heads, -1)
        q_BSC = self.q_a_layernorm(self.q_a_proj(x_BSD))
        q_BNSH = self.q_b_proj(q_BSC).unflatten(-1, heads).transpose(1, 2)
        sizes = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        plain, turned = q_BNSH.split(sizes, dim=-1)
        q_BNSH = torch.cat((plain, self.rotated(turned, step)), dim=-1)
        # One latent and one rotated key for all heads, [B, 1, ...].
        joint = self.kv_a_proj_with_mqa(x_BSD)[:, None]
        latent_B1PC, key_B1PH = joint.split((config.kv_lora_rank, sizes[1]), dim=-1)
        latent_B1PC, key_B1PH = self.kv_a_layernorm(latent_B1PC), self.rotated(key_B1PH, step)
        if step.cache is not None:
            latent_B1PC, key_B1PH = step.cache.update(latent_B1PC, key_B1PH, self.index)
        kv_BNPH = self.kv_b_proj(latent_B1PC[:, 0]).unflatten(-1, heads).transpose(1, 2)
        plain, v_BNPH = kv_BNPH.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        k_BNPH = torch.cat((plain, key_B1PH.expand(*plain.shape[:3], -1)), dim=-1)
        return self.o_proj(self.attend(q_BNSH, k_BNPH, v_BNPH, step))


class SwiGLU(nn.Module):
    """A dense MLP, shared experts, or one expert."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        """Create the three matrices."""
        super().__init__()
        self.gate_proj = linear(config.hidden_size, width)
        self.up_proj = linear(config.hidden_size, width)
        self.down_proj = linear(width, config.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Router(nn.Module):
    """The choice of experts, in float32 (DeepSeek-V3, eq. 13-16)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        """Create the matrix, and the bias where there is one."""
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token [T, K] and their weights [T, K]."""
        config = self.config
        logits_TE = functional.linear(x_TD.float(), self.weight.float())
        if config.scoring_func == "softmax":
            best_TK, chosen_TK = logits_TE.topk(config.num_experts_per_tok)
            return chosen_TK, best_TK.softmax(dim=-1) * config.routed_scaling_factor
        scores_TE = logits_TE.sigmoid()
        preferred_TE = scores_TE
        if config.topk_method == "noaux_tc":
            preferred_TE = preferred_TE + self.e_score_correction_bias
        if config.n_group > 1:
            preferred_TE = self._in_best_groups(preferred_TE)
        chosen_TK = preferred_TE.topk(config.num_experts_per_tok).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return chosen_TK, weights_TK * config.routed_scaling_factor

    def _in_best_groups(self, preferred_TE: Tensor) -> Tensor:
        """Rule out all but the groups whose two best experts are the best."""
        groups = preferred_TE.view(len(preferred_TE), self.config.n_group, -1)
        sums = groups.topk(2).values.sum(dim=-1)
        best = torch.zeros_like(sums, dtype=torch.bool)
        best.scatter_(1, sums.topk(self.config.topk_group).indices, value=True)
        return groups.masked_fill(~best[..., None], -torch.inf).flatten(1)


class Experts(nn.Module):
    """Routed experts, and shared ones if there are any."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create the experts one by one, as they are stored."""
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(SwiGLU(config, width) for _ in range(config.n_routed_experts))
        shared_width = width * config.n_shared_experts
        self.shared_experts = SwiGLU(config, shared_width) if shared_width else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the same shape; experts are summed in float32."""
        x_TD = x_BSD.flatten(0, 1)
        chosen_TK, weights_TK = self.gate(x_TD)
        sum_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in chosen_TK.unique().tolist():
            token, place = torch.where(chosen_TK == expert)
            output = self.experts[expert](x_TD[token]).float()
            sum_TD = sum_TD.index_add(0, token, output * weights_TK[token, place, None])
        if self.shared_experts is not None:
            sum_TD = sum_TD + self.shared_experts(x_TD)
        return sum_TD.to(x_BSD.dtype).view_as(x_BSD)


class Layer(nn.Module):
    """x + branch(x), for attention and then for the MLP."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        """Create modules by the names of the configuration."""
        super().__init__()
        self.branches = (config.attention, config.mlp)
        is_dense = index < config.first_k_dense_replace
        attention = LatentAttention if config.kv_lora_rank else GroupedAttention
        mlp = SwiGLU(config, config.intermediate_size) if is_dense else Experts(config)
        for branch, module in zip(self.branches, (attention(config, index), mlp), strict=True):
            before, name, after = branch
            self.add_module(name, module)
            for norm in filter(None, (before, after)):
                self.add_module(norm, Norm(config, config.hidden_size))

    def forward(self, x_BSD: Tensor, step: Step) -> Tensor:
        """Return the same shape."""
        attention, mlp = self.branches
        return self._add(mlp, self._add(attention, x_BSD, step))

    def _add(self, branch: Branch, x_BSD: Tensor, *step: Step) -> Tensor:
        before, name, after = branch
        y_BSD = getattr(self, name)(getattr(self, before)(x_BSD), *step)
        return x_BSD + (y_BSD if after is None else getattr(self, after)(y_BSD))


class Decoder(nn.Module):
    """Embeddings, layers, and a norm."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create all layers."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config, config.hidden_size)

    def forward(self, x_BSD: Tensor, step: Step, inputs: list[Tensor] | None) -> Tensor:
        """Return [B, S, D]; a list takes what goes into each layer."""
        for layer in self.layers:
            if inputs is not None:
                inputs.append(x_BSD)
            x_BSD = layer(x_BSD, step)
        return self.norm(x_BSD)


class DecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder and the table that gives logits."""

    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["Layer"]
    _skip_keys_device_placement: ClassVar = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = ["e_score_correction_bias"]
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True
    accepts_loss_kwargs = True  # the Trainer then gives num_items_in_batch

    def __init__(self, config: DecoderConfig) -> None:
        """Create the model without weights."""
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        # Layers of multi-token prediction, numbered on after the decoder's, are not computed here.
        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        self._keys_to_ignore_on_load_unexpected = [
            rf"model\.layers\.{number}\." for number in range(first, first + count)
        ]
        self.model = Decoder(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Norm):
            nn.init.constant_(module.weight, 1 - module.shift)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            for bias_E in module.buffers():
                nn.init.zeros_(bias_E)
        else:
            super()._init_weights(module)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913  (what transformers call it with)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, S, V], and with labels [B, S] the loss; -100 is no label.

        `attention_mask` [B, P] is 0 where there is padding. `cache` is what transformers call
        `past_key_values` since 5.24; a name that is not here is refused, so that none is lost.

        Raises:
            ValueError: attention weights are wanted, or the cache has places for tokens to come.
        """
        config = self.config
        cache = past_key_values if cache is None else cache
        if output_attentions:
            raise ValueError("attention weights are not returned by this model")
        if cache is not None and cache.is_compileable:
            raise ValueError(f"a {type(cache).__name__} is not supported; give a DynamicCache")
        caches = config.use_cache and not self.training if use_cache is None else use_cache
        if caches and cache is None:
            cache = DynamicCache(config=config)
        x_BSD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(first, first + x_BSD.shape[1], device=x_BSD.device)[None]
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        step = Step(config.rotations(position_ids), attention_mask, cache)
        x_BSD = self.model(x_BSD, step, hidden)
        logits_BSV = self.lm_head(x_BSD[:, -logits_to_keep:])  # all of them where it is 0
        of_loss = (logits_BSV, labels, config.vocab_size, num_items_in_batch)
        loss = None if labels is None else self.loss_function(*of_loss, shift_labels=shift_labels)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            **{CACHE: cache},
            hidden_states=None if hidden is None else (*hidden, x_BSD),
        )


class KeuralMoECausalLM(DecoderForCausalLM):
    """Keural, by the name that its authors gave it."""

    config_class = KeuralConfig


class VaetkiForCausalLM(DecoderForCausalLM):
    """VAETKI."""

    config_class = VaetkiConfig


class AXK1ForCausalLM(DecoderForCausalLM):
    """A.X K1 with the norm of its dense MLPs."""

    config_class = NormedAXK1Config
