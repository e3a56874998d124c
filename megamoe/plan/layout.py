"""Checks that a stage's layout fits the model and the cluster."""

import math

from megamoe.errors import PlanError
from megamoe.plan.cluster import Cluster
from megamoe.plan.plan import Segment
from megamoe.recipe.layout import Layout
from megamoe.recipe.model import GQA, Model
from megamoe.recipe.precision import Fp8Block, Fp8Delayed
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.stage import Stage


def settle_dp(recipe: Recipe, stage: Stage, cluster: Cluster) -> int:
    """Return the size of the data-parallel axis once every check has passed.

    Raises:
        PlanError: the stage cannot run on the cluster; says what would.
    """
    place = f"{recipe.name}/{stage.name}"
    if isinstance(stage.precision, (Fp8Delayed, Fp8Block)) and cluster.device == "cpu":
        raise PlanError(
            f"{place}: precision {type(stage.precision).__name__} needs a Hopper GPU, and cluster "
            f"{cluster.name!r} has none; use --scale tiny or --set '{stage.name}.precision=Bf16()'"
        )
    dp = _check_world(place, stage, cluster)
    _check_model(place, recipe.model, stage)
    _check_sequence(place, stage)
    _check_pipeline(place, recipe.model, stage)
    _check_batches(place, stage, dp)
    return dp


def layout_text(segment: Segment) -> str:
    """Return the axes of the rank grid that are in use: 'dp64 pp4 ep8'."""
    axes = ("tp", "pp", "vpp", "cp", "ep", "etp")
    sizes = [(axis, getattr(segment.layout, axis)) for axis in axes]
    return " ".join([f"dp{segment.dp}", *(f"{axis}{size}" for axis, size in sizes if size > 1)])


def _check_world(place: str, stage: Stage, cluster: Cluster) -> int:
    world, layout = cluster.world_size, stage.layout
    unit = "GPUs" if cluster.device == "cuda" else "processes"
    dense = layout.tp * layout.pp * layout.cp
    experts = layout.etp * layout.ep * layout.pp
    both = math.lcm(dense, experts)
    if world % dense:
        raise PlanError(
            f"{place}: world size {world} is not a multiple of tp {layout.tp} x pp {layout.pp} x "
            f"cp {layout.cp} = {dense}; use {_multiples(world, both)} {unit}"
        )
    if world % experts:
        raise PlanError(
            f"{place}: world size {world} is not a multiple of etp {layout.etp} x ep {layout.ep} x "
            f"pp {layout.pp} = {experts}; use {_multiples(world, both)} {unit}"
        )
    return world // dense


def _check_model(place: str, model: Model, stage: Stage) -> None:
    tp, etp = stage.layout.tp, stage.layout.etp
    shared = model.experts.num_shared * model.experts.ffn_dim
    for name, size, axis, ways in (
        ("attention.num_heads", model.attention.num_heads, "tp", tp),
        ("vocab_size", model.vocab_size, "tp", tp),
        ("dense_ffn_dim", model.dense_ffn_dim or 0, "tp", tp),
        ("experts.num_shared x ffn_dim", shared, "tp", tp),
        ("experts.ffn_dim", model.experts.ffn_dim, "etp", etp),
    ):
        if size % ways:
            raise PlanError(
                f"{place}: model.{name} {size:,} is not a multiple of {axis} {ways}; "
                f"use {axis} {_largest_divisor(size, ways)}"
            )
    _check_shared_heads(place, model, stage.layout)
    if isinstance(model.attention, GQA):
        kv_heads = model.attention.num_kv_heads
        if kv_heads % tp and tp % kv_heads:
            raise PlanError(
                f"{place}: model.attention.num_kv_heads {kv_heads} is neither a multiple nor a "
                f"divisor of tp {tp}; use tp {_largest_divisor(kv_heads, tp)}"
            )


def _check_shared_heads(place: str, model: Model, layout: Layout) -> None:
    """With cp_scheme "heads", ranks of cp have the same number of whole heads, with their keys."""
    if layout.cp_scheme != "heads" or layout.cp == 1:
        return
    attention, cp = model.attention, layout.cp
    heads = attention.num_heads // layout.tp
    if heads % cp:
        raise PlanError(
            f"{place}: cp_scheme 'heads' deals {heads} heads of a rank to cp {cp}, which does not "
            f"divide them; use cp {_largest_divisor(heads, cp)}, or cp_scheme 'ring'"
        )
    if isinstance(attention, GQA):
        kv_heads = max(1, attention.num_kv_heads // layout.tp)
        if kv_heads % cp and cp % kv_heads:
            raise PlanError(
                f"{place}: cp_scheme 'heads' deals {kv_heads} key-value heads of a rank to cp {cp}, "
                f"which is neither a multiple nor a divisor; use cp {_largest_divisor(kv_heads, cp)}, "
                "or cp_scheme 'ring'"
            )


def _check_sequence(place: str, stage: Stage) -> None:
    tp, cp = stage.layout.tp, stage.layout.cp
    unit = tp * cp  # a rank of cp has a row of tokens, which sequence parallel splits by tp
    if stage.seq_len % unit:
        both = f"cp {cp} x tp {tp} = {unit}" if cp > 1 else f"tp {tp}"
        raise PlanError(
            f"{place}: seq_len {stage.seq_len:,} is not a multiple of {both}; "
            f"use {_multiples(stage.seq_len, unit)} tokens"
        )


def last_rank_layers(num_layers: int, layout: Layout) -> int:
    """Return the layers of the last pipeline rank; all others hold ceil(num_layers / pp).

    Where pp does not divide the layers, the last rank has fewer: it also has the output table and
    the multi-token prediction. 0 or less: they cannot be dealt so.
    """
    each = -(-num_layers // layout.pp)
    return num_layers - each * (layout.pp - 1)


def _check_pipeline(place: str, model: Model, stage: Stage) -> None:
    pp, vpp = stage.layout.pp, stage.layout.vpp
    uneven = vpp == 1 and last_rank_layers(model.num_layers, stage.layout) >= 1
    if model.num_layers % (pp * vpp) and not uneven:
        known = sorted(n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0)
        near = sorted(known, key=lambda n: abs(n - pp * vpp))[:2]
        raise PlanError(
            f"{place}: num_layers {model.num_layers} is not a multiple of pp {pp} x vpp {vpp} = "
            f"{pp * vpp}; use pp x vpp = {' or '.join(str(n) for n in sorted(near))}"
        )


def _check_batches(place: str, stage: Stage, dp: int) -> None:
    layout = stage.layout
    per_micro_batch = layout.micro_batch * dp
    # an interleaved pipeline hands micro-batches on in rounds of pp
    unit = per_micro_batch * (layout.pp if layout.vpp > 1 else 1)
    rounds = f" x pp {layout.pp} (interleaved)" if layout.vpp > 1 else ""
    for start, size in stage.batch_ramp:
        if size % unit:
            raise PlanError(
                f"{place}: batch_ramp entry ({start:,}, {size:,}): {size:,} sequences are not a "
                f"multiple of micro_batch {layout.micro_batch} x dp {dp}{rounds} = {unit:,}; "
                f"use {_multiples(size, unit)} sequences, or a layout with another dp"
            )


def _multiples(value: int, unit: int) -> str:
    """Return the multiples of `unit` around `value`: '16 or 32'."""
    below = value // unit * unit
    return f"{below:,} or {below + unit:,}" if below else f"{unit:,}"


def _largest_divisor(size: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if size % n == 0)
