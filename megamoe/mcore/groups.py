"""Process groups of one segment."""

from datetime import timedelta
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megamoe.errors import LaunchError
from megamoe.mcore.sharing import Sharing, agreed, sharing_of
from megamoe.nn.context_group import ContextGroup
from megamoe.plan.plan import Plan, Segment

T = TypeVar("T")
CONTEXTS = ("local", "global", "tokens")  # layers with a window, layers without, what is predicted
_LONGEST_WRITE = timedelta(hours=2)  # ranks that have written wait for the slowest


def start(plan: Plan, segment: Segment) -> None:
    """Join the process group (environment as torchrun sets it) and form the segment's groups."""
    device = plan.cluster.device
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(torch.distributed.get_node_local_rank())
    form(plan, segment)


def form(plan: Plan, segment: Segment) -> None:
    """Form the segment's groups among the processes that have joined, and settle torch.

    Raises:
        LaunchError: the number of processes is not the plan's.
    """
    world = torch.distributed.get_world_size()
    if world != segment.world_size:
        raise LaunchError(
            f"segment {segment.index} ({segment.stage}) is planned for {segment.world_size} "
            f"processes, {world} were started"
        )
    layout = segment.layout
    with_table = layout.ranks_with_table(plan.model)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # Megatron-Core 0.16.1 and 0.19.2 parallel_state.py default_embedding_ranks: the first and the
        # last, whose gradients would be added up though the last has another matrix.
        get_embedding_ranks=lambda ranks: [ranks[place] for place in with_table],
    )
    group = parallel_state.get_context_parallel_group() if layout.cp > 1 else None
    _CONTEXTS.update({kind: ContextGroup(group) for kind in CONTEXTS})
    _SAVING[:] = [torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WRITE)]
    settle(plan)
    _SHARING[:] = [agreed(sharing_of(plan, segment), saving())]


def saving() -> torch.distributed.ProcessGroup:
    """Return the group of all ranks that is for checkpoints alone and works without a GPU.

    A thread writes them while training goes on, so their collectives must not meet training's.
    """
    return _SAVING[0]


def told_by_all(mine: T) -> list[T]:
    """Return what each rank gives, by rank; small, and on the CPU. All ranks call this together."""
    told = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, mine, group=saving())
    return told


def context(kind: str) -> ContextGroup:
    """Return the ranks that share this rank's sequences; each of `CONTEXTS` counts bytes of its own."""
    return _CONTEXTS[kind]


def context_sharing() -> Sharing:
    """Return what the segment's layers choose by how they share sequences."""
    return _SHARING[0]


def take_context_bytes() -> tuple[tuple[str, int, int], ...]:
    """Return and forget the bytes received by each of `CONTEXTS`, forward and backward, if shared.

    Each number is that of the rank that received most: the first of a sequence gets no halo. All
    ranks call this together.
    """
    received = [(cp.received.forward, cp.received.backward) for cp in _CONTEXTS.values()]
    for cp in _CONTEXTS.values():
        cp.received.forward = cp.received.backward = 0
    if all(cp.size == 1 for cp in _CONTEXTS.values()):
        return ()
    most = torch.tensor(received, device=torch.cuda.current_device())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    pairs = zip(_CONTEXTS, most.tolist(), strict=True)
    return tuple((kind, forward, backward) for kind, (forward, backward) in pairs)


def settle(plan: Plan) -> None:
    """Seed the generators and choose deterministic kernels as the plan says."""
    torch.use_deterministic_algorithms(plan.deterministic)
    # Filling every new tensor with NaN costs 8 % of a step; tests/numerics does it instead.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(plan.seed)
    model_parallel_cuda_manual_seed(plan.seed)


def sharding() -> dict[str, Any]:
    """Return what Megatron-core's sharded state dicts need to know."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def stop() -> None:
    """Leave all groups."""
    _SAVING.clear()
    _CONTEXTS.clear()
    _SHARING.clear()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


_CONTEXTS: dict[str, ContextGroup] = {}
_SHARING: list[Sharing] = []
_SAVING: list[torch.distributed.ProcessGroup] = []
