"""Several ranks on one GPU: processes of their own, and collectives over gloo through the processor.

NCCL wants a GPU for each rank, and gloo sends and receives tensors of the processor alone. This is for
comparing numbers: every message waits for the GPU and is copied twice.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.utils._pytree import tree_flatten, tree_map_only

from megamoe.plan.plan import Plan

BACKEND = "through_cpu"


class ThroughCpu(dist.ProcessGroup):
    """A group whose collectives are given copies of their tensors; those of the first argument come back."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        """Form a group of gloo that does the work."""
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.gloo = dist.ProcessGroup(store, rank, size)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        kind = dist.ProcessGroup.BackendType.GLOO
        self.gloo._register_backend(torch.device("cpu"), kind, backend)
        self.gloo._set_default_backend(kind)

    @property
    def _device_types(self) -> list[torch.device]:  # torch asks where to put what it makes itself
        return [torch.device("cpu")]

    def _get_backend_name(self) -> str:
        return BACKEND

    def barrier(self, *_: Any, **__: Any) -> Any:
        """Wait for all ranks."""
        return self.gloo.barrier()


class _Work:
    """What copies back what has come, once it is waited for."""

    def __init__(self, work: Any, copies: list[Tensor], tensors: list[Tensor]) -> None:
        self._work, self._copies, self._tensors = work, copies, tensors

    def wait(self, *_: Any) -> bool:
        """Wait for the processor, and copy."""
        self._work.wait()
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.detach().copy_(copy)
        self._copies = self._tensors = []
        return True


def be_rank(work: tuple[Plan, Path, int, int | None], *, is_double: bool) -> None:
    """Be a rank of `ranks.train`, in a process that has imported nothing of Megatron-core yet.

    Args:
        work: the first arguments of `ranks.be_rank`.
        is_double: float32 means float64 here (megamoe/mcore/double.py).
    """
    if is_double:
        from megamoe.mcore import double

        double.enable()
    from megamoe.parity import ranks

    ranks.be_rank(*work, _prepare)


def _prepare() -> str:
    """Settle on the GPU; return the backend of process groups."""
    from megamoe.mcore import cpu

    # Read when CUDA starts; without it torch refuses matrix products in a deterministic run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    dist.Backend.register_backend(BACKEND, ThroughCpu, devices=["cpu", "cuda"])
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
        cpu.share_unevenly()
    return BACKEND


def _through_cpu(name: str, *, returns: bool) -> Callable[..., _Work]:
    def collective(self: ThroughCpu, first: Any, *others: Any) -> _Work:
        sent = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), (first, *others))
        work = getattr(self.gloo, name)(*sent)
        copies, tensors = (
            [each for each in tree_flatten(tree)[0] if isinstance(each, Tensor)]
            for tree in (sent[0], first)
        )
        return _Work(work, copies, tensors) if returns else _Work(work, [], [])

    return collective


# By the names under which torch.distributed calls a group, which torch 2.13 has changed.
for _name in (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "recv", "recv_anysource"),
    *("allgather", "allgather_coalesced", "gather", "scatter", "alltoall", "reduce_scatter"),
    *("_allgather_base", "_reduce_scatter_base", "alltoall_base"),
    *("all_gather_single", "reduce_scatter_single", "all_to_all_single"),
    *("allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"),
    *("all_gather_single_coalesced", "reduce_scatter_single_coalesced"),
):
    if hasattr(dist.ProcessGroup, _name):
        setattr(ThroughCpu, _name, _through_cpu(_name, returns=True))
setattr(ThroughCpu, "send", _through_cpu("send", returns=False))  # noqa: B010 - another signature
