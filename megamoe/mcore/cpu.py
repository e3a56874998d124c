"""Make Megatron-core run without CUDA or without Transformer Engine. One entry point: `enable()`.

Megatron-core asks for CUDA by name in about fifty files. Each patch below replaces one such name
and says which line makes it necessary (Megatron-core 0.16.1; in 0.19.2 too, unless it names the
version without the need). tests/mcore/test_cpu.py fails when the installed Megatron-core no longer
needs one. With CUDA present torch is not touched; two of the patches stand in for Transformer
Engine and are needed on a GPU that lacks it, too.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors


@dataclass(frozen=True, slots=True)
class Patch:
    """One replacement, and the line of Megatron-core that asks for it."""

    name: str
    needed_by: str  # file under megatron/core: the code as it stands there
    apply: Callable[[], None]
    for_gpu: bool = False  # changes nothing where Transformer Engine is installed
    fixed_in: tuple[int, int] | None = None  # the first version that does without


def is_needed() -> bool:
    """Tell whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def enable() -> None:
    """Apply every patch that this machine needs, once; call it before building anything."""
    if not _ENABLED:
        for patch in needed_patches():
            if is_needed() or patch.for_gpu:
                patch.apply()
        _ENABLED.append(True)


def needed_patches() -> list[Patch]:
    """Return the patches that the installed Megatron-core needs."""
    from megatron.core.package_info import VERSION

    return [patch for patch in PATCHES if patch.fixed_in is None or VERSION[:2] < patch.fixed_in]


class _Event:
    """A point in a stream that has always been reached already."""

    def record(self, *_: Any) -> None:
        """Do nothing: there is one stream."""

    def wait(self, *_: Any) -> None:
        """Do nothing: there is one stream."""

    def synchronize(self) -> None:
        """Do nothing: there is one stream."""

    def query(self) -> bool:
        """Tell that the event has happened."""
        return True


class _Stream:
    """The one stream of a CPU."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take whatever torch.cuda.Stream takes."""

    def wait_stream(self, *_: Any) -> None:
        """Do nothing: there is one stream."""

    def wait_event(self, *_: Any) -> None:
        """Do nothing: there is one stream."""

    def synchronize(self) -> None:
        """Do nothing: there is one stream."""

    def record_event(self, *_: Any) -> _Event:
        """Return an event that has happened."""
        return _Event()


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a call that only orders work on a GPU."""


@contextlib.contextmanager
def _null_context(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _patch_current_device() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def _patch_factories() -> None:
    # `with torch.device("meta")` knows the factories by a list that torch 2.13 makes at its first use
    # (utils/_device.py:19) and keeps: of what is replaced here it must hold the originals.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _patch_tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _patch_tensor_type() -> None:
    original = torch.Tensor.type

    def type_of(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, **kwargs)

    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]


def _patch_streams() -> None:
    for name in ("current_stream", "default_stream", "Stream"):
        setattr(torch.cuda, name, _Stream)
    torch.cuda.Event = lambda *_, **__: _Event()  # type: ignore[assignment, misc]
    torch.cuda.stream = _null_context  # type: ignore[assignment]
    torch.cuda.synchronize = _nothing
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]


def _patch_random() -> None:
    from megatron.core.tensor_parallel import random

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = set_state  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    # The one generator stands for both, so the warning that it moved says nothing.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = set_state


def _patch_te_linear() -> None:
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):  # it is a mock or None without
        multi_latent_attention.HAVE_TE = False


def _patch_router_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _patch_split_sizes() -> None:
    original = torch.distributed.all_to_all_single

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return original(
            output, input, _as_ints(output_split_sizes), _as_ints(input_split_sizes), **kwargs
        )

    torch.distributed.all_to_all_single = all_to_all_single  # type: ignore[assignment]


def share_unevenly() -> None:
    """Gather and scatter shares of different lengths: NCCL does, gloo only equal ones."""
    distributed: Any = torch.distributed
    gather, scatter = distributed.all_gather, distributed.reduce_scatter

    @functools.wraps(gather)
    def all_gather(outputs: list[torch.Tensor], x: torch.Tensor, group: Any, **options: Any) -> Any:
        if _are_equal(outputs):
            return gather(outputs, x, group=group, **options)
        outputs[distributed.get_rank(group)].copy_(x)
        for rank, output in enumerate(outputs):
            distributed.broadcast(output, group_src=rank, group=group)
        return None

    @functools.wraps(scatter)
    def reduce_scatter(output: torch.Tensor, shares: list[torch.Tensor], group: Any) -> Any:
        if _are_equal(shares):
            return scatter(output, shares, group=group)
        sums = [share.clone() for share in shares]
        for rank, share in enumerate(sums):
            distributed.reduce(share, group_dst=rank, group=group)
        output.copy_(sums[distributed.get_rank(group)])
        return None

    distributed.all_gather, distributed.reduce_scatter = all_gather, reduce_scatter


def _are_equal(shares: list[torch.Tensor]) -> bool:
    return len({share.shape for share in shares}) == 1


def _as_ints(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


PATCHES = (
    Patch(
        "current_device",
        "transformer/moe/router.py: device=torch.cuda.current_device()",
        _patch_current_device,
    ),
    Patch(
        "factories",
        'pipeline_parallel/schedules.py: torch.zeros([], dtype=torch.int, device="cuda")',
        _patch_factories,
    ),
    Patch(
        "tensor_cuda",
        "models/common/language_module/language_module.py: weight.data = weight.data.cuda()",
        _patch_tensor_cuda,
    ),
    Patch(
        "tensor_type",
        "optimizer/distrib_optimizer.py: model_param.type() == 'torch.cuda.FloatTensor'",
        _patch_tensor_type,
    ),
    Patch(
        "streams",
        "transformer/moe/token_dispatcher.py: torch.cuda.current_stream()",
        _patch_streams,
    ),
    Patch(
        "random",
        "tensor_parallel/random.py: torch.cuda.get_rng_state()",
        _patch_random,
    ),
    Patch(
        "te_linear",
        "transformer/multi_latent_attention.py: isinstance(self.linear_proj, TELinear)",
        _patch_te_linear,
        for_gpu=True,
        fixed_in=(0, 17),  # :61 there binds TELinear to None instead of a mock
    ),
    Patch(
        "router_gemm",
        "transformer/moe/moe_utils.py: if te_general_gemm is not None",
        _patch_router_gemm,
        for_gpu=True,
        fixed_in=(0, 17),  # :52 there binds te_general_gemm to None
    ),
    Patch(
        "split_sizes",
        "tensor_parallel/mappings.py: torch.distributed.all_to_all_single(",
        _patch_split_sizes,
    ),
    Patch(
        "uneven_shares",
        "tensor_parallel/mappings.py: torch.distributed.all_gather(output_tensor_list, input_",
        share_unevenly,
    ),
)
_ENABLED: list[bool] = []
