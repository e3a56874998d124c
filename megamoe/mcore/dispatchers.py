"""How tokens reach the experts of other ranks: a layout's dispatcher as Megatron-core's options.

DeepEP and HybridEP are libraries that need a GPU. Where one cannot be had, every rank uses all-to-all,
which computes the same, and the run says so.
"""

import importlib
from dataclasses import replace
from typing import Any

import torch

from megamoe.plan.plan import Plan, Segment
from megamoe.recipe.layout import Layout

_OPTIONS = {
    "all_gather": {"moe_token_dispatcher_type": "allgather"},
    "all_to_all": {"moe_token_dispatcher_type": "alltoall"},
    "deepep": {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
    },
    "hybridep": {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "hybridep",
    },
}
# What Megatron-Core 0.16.1 and 0.19.2 transformer/moe/fused_a2a.py import, and do without silently.
# DeepEP 1.2 has the first, DeepEP's branch hybrid-ep both; DeepEP 2.1 moved EventOverlap.
_NEEDED = {
    "deepep": (("deep_ep", "Buffer"), ("deep_ep.utils", "EventHandle, EventOverlap")),
    "hybridep": (("deep_ep", "HybridEPBuffer"),),
}


def dispatcher_options(layout: Layout) -> dict[str, Any]:
    """Return Megatron-core's options of a layout's dispatcher.

    Where one rank holds whole layers of experts there is nothing to send: its dispatcher is replaced
    (megamoe/mcore/dispatch.py), and 0.16.1 token_dispatcher.py:1346 refuses to make the flexible one.
    """
    return _OPTIONS["all_to_all" if layout.ep * layout.etp == 1 else layout.dispatcher]


def settle_dispatcher(plan: Plan, segment: Segment) -> tuple[Segment, tuple[str, ...]]:
    """Return the segment with a dispatcher that all its ranks have, and a line where it is another.

    All ranks of the segment call it: one whose machine lacks the library decides for all.
    """
    layout = segment.layout
    if layout.dispatcher not in _NEEDED or layout.ep * layout.etp == 1:
        return segment, ()
    problem = _problem(plan.cluster.device, layout.dispatcher)
    if problem is None:
        return segment, ()
    note = (
        f"{segment.stage}: dispatcher {layout.dispatcher}: {problem}; all_to_all is used instead, "
        "with the same result"
    )
    return replace(segment, layout=replace(layout, dispatcher="all_to_all")), (note,)


def missing(dispatcher: str) -> str | None:
    """Return what a library lacks that a dispatcher needs of it, here; None: nothing."""
    for name, attributes in _NEEDED[dispatcher]:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            return f"package deep_ep cannot be imported ({error})"
        for attribute in attributes.split(", "):
            if not hasattr(module, attribute):
                return f"package deep_ep has no {attribute} in {name}"
    return None


def _problem(device: str, dispatcher: str) -> str | None:
    """Return why ranks cannot use a dispatcher: what the first that cannot says."""
    if device == "cpu":
        return "package deep_ep needs a GPU"
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, missing(dispatcher))
    return next((f"rank {rank}: {each}" for rank, each in enumerate(problems) if each), None)
