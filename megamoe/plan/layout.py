"""Checks that a stage's layout fits the model and the cluster."""

from collections.abc import Callable
from dataclasses import replace

from megamoe.errors import PlanError
from megamoe.plan.cluster import Cluster
from megamoe.plan.nearest import Asked, axes_text, remedies
from megamoe.plan.plan import Segment
from megamoe.recipe.layout import Layout
from megamoe.recipe.model import GQA, Model
from megamoe.recipe.precision import Fp8Block, Fp8Delayed, Fp32
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.stage import Stage

# DeepEP 1.2.1 deep_ep/buffer.py:232, get_dispatch_config: sizes of groups that it is built for.
_DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)


def settle_dp(recipe: Recipe, stage: Stage, cluster: Cluster) -> int:
    """Return the size of the data-parallel axis once every check has passed.

    Raises:
        PlanError: the stage cannot run on the cluster; says what would.
    """
    place = f"{recipe.name}/{stage.name}"
    misfit = _problem(lambda: _check_layout(place, recipe.model, stage, cluster))
    if isinstance(stage.precision, (Fp8Delayed, Fp8Block)) and cluster.device == "cpu":
        other = "" if misfit else f" or --set '{stage.name}.precision=Bf16()'"
        raise PlanError(
            f"{place}: precision {type(stage.precision).__name__} needs a Hopper GPU, and cluster "
            f"{cluster.name!r} has none; use --scale tiny{other}"
        )
    if misfit:
        raise PlanError(f"{misfit}{_remedies(recipe.model, stage, cluster)}")
    return cluster.world_size // (stage.layout.tp * stage.layout.pp * stage.layout.cp)


def layout_text(segment: Segment) -> str:
    """Return the axes of the rank grid that are in use, and a written pipeline: 'dp64 pp4 ep8'."""
    return axes_text(segment.dp, segment.layout)


def _check_layout(place: str, model: Model, stage: Stage, cluster: Cluster) -> None:
    """Raise PlanError with what does not fit, and no remedy."""
    _check_world(place, stage, cluster)
    _check_shape(place, model, stage)
    _check_batches(place, stage, cluster)
    _check_dispatcher(place, stage, cluster)


def _check_shape(place: str, model: Model, stage: Stage) -> None:
    """Check what depends on neither the cluster nor the batches."""
    _check_model(place, model, stage)
    _check_sequence(place, stage)
    _check_pipeline(place, model, stage)


def _remedies(model: Model, stage: Stage, cluster: Cluster) -> str:
    def fits(stage: Stage, world_size: int) -> bool:
        world = replace(cluster, num_nodes=1, devices_per_node=world_size)
        return _problem(lambda: _check_layout("", model, stage, world)) is None

    asked = Asked(
        stage=stage,
        world_size=cluster.world_size,
        devices_per_node=cluster.devices_per_node if cluster.num_nodes > 1 else 1,
        num_routed=model.experts.num_routed,
        fits=fits,
        suits=lambda stage: _problem(lambda: _check_shape("", model, stage)) is None,
    )
    return remedies(asked)


def _problem(check: Callable[[], None]) -> str | None:
    """Return what a check says against a stage; None: it passes."""
    try:
        check()
    except PlanError as error:
        return str(error)
    return None


def _check_world(place: str, stage: Stage, cluster: Cluster) -> None:
    world, layout = cluster.world_size, stage.layout
    dense = layout.tp * layout.pp * layout.cp
    experts = layout.etp * layout.ep * layout.pp
    if world % dense:
        raise PlanError(
            f"{place}: world size {world} is not a multiple of tp {layout.tp} x pp {layout.pp} x "
            f"cp {layout.cp} = {dense}"
        )
    if world % experts:
        raise PlanError(
            f"{place}: world size {world} is not a multiple of etp {layout.etp} x ep {layout.ep} x "
            f"pp {layout.pp} = {experts}"
        )


def _check_model(place: str, model: Model, stage: Stage) -> None:
    tp, etp = stage.layout.tp, stage.layout.etp
    shared = model.experts.num_shared * model.experts.ffn_dim
    for name, size, axis, ways in (
        ("attention.num_heads", model.attention.num_heads, "tp", tp),
        ("vocab_size", model.vocab_size, "tp", tp),
        ("dense_ffn_dim", model.dense_ffn_dim or 0, "tp", tp),
        ("experts.num_shared x ffn_dim", shared, "tp", tp),
        ("experts.ffn_dim", model.experts.ffn_dim, "etp", etp),
        ("experts.num_routed", model.experts.num_routed, "ep", stage.layout.ep),
    ):
        if size % ways:
            raise PlanError(f"{place}: model.{name} {size:,} is not a multiple of {axis} {ways}")
    _check_shared_heads(place, model, stage.layout)
    if isinstance(model.attention, GQA):
        kv_heads = model.attention.num_kv_heads
        if kv_heads % tp and tp % kv_heads:
            raise PlanError(
                f"{place}: model.attention.num_kv_heads {kv_heads} is neither a multiple nor a "
                f"divisor of tp {tp}"
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
            "divide them"
        )
    if isinstance(attention, GQA):
        kv_heads = max(1, attention.num_kv_heads // layout.tp)
        if kv_heads % cp and cp % kv_heads:
            raise PlanError(
                f"{place}: cp_scheme 'heads' deals {kv_heads} key-value heads of a rank to cp {cp}, "
                "which is neither a multiple nor a divisor"
            )


def _check_sequence(place: str, stage: Stage) -> None:
    tp, cp = stage.layout.tp, stage.layout.cp
    unit = tp * cp  # a rank of cp has a row of tokens, which sequence parallel splits by tp
    if stage.seq_len % unit:
        both = f"cp {cp} x tp {tp} = {unit}" if cp > 1 else f"tp {tp}"
        raise PlanError(f"{place}: seq_len {stage.seq_len:,} is not a multiple of {both}")


def _check_pipeline(place: str, model: Model, stage: Stage) -> None:
    pp, vpp, num_layers = stage.layout.pp, stage.layout.vpp, model.num_layers
    if stage.layout.chunks(model) is not None:
        return
    if pp * vpp > num_layers:
        raise PlanError(
            f"{place}: pp {pp} x vpp {vpp} = {pp * vpp} exceeds model.num_layers {num_layers}"
        )
    raise PlanError(
        f"{place}: num_layers {num_layers} is not a multiple of pp {pp} x vpp {vpp} = "
        f"{pp * vpp}, and leaves the last chunk none unless layout.pipeline is written"
    )


def _check_batches(place: str, stage: Stage, cluster: Cluster) -> None:
    layout = stage.layout
    dp = cluster.world_size // (layout.tp * layout.pp * layout.cp)
    # an interleaved pipeline hands micro-batches on in rounds of pp
    unit = layout.micro_batch * dp * (layout.pp if layout.vpp > 1 else 1)
    rounds = f" x pp {layout.pp} (interleaved)" if layout.vpp > 1 else ""
    for start, size in stage.batch_ramp:
        if size % unit:
            raise PlanError(
                f"{place}: batch_ramp entry ({start:,}, {size:,}): {size:,} sequences are not a "
                f"multiple of micro_batch {layout.micro_batch} x dp {dp}{rounds} = {unit:,}"
            )


def _check_dispatcher(place: str, stage: Stage, cluster: Cluster) -> None:
    """Check what the libraries for GPUs can send; without a GPU or the library none is used."""
    layout = stage.layout
    ranks = layout.ep * layout.etp
    if ranks == 1 or cluster.device == "cpu" or layout.dispatcher not in ("deepep", "hybridep"):
        return
    if isinstance(stage.precision, Fp32):
        raise PlanError(
            f"{place}: dispatcher {layout.dispatcher!r} sends bfloat16, and precision is Fp32"
        )
    if layout.dispatcher == "deepep" and ranks not in _DEEPEP_RANKS:
        raise PlanError(
            f"{place}: dispatcher 'deepep' has no kernel for ep {layout.ep} x etp {layout.etp} = "
            f"{ranks} ranks, only for {', '.join(str(size) for size in _DEEPEP_RANKS)}"
        )
