"""A decoder-only MoE transformer in plain PyTorch, written from the papers, for tests.

Nothing here comes from megamoe.nn, megamoe.mcore or Megatron-core, but for the names of the
weights, which are those of Megatron-core's state dict. Slow and plain on purpose; any dtype.

Shapes: B batch, S sequence, T tokens (B * S), D hidden, N heads, M key-value heads, H head dim,
R rotary dim, V vocabulary, E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.recipe import GQA, MLA, DualNorm, Model, PeriNorm, PreNorm, Rope, Router, Yarn

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Routed:
    """What one MoE layer did with its tokens, for the balancing losses."""

    logits: Tensor  # [B, S, E]
    name: str


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model makes of a batch of tokens."""

    logits: Tensor  # [B, S, V]
    mtp_logits: tuple[Tensor, ...]  # one [B, S, V] a prediction layer
    routed: tuple[Routed, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """A model with its weights.

    Args:
        model: the architecture.
        weights: by the names of Megatron-core.
        interpolation: positions of global layers are divided by it (Chen et al. 2023, eq. 4).
    """

    model: Model
    weights: Weights
    interpolation: float = 1.0

    def run(self, tokens_BS: Tensor) -> Outputs:
        """Return logits of the next token, and of the ones after it."""
        routed: list[Routed] = []
        x = self.weights["embedding.word_embeddings.weight"][tokens_BS]
        for i in range(self.model.num_layers):
            is_local, is_dense = self.model.is_local(i), self.model.is_dense(i)
            x = self._layer(f"decoder.layers.{i}", x, routed, is_local=is_local, is_dense=is_dense)
        x = self._norm("decoder.final_layernorm", x)
        logits = x @ self._output_table().T
        mtp_logits = []
        for k in range(self.model.mtp.num_layers if self.model.mtp else 0):
            tokens_BS = _shifted(tokens_BS)
            x = self._predict_further(f"mtp.layers.{k}", x, tokens_BS, routed)
            mtp_logits.append(x @ self._output_table().T)
        return Outputs(logits, tuple(mtp_logits), tuple(routed))

    def _output_table(self) -> Tensor:
        tied = self.model.tied_embeddings
        return self.weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"]

    def _predict_further(
        self, name: str, x: Tensor, tokens_BS: Tensor, routed: list[Routed]
    ) -> Tensor:
        """Multi-token prediction (DeepSeek-V3, eq. 21-22): join with the next token's embedding."""
        embedded = self.weights["embedding.word_embeddings.weight"][tokens_BS]
        joined = torch.cat(
            (self._norm(f"{name}.enorm", embedded), self._norm(f"{name}.hnorm", x)), dim=-1
        )
        x = joined @ self.weights[f"{name}.eh_proj.weight"].T
        is_dense = self.model.mtp.ffn == "dense"
        x = self._layer(f"{name}.transformer_layer", x, routed, is_local=False, is_dense=is_dense)
        return self._norm(f"{name}.final_layernorm", x)

    def _layer(
        self, name: str, x: Tensor, routed: list[Routed], *, is_local: bool, is_dense: bool
    ) -> Tensor:
        """One decoder layer, with the norms around its two branches."""
        norm = self.model.norm
        branch = self._attention(
            f"{name}.self_attention", self._norm(f"{name}.input_layernorm", x), is_local=is_local
        )
        if isinstance(norm, PeriNorm):
            branch = self._norm(f"{name}.self_attn_bda.norm", branch)
        x = x + branch
        branch = self._norm(f"{name}.pre_mlp_layernorm", x)
        if is_dense:
            branch = self._mlp(f"{name}.mlp", branch)
        else:
            branch = self._experts(f"{name}.mlp", branch, routed)
        is_moe_only = isinstance(norm, DualNorm) and not norm.after_dense_mlp
        if not isinstance(norm, PreNorm) and not (is_dense and is_moe_only):
            branch = self._norm(f"{name}.mlp_bda.norm", branch)
        return x + branch

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019, eq. 4)."""
        gain = self.weights[f"{name}.weight"] + (1 if self.model.norm.zero_centered else 0)
        return gain * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.model.norm.eps)

    def _attention(self, name: str, x: Tensor, *, is_local: bool) -> Tensor:
        rope = self.model.local_rope if is_local else self.model.global_rope
        step = 1.0 if is_local else 1 / self.interpolation
        if isinstance(self.model.attention, MLA):
            q, k, v = self._latent(name, x, rope, step)
        else:
            q, k, v = self._grouped(name, x, rope, step)
        scale = q.shape[-1] ** -0.5
        if rope is not None and rope.yarn is not None:
            scale *= _mscale(rope.yarn, rope.yarn.mscale_all_dim) ** 2
        mixed = _attend(q, k, v, self.model.window if is_local else None, scale)
        return mixed @ self.weights[f"{name}.linear_proj.weight"].T

    def _latent(
        self, name: str, x: Tensor, rope: Rope | None, step: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multi-head latent attention (DeepSeek-V2, eq. 37-47): queries, keys, values."""
        a = self.model.attention
        if a.q_lora_rank is None:
            q = x @ self.weights[f"{name}.linear_q_proj.weight"].T
        else:
            compressed = x @ self.weights[f"{name}.linear_q_down_proj.weight"].T
            compressed = self._norm(f"{name}.q_layernorm", compressed)
            q = compressed @ self.weights[f"{name}.linear_q_up_proj.weight"].T
        q = q.unflatten(-1, (a.num_heads, -1))
        compressed, k_rope = (x @ self.weights[f"{name}.linear_kv_down_proj.weight"].T).split(
            (a.kv_lora_rank, a.qk_rope_head_dim), dim=-1
        )
        compressed = self._norm(f"{name}.kv_layernorm", compressed)
        kv = compressed @ self.weights[f"{name}.linear_kv_up_proj.weight"].T
        kv = kv.unflatten(-1, (a.num_heads, -1))
        k_nope, v = kv.split((a.qk_nope_head_dim, a.v_head_dim), dim=-1)
        q_nope, q_rope = q.split((a.qk_nope_head_dim, a.qk_rope_head_dim), dim=-1)
        k_rope = _rotate(k_rope[:, :, None, :], rope, step).expand(-1, -1, a.num_heads, -1)
        q = torch.cat((q_nope, _rotate(q_rope, rope, step)), dim=-1)
        return q, torch.cat((k_nope, k_rope), dim=-1), v

    def _grouped(
        self, name: str, x: Tensor, rope: Rope | None, step: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Grouped-query attention (Ainslie et al. 2023); rows hold a group's queries, key, value."""
        a: GQA = self.model.attention
        group = a.num_heads // a.num_kv_heads
        qkv = x @ self.weights[f"{name}.linear_qkv.weight"].T
        qkv = qkv.unflatten(-1, (a.num_kv_heads, group + 2, a.head_dim))
        q, k, v = qkv[..., :group, :].flatten(2, 3), qkv[..., group, :], qkv[..., group + 1, :]
        if a.qk_norm:
            q = self._norm(f"{name}.q_layernorm", q)
            k = self._norm(f"{name}.k_layernorm", k)
        q, k = _rotate(q, rope, step), _rotate(k, rope, step)
        heads = [head // group for head in range(a.num_heads)]
        return q, k[:, :, heads], v[:, :, heads]

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        matrices = (self.weights[f"{name}.linear_fc{i}.weight"] for i in (1, 2))
        return _swiglu(x, *matrices)

    def _experts(self, name: str, x: Tensor, routed: list[Routed]) -> Tensor:
        """Routed and shared experts (DeepSeek-V3, eq. 12-16), token by token and choice by choice."""
        logits = x @ self.weights[f"{name}.router.weight"].T
        routed.append(Routed(logits, name))
        bias = self.weights.get(f"{name}.router.expert_bias")
        flat, flat_logits = x.flatten(0, 1), logits.flatten(0, 1)
        rows = []
        for token, token_logits in zip(flat, flat_logits, strict=True):
            output = torch.zeros_like(token)
            for expert, weight in self._choose(token_logits, bias):
                matrices = (self.weights[f"{name}.experts.weight{i}"][expert] for i in (1, 2))
                output = output + weight * _swiglu(token, *matrices)
            rows.append(output)
        output = torch.stack(rows).view_as(x)
        if self.model.experts.num_shared:
            output = output + self._mlp(f"{name}.shared_experts", x)
        return output

    def _choose(self, logits_E: Tensor, bias_E: Tensor | None) -> list[tuple[int, Tensor]]:
        """Return the experts of one token, with their weights."""
        experts = self.model.experts
        scores = torch.sigmoid(logits_E) if experts.score == "sigmoid" else torch.exp(logits_E)
        preference = (scores if bias_E is None else scores + bias_E).tolist()
        size = experts.num_routed // experts.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(experts.num_groups)]
        best = experts.top_k // experts.group_top_k
        groups.sort(key=lambda group: -sum(sorted(preference[e] for e in group)[-best:]))
        candidates = [e for group in groups[: experts.group_top_k] for e in group]
        chosen = sorted(candidates, key=lambda e: -preference[e])[: experts.top_k]
        total = sum(scores[e] for e in chosen)
        if experts.score == "sigmoid" and experts.top_k == 1:
            total = torch.ones_like(total)
        return [(e, scores[e] / total * experts.scaling_factor) for e in chosen]


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return -log p(label) of each token, [B, S]."""
    return -logits_BSV.log_softmax(dim=-1).gather(-1, labels_BS[..., None])[..., 0]


def mtp_losses(outputs: Outputs, labels_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, ...]:
    """Return the losses of each prediction layer, [B, S]; 0 where no token is that far ahead."""
    losses = []
    for logits in outputs.mtp_logits:
        labels_BS, mask_BS = _shifted(labels_BS), _shifted(mask_BS)
        losses.append(token_losses(logits, labels_BS) * mask_BS)
    return tuple(losses)


def balancing_loss(
    outputs: Outputs, model: Model, router: Router, shares_E: Mapping[str, Tensor]
) -> Tensor:
    """Return the sum over MoE layers of the balancing losses, each a mean over tokens.

    aux: E * sum_i f_i P_i over all tokens (Switch Transformer, eq. 4-6); sequence aux: the same over
    each sequence, then their mean (DeepSeek-V3, eq. 17-20); global aux: with f given (Qiu et al.
    2025); z: mean of logsumexp^2 (ST-MoE, eq. 5).

    Args:
        outputs: of the model.
        model: the architecture.
        router: the coefficients.
        shares_E: by layer, the shares f of the global loss.
    """
    total = torch.zeros((), dtype=outputs.logits.dtype)
    experts = model.experts
    for layer in outputs.routed:
        scores = layer.logits.softmax(dim=-1)
        if experts.score == "sigmoid":
            scores = torch.sigmoid(layer.logits)
            scores = scores / scores.sum(dim=-1, keepdim=True)
        floor = scores.sort(dim=-1, descending=True).values[..., experts.top_k - 1, None]
        chosen = (scores >= floor).to(scores.dtype) / experts.top_k
        over_all = (chosen.mean(dim=(0, 1)) * scores.mean(dim=(0, 1))).sum()
        over_each = (chosen.mean(dim=1) * scores.mean(dim=1)).sum(dim=-1).mean()
        over_batch = (shares_E[layer.name] * scores.mean(dim=(0, 1))).sum()
        total = total + experts.num_routed * (
            router.aux_loss * over_all
            + router.sequence_aux_loss * over_each
            + router.global_aux_loss * over_batch
        )
        total = total + router.z_loss * layer.logits.logsumexp(dim=-1).square().mean()
    return total


def _swiglu(x: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020): the first half of the rows is the gate."""
    gate, up = (x @ weight1.T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ weight2.T


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal softmax attention; a query sees the `window` last keys, its own included."""
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) * scale
    for query in range(q.shape[1]):
        for key in range(q.shape[1]):
            if key > query or (window is not None and key <= query - window):
                scores[:, :, query, key] = -torch.inf
    return torch.einsum("bnqk,bknv->bqnv", scores.softmax(dim=-1), v).flatten(2)


def _rotate(x_BSNR: Tensor, rope: Rope | None, step: float) -> Tensor:
    """Turn pair i at position t by the angle t * step * base^(-2i / R) (Su et al. 2021, eq. 34)."""
    if rope is None:
        return x_BSNR
    seq_len, dim = x_BSNR.shape[1], x_BSNR.shape[3]
    frequencies = rope.base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope.yarn is not None:
        frequencies = torch.tensor(_yarn(frequencies.tolist(), rope, dim), dtype=torch.float64)
        mscale, mscale_all_dim = rope.yarn.mscale, rope.yarn.mscale_all_dim
        x_BSNR = x_BSNR * (_mscale(rope.yarn, mscale) / _mscale(rope.yarn, mscale_all_dim))
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64) * step, frequencies)
    cos, sin = (f(angles).to(x_BSNR.dtype)[:, None, :] for f in (torch.cos, torch.sin))
    if rope.interleaved:
        first, second = x_BSNR[..., 0::2], x_BSNR[..., 1::2]
    else:
        first, second = x_BSNR.chunk(2, dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    if rope.interleaved:
        return torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat(turned, dim=-1)


def _yarn(frequencies: list[float], rope: Rope, dim: int) -> list[float]:
    """Slow frequencies down by YaRN (Peng et al. 2023, 3.2), its ramp drawn over pairs of dimensions.

    The ramp is that of DeepSeek-V3's code (find_correction_range, linear_ramp_factor): from the last
    pair that turns beta_fast times or more to the first that turns beta_slow times or less.
    """
    yarn = rope.yarn

    def pair(turns: float) -> float:
        # base^(-2 pair / dim) * original_seq_len = 2 pi * turns, solved for the pair
        return -math.log(2 * math.pi * turns / yarn.original_seq_len, rope.base) * dim / 2

    first = max(math.floor(pair(yarn.beta_fast)), 0)
    last = min(math.ceil(pair(yarn.beta_slow)), dim - 1)
    slowed = []
    for i, frequency in enumerate(frequencies):
        share = 0 if i <= first else 1 if i >= last else (i - first) / (last - first)
        slowed.append(frequency * (1 - share + share / yarn.factor))
    return slowed


def _mscale(yarn: Yarn, mscale: float) -> float:
    """DeepSeek-V3's yarn_get_mscale; at mscale 1 the root of 1/t of Peng et al. 2023, eq. 22."""
    return 1 + mscale * math.log(yarn.factor) / 10


def _shifted(x_BS: Tensor) -> Tensor:
    """Return the value one position further on, and 0 at the end."""
    return torch.cat((x_BS[:, 1:], torch.zeros_like(x_BS[:, :1])), dim=1)
