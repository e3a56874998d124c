"""Wall clocks around work on a device, and the highest rate that it reaches."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(
    step: Callable[[], Any], device: torch.device, *, warmup: int, count: int
) -> list[float]:
    """Return the seconds of `count` steps, each from an idle device to an idle device."""
    seconds = []
    for index in range(warmup + count):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def reset_peak(device: torch.device) -> None:
    """Begin a new count of the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors took since the count began; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def matmul_ceiling(device: torch.device, size: int) -> dict[str, float | int]:
    """Return the rate of a square bfloat16 product of random numbers, as torch multiplies it."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = statistics.median(time_steps(lambda: left @ right, device, warmup=5, count=20))
    return {"size": size, "seconds": seconds, "tflop_per_s": 2 * size**3 / seconds / 1e12}


def summary(
    seconds: list[float], tokens: int, flops_per_token: float, peaks: dict[str, float | None]
) -> dict[str, Any]:
    """Return the figures of a case from the seconds of its steps.

    Args:
        seconds: of each step.
        tokens: of a step.
        flops_per_token: of training, as the plan counts them.
        peaks: name to operations per second, that the model's rate is a share of.
    """
    median = statistics.median(seconds)
    rate = tokens * flops_per_token / median
    return {
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "steps": len(seconds),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / median,
        "model_tflop_per_s": rate / 1e12,
        "mfu": {name: rate / peak if peak else None for name, peak in peaks.items()},
    }
