"""How the layers of a segment share sequences over cp: what a recipe asks for, or what costs least."""

from dataclasses import dataclass
from functools import cache

from megamoe.mcore.config import parameter_dtype
from megamoe.nn.context_cost import Cost, Extent, Machine, choose, explain
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import Scheme
from megamoe.plan.cluster import Cluster
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe import MLA, Model

# Rates to choose by where a cluster states none: gloo on one machine, or NVLink 4 of 450 GB/s each way.
_CPU = Machine(link_bytes_per_s=1e9, flops_per_s=2e10, message_s=1e-4)
_NVLINK_BYTES_PER_S = 300e9
_SHARE_OF_PEAK = 0.5
_MESSAGE_S = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What a segment's layers choose by; alike on all ranks."""

    asked: str  # of the layout: 'auto', or the scheme of layers without a window
    extent: Extent
    machine: Machine


def sharing_of(plan: Plan, segment: Segment) -> Sharing:
    """Return what the layers of a segment choose by."""
    layout = segment.layout
    extent = Extent(
        seq_len=segment.seq_len,
        batch=layout.micro_batch,
        cp=layout.cp,
        rank=0,
        dtype=parameter_dtype(segment),
        has_documents=segment.document_mask,
    )
    # Ranks of tp are neighbours, then those of cp.
    machine = _machine(plan.cluster, layout.tp * layout.cp)
    return Sharing(asked=layout.cp_scheme, extent=extent, machine=machine)


@cache
def scheme_of(layer: AttentionLayer, sharing: Sharing) -> Scheme:
    """Return how ranks attend together: with a window by its edge, else as asked for or by cost."""
    if layer.window is not None:
        return Scheme.HALO
    if sharing.asked != "auto":
        return Scheme(sharing.asked)
    return _costs(layer, sharing)[0].scheme


def describe(plan: Plan, segment: Segment) -> list[str]:
    """Return a line for each kind of layer: how it shares sequences, why, and what else there was."""
    if segment.layout.cp == 1:
        return []
    sharing, model = sharing_of(plan, segment), plan.model
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


def _machine(cluster: Cluster, num_neighbours: int) -> Machine:
    if cluster.peak_flops_per_s is None:
        return _CPU
    link = _NVLINK_BYTES_PER_S
    if num_neighbours > cluster.devices_per_node and cluster.network_bytes_per_s is not None:
        link = cluster.network_bytes_per_s / cluster.devices_per_node
    return Machine(
        link_bytes_per_s=link,
        flops_per_s=_SHARE_OF_PEAK * cluster.peak_flops_per_s,
        message_s=_MESSAGE_S,
    )
