"""Attention of a small layer on one rank and on several: weights, inputs, reference, comparison.

The reference is dense masked softmax attention in float64, written out here.

Shapes: S sequence, L tokens of a rank, B batch, H hidden, N query heads, M key-value heads.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamoe.nn.context_group import ContextGroup
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import Begun, Scheme, begin, finish

BATCH, HIDDEN = 2, 5
IDS = {  # of documents; the two sequences of a batch differ, and edges lie inside shards and on them
    "packed": lambda s: torch.stack(
        [torch.arange(s) // (s // 4), (torch.arange(s) >= s // 3 + 1).long()], dim=1
    ),
    "whole": lambda s: None,
}


@dataclass(frozen=True)
class Case:
    """One comparison; `frozen` names what needs no gradient."""

    seq_len: int
    heads: LatentHeads | GroupedHeads
    window: int | None
    documents: str
    scheme: str
    frozen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        kind = "mla" if isinstance(self.heads, LatentHeads) else "gqa"
        heads = f"{self.heads.num_heads}"
        if kind == "gqa":
            heads += f"-{self.heads.num_kv_heads}"
        frozen = f" frozen {'+'.join(self.frozen)}" if self.frozen else ""
        window = f"window {self.window}" if self.window else "global"
        return f"{kind} {heads} {self.scheme} S {self.seq_len} {window} {self.documents}{frozen}"

    @property
    def layer(self) -> AttentionLayer:
        return AttentionLayer(heads=self.heads, window=self.window, scale=self.heads.key_dim**-0.5)


def latent(num_heads: int) -> LatentHeads:
    return LatentHeads(num_heads=num_heads, latent_dim=7, nope_dim=3, rope_dim=2, value_dim=5)


def grouped(num_heads: int, num_kv_heads: int) -> GroupedHeads:
    return GroupedHeads(num_heads=num_heads, num_kv_heads=num_kv_heads, key_dim=4, value_dim=3)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE over the whole of the last dimension; x is [S, ..., even]."""
    half = x.shape[-1] // 2
    frequencies = 10.0 ** -torch.arange(half, dtype=x.dtype)
    angles = positions.to(x.dtype)[:, None] * frequencies
    angles = angles.view(len(x), *(1,) * (x.ndim - 2), half)
    one, other = x[..., :half], x[..., half:]
    return torch.cat(
        (one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()), -1
    )


def draw(case: Case) -> dict[str, Tensor]:
    """Return inputs and weights of the layer, float64; those of the whole sequence end with _S."""
    generator = torch.Generator().manual_seed(7)
    heads, s = case.heads, case.seq_len
    shapes = {"hidden_S": (s, BATCH, HIDDEN), "w_q": (HIDDEN, heads.num_heads * heads.key_dim)}
    if isinstance(heads, LatentHeads):
        shapes |= {
            "latent_S": (s, BATCH, heads.latent_dim),
            "rope_S": (s, BATCH, heads.rope_dim),
            "w_up": (heads.num_heads * (heads.nope_dim + heads.value_dim), heads.latent_dim),
        }
    else:
        kv_heads = heads.num_kv_heads
        shapes |= {
            "k_S": (s, BATCH, kv_heads, heads.key_dim),
            "v_S": (s, BATCH, kv_heads, heads.value_dim),
        }
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {
        name: value.requires_grad_(name.removesuffix("_S") not in case.frozen)
        for name, value in drawn.items()
    }


def upstream(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    shape = (case.seq_len, BATCH, case.heads.num_heads * case.heads.value_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def documents(case: Case) -> Tensor | None:
    return IDS[case.documents](case.seq_len)


def queries(case: Case, hidden: Tensor, w_q: Tensor, positions: Tensor) -> Tensor:
    q = (hidden @ w_q).view(*hidden.shape[:2], case.heads.num_heads, case.heads.key_dim)
    if isinstance(case.heads, LatentHeads):
        nope, rope = q.split([case.heads.nope_dim, case.heads.rope_dim], dim=-1)
        return torch.cat((nope, rotated(rope, positions)), dim=-1)
    return rotated(q, positions)


@cache
def reference(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients of dense attention with all scores written out."""
    values, heads, s = draw(case), case.heads, case.seq_len
    positions = torch.arange(s)
    q = queries(case, values["hidden_S"], values["w_q"], positions)
    if isinstance(heads, LatentHeads):
        up = values["w_up"].view(heads.num_heads, -1, heads.latent_dim)
        kv = torch.einsum("sbr,ndr->sbnd", values["latent_S"], up)
        rope = rotated(values["rope_S"], positions)[:, :, None].expand(-1, -1, heads.num_heads, -1)
        k, v = torch.cat((kv[..., : heads.nope_dim], rope), dim=-1), kv[..., heads.nope_dim :]
    else:
        times = heads.num_heads // heads.num_kv_heads
        k = rotated(values["k_S"], positions).repeat_interleave(times, dim=2)
        v = values["v_S"].repeat_interleave(times, dim=2)
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) * heads.key_dim**-0.5
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= (case.window or s))
    hidden = hidden.expand(BATCH, s, s)
    ids = documents(case)
    if ids is not None:
        hidden = hidden | (ids.T[:, :, None] != ids.T[:, None, :])
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
    output = torch.einsum("bnqk,kbnd->qbnd", weights, v).flatten(2)
    wanted = {name: value for name, value in values.items() if value.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), upstream(case))
    return output.detach(), dict(zip(wanted, grads, strict=True))


@dataclass(frozen=True)
class Spoiled:
    """What a test makes wrong on purpose."""

    rope_offset: int = 0
    no_documents: bool = False


def local_values(case: Case, cp: ContextGroup, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return this rank's inputs and the weights, leaves of a graph."""
    return {
        name: (cp.shard(value) if name.endswith("_S") else value)
        .detach()
        .to(dtype, copy=True)
        .requires_grad_(value.requires_grad)
        for name, value in draw(case).items()
    }


def start(
    case: Case, cp: ContextGroup, values: dict[str, Tensor], spoiled: Spoiled
) -> tuple[Begun, Tensor]:
    """Post what others need, then make the queries."""
    length = case.seq_len // cp.size
    positions = torch.arange(length) + cp.rank * length + spoiled.rope_offset * cp.rank
    if isinstance(case.heads, LatentHeads):
        parts = values["latent_S"], rotated(values["rope_S"], positions)
    else:
        parts = rotated(values["k_S"], positions), values["v_S"]
    begun = begin(cp, case.layer, Scheme(case.scheme), parts)
    return begun, queries(case, values["hidden_S"], values["w_q"], positions)


def shared(
    case: Case,
    cp: ContextGroup,
    starts: Tensor | None,
    spoiled: Spoiled,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this rank's output and gradients; of weights, its part."""
    values = local_values(case, cp, dtype)
    begun, q = start(case, cp, values, spoiled)
    output = finish(begun, q, values.get("w_up"), None if spoiled.no_documents else starts)
    output.backward(cp.shard(upstream(case)).to(dtype))
    return output.detach(), gradients(values)


def gradients(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.grad for name, value in values.items() if value.requires_grad}


def shared_again(
    case: Case, cp: ContextGroup, starts: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same where the backward pass computes the layer anew."""
    values = local_values(case, cp, torch.float64)

    def layer() -> Tensor:
        begun, q = start(case, cp, values, Spoiled())
        return finish(begun, q, values.get("w_up"), starts)

    output = checkpoint(layer, use_reentrant=False)
    output.backward(cp.shard(upstream(case)))
    return output.detach(), gradients(values)


def two_at_once(
    case: Case, other: Case, cp: ContextGroup, starts: Tensor
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the same of two layers, the first of which is begun before the other and ends after."""
    values, others = (local_values(c, cp, torch.float64) for c in (case, other))
    begun, q = start(case, cp, values, Spoiled())
    begun_other, q_other = start(other, cp, others, Spoiled())
    output_other = finish(begun_other, q_other, others.get("w_up"), starts)
    output = finish(begun, q, values.get("w_up"), starts)
    grads = [cp.shard(upstream(c)) for c in (case, other)]
    torch.autograd.backward([output, output_other], grads)
    return [(output.detach(), gradients(values)), (output_other.detach(), gradients(others))]


def error(case: Case, cp: ContextGroup, result: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Return this rank's largest difference of output and gradients."""
    output, grads = result
    expected, expected_grads = reference(case)
    assert grads.keys() == expected_grads.keys()
    output, grads = output.double(), {name: grad.double() for name, grad in grads.items()}
    if cp.group is not None:  # as the caller adds up gradients of weights
        weights = [name for name in grads if not name.endswith("_S")]
        flat = torch.cat([grads[name].flatten() for name in weights])
        torch.distributed.all_reduce(flat, group=cp.group)
        sums = flat.split([grads[name].numel() for name in weights])
        grads |= {n: x.view_as(grads[n]) for n, x in zip(weights, sums, strict=True)}
    pairs = [(output, cp.shard(expected), expected)]
    for name, whole in expected_grads.items():
        pairs.append((grads[name], cp.shard(whole) if name.endswith("_S") else whole, whole))
    # Relative to the largest value, or to 1: with a window of 1 keys have no gradient at all.
    return max(float((a - b).abs().max() / max(whole.abs().max(), 1.0)) for a, b, whole in pairs)
