"""metrics.jsonl: one flat record for each step, evaluation and save, units in the names."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megamoe.plan.flops import train_flops_per_token
from megamoe.plan.json import write_text_atomically
from megamoe.plan.lines import LinesFile
from megamoe.plan.plan import Plan, Segment
from megamoe.step import EvalResult, SaveResult, StepResult

Record = dict[str, Any]

# Name and unit of every field; `aux_loss.<name>` stands for each auxiliary loss there is.
UNITS = {
    "kind": "'step', 'eval' or 'save'",
    "stage": "name",
    "segment": "index, from 0",
    "step": "optimizer steps of the run, this one included",
    "tokens_seen": "input tokens of the run, this step included",
    "step_tokens": "input tokens of the step",
    "loss_tokens": "tokens of the step that the loss counts",
    "loss_nats_per_token": "nats per token; of held-out text where kind is 'eval'",
    "mtp_loss_nats_per_token": "nats per token, unweighted; absent without multi-token prediction",
    "aux_loss.<name>": "coefficient times loss, mean over layers",
    "cp_bytes.<kind>.forward": "bytes received from ranks that share a sequence, for layers of a kind "
    "(local, global) or for tokens, of the rank that received most; absent with cp 1",
    "cp_bytes.<kind>.backward": "the same, in the backward pass",
    "grad_norm": "global L2 norm before clipping",
    "lr": "learning rate of the step",
    "step_sequences": "sequences of the step, over all ranks",
    "step_seconds": "wall seconds of the step on rank 0",
    "tokens_per_s": "input tokens of the step per wall second, over all ranks",
    "tflops_per_s_per_gpu": "1e12 model FLOP/s of one GPU, no recomputation; absent without GPUs",
    "mfu": "share of the GPU's dense bf16 peak; absent where no peak is known",
    "expert_load_max_over_mean": "per MoE layer: tokens of the busiest expert / mean over experts",
    "memory_bytes": "peak bytes of rank 0: of the device, or resident without one",
    "source": "name of the held-out text",
    "eval_tokens": "tokens the held-out loss was measured on",
    "stall_seconds": "wall seconds that training stood still for a checkpoint",
    "save_seconds": "wall seconds from the beginning of a save until it was the latest checkpoint",
    "checkpoint_bytes": "bytes of a checkpoint, of all ranks",
    "error": "why there is no checkpoint; absent where there is one",
}


def step_record(result: StepResult, plan: Plan, segment: Segment) -> Record:
    """Return the record of a step. What was not measured is absent, not 0."""
    tokens_per_s = result.step_tokens / result.seconds
    record: Record = {
        "kind": "step",
        "stage": result.stage,
        "segment": result.segment,
        "step": result.step,
        "tokens_seen": result.tokens_seen,
        "step_tokens": result.step_tokens,
        "loss_tokens": result.loss_tokens,
        "loss_nats_per_token": _number(result.loss),
        "grad_norm": _number(result.grad_norm),
        "lr": result.lr,
        "step_sequences": result.sequences,
        "step_seconds": result.seconds,
        "tokens_per_s": tokens_per_s,
        "expert_load_max_over_mean": list(result.expert_load),
        "memory_bytes": result.memory_bytes,
    }
    if result.mtp_loss is not None:
        record["mtp_loss_nats_per_token"] = _number(result.mtp_loss)
    record |= {f"aux_loss.{name}": _number(value) for name, value in result.aux_losses}
    for kind, forward, backward in result.cp_bytes:
        record[f"cp_bytes.{kind}.forward"] = forward
        record[f"cp_bytes.{kind}.backward"] = backward
    if plan.cluster.device == "cuda":
        flops_per_s = tokens_per_s * train_flops_per_token(plan, segment) / segment.world_size
        record["tflops_per_s_per_gpu"] = flops_per_s / 1e12
        if plan.cluster.peak_flops_per_s is not None:
            record["mfu"] = flops_per_s / plan.cluster.peak_flops_per_s
    return record


def eval_record(result: EvalResult) -> Record:
    """Return the record of the held-out loss of one source."""
    return {
        "kind": "eval",
        "stage": result.stage,
        "segment": result.segment,
        "step": result.step,
        "tokens_seen": result.tokens_seen,
        "source": result.source,
        "loss_nats_per_token": _number(result.loss),
        "eval_tokens": result.tokens,
    }


def save_record(result: SaveResult) -> Record:
    """Return the record of a checkpoint, written or not."""
    record: Record = {
        "kind": "save",
        "stage": result.stage,
        "segment": result.segment,
        "step": result.step,
        "tokens_seen": result.tokens_seen,
        "stall_seconds": result.stall_seconds,
        "save_seconds": result.seconds,
        "checkpoint_bytes": result.num_bytes,
    }
    return record if result.error is None else record | {"error": result.error}


class MetricsFile:
    """Appends records to RUN/metrics.jsonl, each on its way to disk when the call returns.

    Those of a while without room wait in memory; nothing is raised for them.

    Args:
        run_dir: the run folder.
        plan: the run's plan.
        segment: what runs now.
        steps_done: steps of the checkpoint that is continued. Later records are dropped first, so
            each step stands once.
        say: is told, a line at a time, what could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        segment: Segment,
        steps_done: int,
        say: Callable[[str], None],
    ) -> None:
        """Drop what will be done again and open the file."""
        self._plan, self._segment = plan, segment
        path = run_dir / "metrics.jsonl"
        drop_after(path, steps_done)
        units = json.dumps(UNITS, indent=2) + "\n"
        write_text_atomically(run_dir / "metrics.units.json", units)
        self._lines = LinesFile(path, say)

    def record_step(self, result: StepResult) -> None:
        """Append a step."""
        self._lines.append(step_record(result, self._plan, self._segment))

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Append an evaluation, a record a source."""
        for result in results:
            self._lines.append(eval_record(result))

    def record_save(self, result: SaveResult) -> None:
        """Append a save, as soon as it has ended: some steps after the one it is of."""
        self._lines.append(save_record(result))

    def close(self) -> None:
        """Make all of it durable, or tell what could not be written."""
        self._lines.close()


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                if line.endswith("\n"):
                    raise
                return
            yield record


def drop_after(path: Path, steps_done: int) -> None:
    """Keep the records of steps up to `steps_done`; the file is replaced only if that changes it."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if record["step"] <= steps_done]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    if text != path.read_text(encoding="utf-8"):
        write_text_atomically(path, text)


def _number(value: float) -> float | str:
    """Return a number as JSON has it; 'nan', 'inf' and '-inf' as words, which float() reads back."""
    return value if math.isfinite(value) else str(value)
