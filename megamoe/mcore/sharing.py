"""How the layers of a segment share sequences over cp: what a recipe asks for, or what costs least."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import distributed as dist

from megamoe.mcore.config import parameter_dtype
from megamoe.nn import context_ring_kernels
from megamoe.nn.context_cost import Cost, Extent, Machine, choose, explain, machine_of
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import Scheme
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe import MLA, Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What a segment's layers choose by: alike on all ranks (`agreed`), or they would wait for each other."""

    asked: str  # of the layout: 'auto', or the scheme of layers without a window
    extent: Extent
    machine: Machine


def sharing_of(plan: Plan, segment: Segment) -> Sharing:
    """Return what the layers of a segment choose by, as far as this rank knows."""
    layout = segment.layout
    extent = Extent(
        seq_len=segment.seq_len,
        batch=layout.micro_batch,
        cp=layout.cp,
        rank=0,
        dtype=parameter_dtype(segment),
    )
    # Ranks of tp are neighbours, then those of cp.
    machine = machine_of(plan.cluster, layout.tp * layout.cp)
    return Sharing(
        asked=layout.cp_scheme,
        extent=extent,
        machine=replace(machine, has_ring_kernel=_has_ring_kernel(plan, segment)),
    )


def agreed(sharing: Sharing, group: dist.ProcessGroup) -> Sharing:
    """Return what all ranks choose by: a kernel that one of them lacks is none. All call this together."""
    if sharing.extent.cp == 1:
        return sharing
    has_kernel = torch.tensor(int(sharing.machine.has_ring_kernel))
    dist.all_reduce(has_kernel, dist.ReduceOp.MIN, group=group)
    return replace(sharing, machine=replace(sharing.machine, has_ring_kernel=bool(has_kernel)))


@cache
def scheme_of(layer: AttentionLayer, sharing: Sharing) -> Scheme:
    """Return how ranks attend together: with a window by its edge, else as asked for or by cost."""
    if layer.window is not None:
        return Scheme.HALO
    if sharing.asked != "auto":
        return Scheme(sharing.asked)
    return _costs(layer, sharing)[0].scheme


def describe(plan: Plan, segment: Segment, sharing: Sharing) -> list[str]:
    """Return a line for each kind of layer: how it shares sequences, why, and what else there was."""
    if segment.layout.cp == 1:
        return []
    model = plan.model
    lines = []
    for kind, letter in (("with a window", "L"), ("without", "G")):
        if letter in model.window_pattern or (letter == "G" and model.mtp is not None):
            layer = attention_layer(model, segment.layout.tp, has_window=letter == "L")
            chosen = scheme_of(layer, sharing)
            lines.append(
                f"{segment.stage}: cp {segment.layout.cp}, layers {kind}: "
                f"{explain(_costs(layer, sharing), chosen)}"
            )
    return lines


def _costs(layer: AttentionLayer, sharing: Sharing) -> tuple[Cost, ...]:
    return choose(layer, sharing.extent, sharing.machine)


def attention_layer(model: Model, tp: int, *, has_window: bool) -> AttentionLayer:
    """Return a layer as one rank of tp has it."""
    attention = model.attention
    heads: LatentHeads | GroupedHeads
    if isinstance(attention, MLA):
        heads = LatentHeads(
            num_heads=attention.num_heads // tp,
            latent_dim=attention.kv_lora_rank,
            nope_dim=attention.qk_nope_head_dim,
            rope_dim=attention.qk_rope_head_dim,
            value_dim=attention.v_head_dim,
        )
    else:
        heads = GroupedHeads(
            num_heads=attention.num_heads // tp,
            num_kv_heads=max(1, attention.num_kv_heads // tp),
            key_dim=attention.head_dim,
            value_dim=attention.head_dim,
        )
    return AttentionLayer(heads=heads, window=model.window if has_window else None, scale=1.0)


def _has_ring_kernel(plan: Plan, segment: Segment) -> bool:
    """Tell whether layers without a window have a kernel here; on a GPU that is not here it is relied on."""
    device = plan.cluster.device
    if segment.layout.cp == 1 or (device == "cuda" and not torch.cuda.is_available()):
        return True
    heads = attention_layer(plan.model, segment.layout.tp, has_window=False).heads
    case = context_ring_kernels.case_of(
        heads,
        torch.device(device),
        parameter_dtype(segment),
        has_documents=segment.document_mask,
    )
    return context_ring_kernels.choose(case) is not None
