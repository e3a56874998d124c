"""One step of a recipe on one device, done by megamoe's engine, for gpu_check.py."""

import hashlib
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.breakdown import Breakdown
from benchmarks.timing import peak_memory, reset_peak, summary, time_steps
from megamoe.errors import DataError
from megamoe.mcore import groups
from megamoe.mcore.data import TrainingText
from megamoe.mcore.engine import Engine
from megamoe.mcore.model import unwrap
from megamoe.nn import attention_gpu
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cluster import Cluster
from megamoe.plan.flops import train_flops_per_token
from megamoe.plan.params import count_params
from megamoe.plan.plan import Data, Plan, Shard, Source
from megamoe.recipe import Bf16, LearningRate, Recipe
from megamoe.recipe.layout import one_rank

# bfloat16 weight 2, float32 sum of gradients 4, float32 weight 4, Adam's two moments 8.
STATE_BYTES = 18
# Kept for the backward pass, per token, layer and hidden unit: an estimate that chooses the first
# number of layers to try. The norms alone keep some 50, the experts 80 with five of a token.
ACTIVATION_BYTES = 200
LOGIT_BYTES = 14  # per token and entry of the vocabulary: bfloat16, and float32 three times
MAX_STEPS = 1_000  # of a plan: more than any case makes


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a step is made of."""

    sequences: int
    micro_batch: int
    warmup: int
    count: int


def layers_that_fit(recipe: Recipe, load: Load, memory_bytes: int) -> int:
    """Return the most layers whose states and activations fit, by the numbers above."""
    model, stage = recipe.model, recipe.stages[0]
    tokens = load.micro_batch * stage.seq_len
    for num_layers in reversed(layer_counts(recipe)):
        states = STATE_BYTES * count_params(replace(model, num_layers=num_layers)).total
        activations = (
            ACTIVATION_BYTES * model.hidden_dim * num_layers + LOGIT_BYTES * model.vocab_size
        )
        if states + tokens * activations <= memory_bytes:
            return num_layers
    return layer_counts(recipe)[0]


def layer_counts(recipe: Recipe) -> list[int]:
    """Return the numbers of layers to try: whole periods of local and global layers."""
    period, total = len(recipe.model.window_pattern), recipe.model.num_layers
    whole = list(range(period, total + 1, period))
    return whole if total in whole else [*whole, total]


def make_plan(recipe: Recipe, num_layers: int, load: Load, device: torch.device) -> Plan:
    """Return a plan of the recipe's first stage on one device, in bfloat16, without data."""
    stage = recipe.stages[0]
    ones = one_rank(load.micro_batch)
    stage = replace(
        stage,
        tokens=MAX_STEPS * load.sequences * stage.seq_len,
        batch_ramp=((0, load.sequences),),
        lr=LearningRate(
            peak=stage.lr.peak, final=None, warmup_tokens=0, decay_tokens=0, decay="linear"
        ),
        precision=Bf16(),
        layout=ones,
        fim_rate=0.0,
    )
    cluster = Cluster(
        name="this machine",
        num_nodes=1,
        devices_per_node=1,
        device="cuda" if device.type == "cuda" else "cpu",
        device_name=device.type,
        peak_flops_per_s=None,
        memory_bytes=None,
        network_bytes_per_s=None,
    )
    model = replace(recipe.model, num_layers=num_layers)
    recipe = replace(recipe, model=model, stages=(stage,))
    return build_plan(recipe, cluster, Options(deterministic=False))


def with_text(plan: Plan, folder: Path, shards: dict[str, Shard], vocab_size: int) -> Plan:
    """Return the plan with sources of equal weight, of a folder of shards."""
    sources = tuple(
        Source(name=name, weight=1 / len(shards), shard=shard) for name, shard in shards.items()
    )
    data = Data(folder=str(folder), eod_id=0, pad_id=1, vocab_size=vocab_size, heldout=())
    return replace(plan, data=data, segments=(replace(plan.segments[0], sources=sources),))


def random_text(plan: Plan, folder: Path) -> Plan:
    """Return the plan with a shard of random tokens of the whole vocabulary."""
    seq_len, vocab_size = plan.segments[0].seq_len, plan.model.vocab_size
    generator = numpy.random.default_rng(0)
    documents = (generator.integers(2, vocab_size, size=seq_len) for _ in range(64))
    return with_text(
        plan, folder, {"random": write(folder, "random", documents, vocab_size)}, vocab_size
    )


def write(
    folder: Path, name: str, documents: Iterable[NDArray[numpy.integer]], vocab_size: int
) -> Shard:
    """Write documents as a shard."""
    from data_prep.shards import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    with ShardWriter(folder / name, vocab_size) as writer:
        for tokens in documents:
            writer.add(tokens)
            total += len(tokens)
        writer.finish()
    digest = hashlib.sha256((folder / f"{name}.idx").read_bytes()).hexdigest()
    return Shard(prefix=name, tokens=total, sha256_idx=digest)


@contextmanager
def world_of_one(plan: Plan, device: torch.device) -> Iterator[None]:
    """Be the only rank of a plan's segment."""
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    try:
        groups.form(plan, plan.segments[0])
        yield
    finally:
        groups.stop()


def measure(
    engine: Engine, plan: Plan, load: Load, device: torch.device, peaks: dict[str, float | None]
) -> dict[str, Any]:
    """Return the figures of an engine's steps on the text of a plan."""
    segment = plan.segments[0]
    cache = engine.folder.parent / "cache"
    engine.text = TrainingText(plan, segment, cache)
    results = []
    reset_peak(device)
    seconds = time_steps(
        lambda: results.append(engine.train_step()),
        device,
        warmup=load.warmup,
        count=load.count,
    )
    figures = summary(
        seconds, load.sequences * segment.seq_len, train_flops_per_token(plan, segment), peaks
    )
    return figures | {
        "peak_memory_bytes": peak_memory(device),
        "loss": {"first": results[0].loss, "last": results[-1].loss},
        "expert_load": {  # busiest expert of a layer over the mean, in the last step
            "median": statistics.median(results[-1].expert_load),
            "max": max(results[-1].expert_load),
        },
    }


@contextmanager
def balanced(engine: Engine) -> Iterator[None]:
    """Have Megatron-core route at random, which is even, until the end."""
    configs = {
        id(module.config): module.config
        for module in unwrap(engine.chunks[0]).modules()
        if hasattr(module, "config")
    }
    for config in configs.values():
        config.moe_router_force_load_balancing = True
    try:
        yield
    finally:
        for config in configs.values():
            config.moe_router_force_load_balancing = False


def break_down(engine: Engine, device: torch.device) -> dict[str, Any]:
    """Return the time of one more step by kind of module; the marks themselves take some."""
    breakdown = Breakdown(device)
    step = engine.optimizer.step

    def marked() -> Any:
        with breakdown.span("optimizer", "step"):
            return step()

    engine.optimizer.step = marked
    try:
        with (
            breakdown.watch(_kinds(unwrap(engine.chunks[0]))),
            breakdown.span("whole step", "step"),
        ):
            engine.train_step()
    finally:
        engine.optimizer.step = step
    return {
        "how": "events around modules in one step; kinds inside others are counted in both",
        "attention kernels": attention_kernels(engine, device),
        "kinds": breakdown.milliseconds(),
    }


def attention_kernels(engine: Engine, device: torch.device) -> dict[str, str]:
    """Return the kernels that attention is given on this device."""
    from megamoe.nn.attention import describe
    from megamoe.recipe import MLA

    attention = engine.plan.model.attention
    if not isinstance(attention, MLA):
        return describe(device, attention.head_dim, attention.head_dim)
    key_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    return describe(device, key_dim, attention.v_head_dim)


def check_kernel(name: str) -> None:
    """Refuse what is not the name of a kernel for attention.

    Raises:
        DataError: there is no such kernel.
    """
    known = {*attention_gpu.FULL, *attention_gpu.WINDOW, attention_gpu.BLOCKS}
    if name not in known:
        raise DataError(
            f"--attention {name} is not a kernel; give one of {', '.join(sorted(known))}"
        )


def choose_kernel(engine: Engine, name: str) -> None:
    """Give all attention one kernel, where its kind has one of that name."""
    from megamoe.mcore.layer import CoreAttention

    for module in unwrap(engine.chunks[0]).modules():
        if isinstance(module, CoreAttention):
            kernels = attention_gpu.FULL if module.window is None else attention_gpu.WINDOW
            module.kernel = name if name in kernels or name == attention_gpu.BLOCKS else None


def _kinds(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules to time, by kind."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from megamoe.mcore.experts import GroupedExperts
    from megamoe.mcore.layer import CoreAttention, GroupedAttention, LatentAttention, Norm
    from megamoe.mcore.router import BalancedRouter

    def every(*kinds: type) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, kinds)]

    cores: list[Any] = every(CoreAttention)
    return {
        "attention": every(LatentAttention, GroupedAttention),
        "attention core, full": [core for core in cores if core.window is None],
        "attention core, window": [core for core in cores if core.window is not None],
        "moe layer": every(MoELayer),
        "router": every(BalancedRouter),
        "routed experts": every(GroupedExperts),
        "shared experts": every(SharedExpertMLP),
        "norms": every(Norm),
        "output layer": [
            m
            for m in (getattr(model, "output_layer", None),)
            if isinstance(m, ColumnParallelLinear)
        ],
    }
