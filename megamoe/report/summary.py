"""What the records of a run come to: the tables and figures of its report."""

import statistics
from collections.abc import Sequence

from megamoe.plan.flops import train_flops_per_token
from megamoe.plan.layout import layout_text
from megamoe.plan.params import count_params
from megamoe.plan.plan import Segment
from megamoe.recipe.stage import LearningRate
from megamoe.report.page import Table
from megamoe.report.read import Record, RunRecords

LAST_STEPS = 20  # that the loss of a stage is a mean of
_MAX_EVALS = 12  # shown of each stage


def status(run: RunRecords) -> str:
    """Return how far the run is, in words."""
    share = run.tokens_seen / run.tokens_planned
    if share >= 1:
        return "finished"
    last = next((e for e in reversed(run.events) if e["event"] not in ("created", "launched")), {})
    ends = {"interrupted": ", interrupted", "segment_failed": ", failed (see what happened)"}
    return f"{share:.1%} of its tokens seen" + ends.get(last.get("event", ""), "")


def figures(run: RunRecords) -> tuple[tuple[str, str], ...]:
    """Return the figures that stand at the top: (value, what it is)."""
    params = count_params(run.plan.model)
    made = [
        (f"{run.tokens_seen:,}", f"tokens seen of {run.tokens_planned:,}"),
        (f"{params.total:,}", f"parameters, {params.active:,} active for a token"),
    ]
    if run.steps:
        rate = f"{_tokens_per_s(run.steps):,.0f}"
        made.append((f"{mean_loss(run.steps):.4f}", "training loss at the end, nats per token"))
        made.append((rate, f"tokens/s on {run.plan.cluster.world_size} ranks"))
    if (mfu := _mfu(run)) is not None:
        made.append((f"{mfu:.1%}", "of dense bf16 peak (MFU)"))
    return tuple(made)


def segment_table(run: RunRecords) -> Table:
    """Return a row for each segment as planned."""
    rows = []
    for segment in run.plan.segments:
        asked = "-" if run.tokens_asked is None else f"{run.tokens_asked[segment.index]:,}"
        sizes = [size for _, size in segment.batch_ramp]
        batches = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        rows.append(
            (
                segment.stage,
                asked,
                f"{segment.tokens:,}",
                f"{segment.num_steps:,}",
                f"{segment.seq_len:,}",
                batches,
                layout_text(segment),
                type(segment.precision).__name__,
                _rates(segment.lr),
            )
        )
    header = ("stage", "tokens asked", "settled", "steps", "seq len", "sequences")
    return Table(header=(*header, "layout", "precision", "learning rate"), rows=tuple(rows))


def loss_table(run: RunRecords) -> Table:
    """Return a row for each segment that has begun: tokens and losses as measured."""
    rows = []
    for segment, steps in _by_segment(run):
        last = steps[-LAST_STEPS:]
        mtp = [float(s["mtp_loss_nats_per_token"]) for s in last if "mtp_loss_nats_per_token" in s]
        rows.append(
            (
                segment.stage,
                f"{len(steps):,} of {segment.num_steps:,}",
                f"{sum(step['step_tokens'] for step in steps):,}",
                f"{sum(step['loss_tokens'] for step in steps):,}",
                f"{float(steps[0]['loss_nats_per_token']):.4f}",
                f"{mean_loss(steps):.4f}",
                f"{statistics.fmean(mtp):.4f}" if mtp else "-",
            )
        )
    header = ("stage", "steps", "tokens seen", "loss tokens", "first loss", "last loss", "last MTP")
    return Table(header=header, rows=tuple(rows))


def speed_table(run: RunRecords) -> Table:
    """Return a row for each segment that has begun: speed, memory and balance as measured."""
    rows = []
    for segment, steps in _by_segment(run):
        last = steps[-LAST_STEPS:]
        loads = [
            max(s["expert_load_max_over_mean"]) for s in last if s["expert_load_max_over_mean"]
        ]
        seconds = [step["step_seconds"] for step in steps]
        rows.append(
            (
                segment.stage,
                f"{_tokens_per_s(steps):,.0f}",
                f"{statistics.median(seconds):.3g} s",
                f"{sum(seconds):,.0f} s",
                size_text(max(step["memory_bytes"] for step in steps)),
                f"{statistics.fmean(loads):.2f}" if loads else "-",
            )
        )
    header = ("stage", "tokens/s", "median step", "all steps", "peak memory, rank 0")
    return Table(header=(*header, "busiest expert / mean"), rows=tuple(rows))


def heldout_table(run: RunRecords) -> Table:
    """Return a row for each evaluation (a selection of many), a column for each source."""
    sources = sorted({record["source"] for record in run.evals})
    losses: dict[tuple[str, int, int], dict[str, float]] = {}
    for record in run.evals:
        key = (record["stage"], record["step"], record["tokens_seen"])
        losses.setdefault(key, {})[record["source"]] = float(record["loss_nats_per_token"])
    chosen: list[tuple[str, int, int]] = []
    for segment in run.plan.segments:
        chosen += _spread([key for key in losses if key[0] == segment.stage])
    rows = [
        (
            f"{stage}, step {step:,}",
            f"{tokens:,}",
            *(f"{losses[stage, step, tokens][s]:.4f}" for s in sources),
        )
        for stage, step, tokens in chosen
    ]
    return Table(header=("evaluation", "tokens seen", *sources), rows=tuple(rows))


def ledger_table(run: RunRecords) -> Table:
    """Return the tokens drawn from each source, counted, up to the latest checkpoint."""
    latest = next((checkpoint for checkpoint in run.checkpoints if checkpoint.is_latest), None)
    drawn = {(stage, source): n for stage, source, n in latest.ledger} if latest else {}
    rows = []
    for segment in run.plan.segments:
        for source in segment.sources:
            tokens = drawn.get((segment.stage, source.name), 0)
            rows.append(
                (
                    f"{segment.stage}: {source.name}",
                    f"{source.weight:.2%}",
                    f"{tokens:,}",
                    f"{source.shard.tokens:,}",
                    f"{tokens / source.shard.tokens:.2f}",
                )
            )
    header = ("stage: source", "weight", "tokens drawn", "tokens there are", "epochs")
    return Table(header=header, rows=tuple(rows))


def checkpoint_table(run: RunRecords) -> Table:
    """Return a row for each checkpoint on disk."""
    rows = tuple(
        (
            checkpoint.name + (" (latest)" if checkpoint.is_latest else ""),
            f"{checkpoint.step:,}",
            f"{checkpoint.tokens_seen:,}",
            size_text(checkpoint.size_bytes),
        )
        for checkpoint in run.checkpoints
    )
    return Table(header=("checkpoint", "step", "tokens seen", "size"), rows=rows)


def save_table(run: RunRecords) -> Table:
    """Return a row for each stage: what writing its checkpoints cost."""
    rows = []
    for segment, steps in _by_segment(run):
        saves = [save for save in run.saves if save["segment"] == segment.index]
        written = [save for save in saves if "error" not in save]
        if not saves:
            continue
        stalls = [save["stall_seconds"] for save in saves]
        share = sum(stalls) / sum(step["step_seconds"] for step in steps)
        seconds = statistics.median(save["save_seconds"] for save in written) if written else None
        rows.append(
            (
                segment.stage,
                f"{len(written)}",
                f"{len(saves) - len(written)}",
                "-" if seconds is None else f"{seconds:.3g} s",
                f"{statistics.median(stalls):.3g} s",
                f"{max(stalls):.3g} s",
                f"{share:.2%}",
            )
        )
    header = ("stage", "written", "failed", "median time to write", "median stall", "longest stall")
    return Table(header=(*header, "stalls / time in steps"), rows=tuple(rows))


def event_table(run: RunRecords) -> Table:
    """Return a row for each thing that happened."""
    rows = tuple(
        (
            event["time"][:19].replace("T", " "),
            event["event"].replace("_", " "),
            str(event.get("segment", "")),
            str(event.get("error", ""))[:160],
        )
        for event in run.events
    )
    return Table(header=("time (UTC)", "event", "segment", "error"), rows=rows)


def mean_loss(steps: Sequence[Record]) -> float:
    """Return the mean training loss of the last steps."""
    return statistics.fmean(float(step["loss_nats_per_token"]) for step in steps[-LAST_STEPS:])


def size_text(size_bytes: float) -> str:
    """Return a size in binary units: '12.3 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _rates(lr: LearningRate) -> str:
    return f"{lr.peak:g}" if lr.final is None else f"{lr.peak:g} to {lr.final:g}"


def _by_segment(run: RunRecords) -> list[tuple[Segment, list[Record]]]:
    """Return the steps of each segment that has begun."""
    steps: dict[int, list[Record]] = {}
    for step in run.steps:
        steps.setdefault(step["segment"], []).append(step)
    return [(run.plan.segments[index], found) for index, found in sorted(steps.items())]


def _tokens_per_s(steps: Sequence[Record]) -> float:
    """Return tokens over time in steps: time between steps (saving, evaluating) is not in it."""
    return float(sum(s["step_tokens"] for s in steps) / sum(s["step_seconds"] for s in steps))


def _mfu(run: RunRecords) -> float | None:
    peak = run.plan.cluster.peak_flops_per_s
    if peak is None or not run.steps:
        return None
    flops = sum(
        train_flops_per_token(run.plan, segment) * step["step_tokens"]
        for segment, steps in _by_segment(run)
        for step in steps
    )
    seconds = sum(step["step_seconds"] for step in run.steps)
    return float(flops / (seconds * peak * run.plan.cluster.world_size))


def _spread(keys: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Return at most so many keys, evenly spread, the last one included."""
    count = min(_MAX_EVALS, len(keys))
    return [keys[len(keys) * (index + 1) // count - 1] for index in range(count)]
