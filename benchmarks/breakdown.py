"""Where the time of a step goes, by kind of module, from events around each module.

Forward: between a module's call and its return. Backward: from the gradient of its output to that of
its input. Parts that overlap in the graph (routed and shared experts) share time in the backward
pass, and a kind inside another is counted in both.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Clock = Callable[[], Any]


class Breakdown:
    """Records a mark at the bounds of modules, and adds up the time between them."""

    def __init__(self, device: torch.device) -> None:
        """Take the clock of the device."""
        self.device = device
        self.marks: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
        self.starts: dict[tuple[int, str], Any] = {}

    def mark(self) -> Any:
        """Return a point in the device's time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def span(self, kind: str, direction: str) -> Iterator[None]:
        """Measure what is done inside."""
        start = self.mark()
        yield
        self.marks[kind, direction].append((start, self.mark()))

    @contextmanager
    def watch(self, kinds: dict[str, list[nn.Module]]) -> Iterator[None]:
        """Measure modules by kind until the end."""
        handles = [
            handle
            for kind, modules in kinds.items()
            for module in modules
            for handle in self._hooks(kind, module)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def milliseconds(self) -> dict[str, dict[str, float | int]]:
        """Return what was measured: milliseconds of all modules of a kind, by direction."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, dict[str, float | int]] = {}
        for (kind, direction), pairs in self.marks.items():
            total = sum(self._elapsed(start, end) for start, end in pairs)
            found.setdefault(kind, {})[f"{direction}_ms"] = total
            found[kind][f"{direction}_calls"] = len(pairs)
        return found

    def _elapsed(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start) * 1e3
        return float(start.elapsed_time(end))

    def _hooks(self, kind: str, module: nn.Module) -> Iterator[Any]:
        key = id(module)

        def start(direction: str) -> None:
            self.starts[key, direction] = self.mark()

        def end(direction: str) -> None:
            begun = self.starts.pop((key, direction), None)
            if begun is not None:
                self.marks[kind, direction].append((begun, self.mark()))

        yield module.register_forward_pre_hook(lambda *_: start("forward"))
        yield module.register_forward_hook(lambda *_: end("forward"))
        yield module.register_full_backward_pre_hook(lambda *_: start("backward"))
        yield module.register_full_backward_hook(lambda *_: end("backward"))
