"""The real modules of a model without memory: built on torch's meta device and counted."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megamoe.errors import PlanError
from megamoe.mcore import groups
from megamoe.mcore.model import build_chunk
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cluster import Cluster
from megamoe.plan.params import ParamCount
from megamoe.plan.plan import Plan
from megamoe.plan.trainable import model_problems
from megamoe.recipe import Bf16, Recipe
from megamoe.recipe.layout import one_rank

# The first text that a parameter's name has tells the component.
_COMPONENTS = (
    ("mtp.", "mtp"),
    ("embedding.", "input_table"),
    ("output_layer.", "output_table"),
    (".self_attention.q_layernorm.", "attention_norms"),
    (".self_attention.k_layernorm.", "attention_norms"),
    (".self_attention.kv_layernorm.", "attention_norms"),
    (".self_attention.", "attention"),
    ("layernorm.", "norms"),
    ("_bda.norm.", "norms"),
    (".router.expert_bias", "expert_bias"),
    (".router.", "router"),
    (".shared_experts.", "shared_experts"),
    (".experts.", "routed_experts"),
    (".mlp.", "dense_mlp"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCount:
    """Numbers of parameters of modules, expert biases included."""

    params: ParamCount
    layers: tuple[int, ...]  # of each decoder layer


def count_modules(recipe: Recipe) -> ModuleCount:
    """Build a recipe's model on the meta device, in a world of one process, and count it."""
    plan = one_process_plan(recipe)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        groups.form(plan, plan.segments[0])
        return count_plan(plan)
    finally:
        groups.stop()


def one_process_plan(recipe: Recipe) -> Plan:
    """Return a plan of the recipe's first stage on one process, in bfloat16.

    Raises:
        PlanError: the model has a part that no engine builds yet.
    """
    for problem in model_problems(recipe.model):
        raise PlanError(f"{recipe.name}: {problem}; or count by --formula alone")
    layout = one_rank(1)
    stage = replace(recipe.stages[0], layout=layout, precision=Bf16())
    cluster = Cluster(
        name="meta",
        num_nodes=1,
        devices_per_node=1,
        device="cpu",
        device_name="meta",
        peak_flops_per_s=None,
        memory_bytes=None,
        network_bytes_per_s=None,
    )
    return build_plan(replace(recipe, stages=(stage,)), cluster, Options())


def count_plan(plan: Plan) -> ModuleCount:
    """Build the model of a plan of one process, whose groups are formed, and count it."""
    with _on_meta():
        chunk = build_chunk(plan, plan.segments[0])
    parts: dict[str, int] = defaultdict(int)
    layers = [0] * plan.model.num_layers
    for name, tensor in _numbers(chunk):
        assert tensor.is_meta, f"{name} took memory"
        parts[_component(name)] += tensor.numel()
        if name.startswith("decoder.layers."):
            layers[int(name.split(".")[2])] += tensor.numel()
    experts = plan.model.experts
    active = parts["routed_experts"] // experts.num_routed * experts.top_k
    counted = {component: parts[component] for _, component in _COMPONENTS}
    params = ParamCount(**counted, routed_experts_active=active)
    return ModuleCount(params=params, layers=tuple(layers))


def _numbers(chunk: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint of the model alone would hold: weights, and the routers' biases."""
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        if name.endswith(".router.expert_bias"):
            yield name, buffer


def _component(name: str) -> str:
    found = [component for text, component in _COMPONENTS if text in name]
    assert found, f"{name} belongs to no component"
    return found[0]


@contextmanager
def _on_meta() -> Iterator[None]:
    """Make every new tensor a meta tensor, also those that Megatron-core puts on the GPU."""
    current_device = torch.cuda.current_device
    meta = torch.device("meta")
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment, return-value]
    try:
        with meta:
            yield
    finally:
        torch.cuda.current_device = current_device
