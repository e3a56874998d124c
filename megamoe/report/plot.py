"""The losses of a run over its tokens, as a PNG. Needs matplotlib, imported when a plot is made."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.report.read import Record, RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_SOURCES = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
_TRAIN, _SOFT, _GRID = "#0072B2", "#667085", "#e4e7ec"
_SMOOTHED_SHARE = 0.02  # of all steps: how far the bold line averages
_DPI = 150


def plot_losses(run: RunRecords, path: Path) -> None:
    """Draw training and held-out loss, and expert load, over tokens, with the stages marked.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.2), layout="constrained")
    losses, load = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_training(losses, run.steps)
    _draw_heldout(losses, run.evals)
    _draw_load(load, run.steps)
    for axes in (losses, load):
        _draw_stages(axes, run)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.tick_params(colors=_SOFT, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GRID)
        axes.set_axisbelow(True)
    losses.set_ylabel("loss (nats per token)", color=_SOFT)
    load.set_ylabel("busiest expert\n/ mean", color=_SOFT, fontsize=9)
    load.set_xlabel("tokens seen", color=_SOFT)
    load.xaxis.set_major_formatter(lambda tokens, _: short_count(tokens))
    load.set_xlim(0, 1.01 * max(run.tokens_seen, 1))  # the last points whole
    _name_stages(losses, run)
    losses.legend(
        fontsize=9, loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9
    )
    figure.savefig(path, dpi=_DPI)


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the mean of the last `span` values (fewer at the start), leaving out what is not finite."""
    means, window = [], list[float]()
    for value in values:
        if math.isfinite(value):
            window.append(value)
        del window[:-span]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def short_count(number: float) -> str:
    """Return a count as people say it: '950', '1.5M', '20B', '1.3T'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _draw_training(axes: "Axes", steps: Sequence[Record]) -> None:
    tokens = [step["tokens_seen"] for step in steps]
    values = [float(step["loss_nats_per_token"]) for step in steps]
    span = max(1, round(_SMOOTHED_SHARE * len(values)))
    axes.plot(tokens, values, color=_TRAIN, alpha=0.25, linewidth=0.8)
    label = "training" if span == 1 else f"training, mean of {span} steps"
    axes.plot(tokens, smooth(values, span), color=_TRAIN, linewidth=1.8, label=label)


def _draw_heldout(axes: "Axes", evals: Sequence[Record]) -> None:
    sources = sorted({record["source"] for record in evals})
    for index, source in enumerate(sources):
        records = [record for record in evals if record["source"] == source]
        axes.plot(
            [record["tokens_seen"] for record in records],
            [float(record["loss_nats_per_token"]) for record in records],
            color=_SOURCES[index % len(_SOURCES)],
            linewidth=1.2,
            marker="o",
            markersize=3.5,
            label=f"held-out {source}",
        )


def _draw_load(axes: "Axes", steps: Sequence[Record]) -> None:
    measured = [step for step in steps if step["expert_load_max_over_mean"]]
    tokens = [step["tokens_seen"] for step in measured]
    loads = [step["expert_load_max_over_mean"] for step in measured]
    span = max(1, round(_SMOOTHED_SHARE * len(measured)))
    for name, values, width in (
        ("worst layer", [max(load) for load in loads], 0.9),
        ("mean of layers", [sum(load) / len(load) for load in loads], 1.6),
    ):
        axes.plot(tokens, smooth(values, span), color=_SOFT, linewidth=width, label=name)
    if measured:
        highest = max(1.1, *(max(load) for load in loads))
        axes.set_ylim(1, 1 + 1.4 * (highest - 1))  # room for the legend
        axes.legend(
            fontsize=8,
            loc="upper right",
            ncols=2,
            facecolor="white",
            edgecolor="none",
            framealpha=0.9,
        )


def _draw_stages(axes: "Axes", run: RunRecords) -> None:
    for segment in run.plan.segments[1:]:
        if segment.tokens_start < run.tokens_seen:
            axes.axvline(segment.tokens_start, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))


def _name_stages(axes: "Axes", run: RunRecords) -> None:
    for segment in run.plan.segments:
        end = min(segment.tokens_start + segment.tokens, run.tokens_seen)
        if end > segment.tokens_start:
            axes.text(
                (segment.tokens_start + end) / 2,
                1.01,
                segment.stage.replace("_", " "),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                color=_SOFT,
                fontsize=9.5,
            )
