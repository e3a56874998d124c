"""What is done after each step: record, evaluate, save. Rank 0 records; all ranks do the rest."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from megamoe.checkpoints.refused import one_line
from megamoe.errors import TrainingError
from megamoe.plan.json import to_json
from megamoe.plan.plan import Plan, Segment
from megamoe.plan.schedule import position_at_step
from megamoe.step import EvalResult, SaveResult, StepResult
from megamoe.train.console import open_console
from megamoe.train.loop import Engine, Hook
from megamoe.train.metrics import MetricsFile, Record, step_record

_FIRST_EVALUATION = 10  # steps of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Where rank 0 records beside metrics.jsonl and the console."""

    tensorboard: bool
    wandb: Literal["online", "offline"] | None


class Recorder(Protocol):
    """A place that measurements go to."""

    def record_step(self, result: StepResult) -> None:
        """Keep what a step measured."""
        ...

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Keep the held-out losses of one evaluation, one a source."""
        ...

    def record_save(self, result: SaveResult) -> None:
        """Keep how a checkpoint was written, or why it was not."""
        ...

    def close(self) -> None:
        """Keep nothing open."""
        ...


def add_recording_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `Recording` to `megamoe train`."""
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files")
    parser.add_argument("--wandb", choices=("online", "offline"), help="log to Weights & Biases")


def recording_from_args(args: argparse.Namespace) -> Recording:
    """Return what `add_recording_arguments` was given."""
    return Recording(tensorboard=args.tensorboard, wandb=args.wandb)


@contextmanager
def open_recorders(
    run_dir: Path, plan: Plan, segment: Segment, steps_done: int, recording: Recording
) -> Iterator[list[Recorder]]:
    """Open everything rank 0 records to; closes it at the end, also after an error.

    Args:
        run_dir: the run folder.
        plan: the run's plan.
        segment: what runs now.
        steps_done: steps of the run before the first one now.
        recording: what to open beside metrics.jsonl and the console.

    Raises:
        MegamoeError: a library that was asked for is not installed, or a file cannot be written.
    """
    with ExitStack() as stack:
        console = stack.enter_context(closing(open_console(sys.stdout, segment)))
        with one_line(run_dir, f"mend that, then `megamoe run {run_dir}`"):
            metrics = MetricsFile(run_dir, plan, segment, steps_done, console.say)
            recorders: list[Recorder] = [stack.enter_context(closing(metrics))]
            if recording.tensorboard:
                board = TensorBoard(run_dir, plan, segment, steps_done, console.say)
                recorders.append(stack.enter_context(closing(board)))
            if recording.wandb is not None:
                run = WeightsAndBiases(run_dir, plan, segment, recording.wandb)
                recorders.append(stack.enter_context(closing(run)))
        yield [*recorders, console]


def make_hooks(segment: Segment, recorders: Sequence[Recorder]) -> list[Hook]:
    """Return the hooks of a segment, in order. Ranks other than 0 give no recorders."""
    return [RecordSteps(recorders), Evaluate(segment, recorders), Save(segment, recorders)]


class RecordSteps:
    """Hands each step to every recorder."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        """Keep the recorders."""
        self._recorders = recorders

    def after_step(self, result: StepResult, engine: Engine) -> None:  # noqa: ARG002  (Hook)
        """Record."""
        for recorder in self._recorders:
            recorder.record_step(result)


class Evaluate:
    """Measures held-out loss after ten steps, every `eval_every` and at the end of the segment.

    The first measure is what later ones are compared with.
    """

    def __init__(self, segment: Segment, recorders: Sequence[Recorder]) -> None:
        """Keep what is due when."""
        self._segment, self._recorders = segment, recorders

    def after_step(self, result: StepResult, engine: Engine) -> None:
        """Evaluate when due, on every rank; record."""
        first = result.step == _FIRST_EVALUATION
        if first or is_due(self._segment, self._segment.eval_every, result.step):
            measured = engine.evaluate()
            for recorder in self._recorders if measured else ():
                recorder.record_evals(measured)


class Save:
    """Saves every `checkpoint_every` steps, and at the end of the segment, where it waits.

    Training goes on while a checkpoint is written, and when it cannot be: the ones before stay.
    """

    def __init__(self, segment: Segment, recorders: Sequence[Recorder]) -> None:
        """Keep what is due when."""
        self._segment, self._recorders = segment, recorders

    def after_step(self, result: StepResult, engine: Engine) -> None:
        """Save when due, on every rank; record what has ended.

        Raises:
            CheckpointError: the last checkpoint of the segment could not be written.
        """
        try:
            if is_due(self._segment, self._segment.checkpoint_every, result.step):
                engine.save(wait=engine.is_done)
        finally:
            _record_saves(engine, self._recorders)


@contextmanager
def recording_the_last_save(engine: Engine, recorders: Sequence[Recorder]) -> Iterator[None]:
    """Have a save that is being written at the end finished and recorded, also after an error."""
    try:
        yield
    finally:
        engine.close()
        _record_saves(engine, recorders)


def _record_saves(engine: Engine, recorders: Sequence[Recorder]) -> None:
    for saved in engine.ended_saves():
        for recorder in recorders:
            recorder.record_save(saved)


def is_due(segment: Segment, every: int, step: int) -> bool:
    """Tell whether a step of the run is one of every so many of its segment, or the last."""
    inside = step - segment.steps_start
    return inside % every == 0 or inside == segment.num_steps


class TensorBoard:
    """Writes RUN/tensorboard; the horizontal axis is tokens seen.

    Where that cannot be written, as on a full disk, it ends and says so; training goes on.

    Args:
        run_dir: the run folder.
        plan: the run's plan.
        segment: what runs now.
        steps_done: steps of the run before the first one now.
        say: is told, in a line, what could not be written.

    Raises:
        TrainingError: the library is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        segment: Segment,
        steps_done: int,
        say: Callable[[str], None],
    ) -> None:
        """Open the files; what a continued run will do again is marked as void."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(_missing("--tensorboard", "tensorboard")) from error
        self._plan, self._segment = plan, segment
        in_segment = steps_done - segment.steps_start
        tokens = segment.tokens_start + position_at_step(
            segment.batch_ramp, segment.seq_len, in_segment
        )
        self._folder, self._say = run_dir / "tensorboard", say
        self._writer: Any = SummaryWriter(str(self._folder), purge_step=tokens + 1)

    def record_step(self, result: StepResult) -> None:
        """Write every number of the step."""
        for tag, value in scalars(step_record(result, self._plan, self._segment)):
            self._add(f"train/{tag}", value, result.tokens_seen)

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Write held-out losses."""
        for result in results:
            tag = f"heldout_loss_nats_per_token/{result.source}"
            self._add(tag, result.loss, result.tokens_seen)

    def record_save(self, result: SaveResult) -> None:
        """Write how long training stood still."""
        self._add("save/stall_seconds", result.stall_seconds, result.tokens_seen)

    def close(self) -> None:
        """Write what is left."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._end(error)

    def _add(self, tag: str, value: float, tokens_seen: int) -> None:
        try:
            if self._writer is not None:
                self._writer.add_scalar(tag, value, tokens_seen)
        except OSError as error:  # of its thread, which has ended: it writes nothing any more
            self._end(error)

    def _end(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        with suppress(OSError):
            writer.close()
        self._say(
            f"{self._folder}: {error.strerror or error}; nothing more of this segment is written "
            "there; metrics.jsonl has all of it"
        )


class WeightsAndBiases:
    """Logs to Weights & Biases; offline needs neither account nor network.

    Args:
        run_dir: the run folder; files go to RUN/wandb.
        plan: the run's plan, kept as the configuration.
        segment: what runs now.
        mode: 'online' or 'offline'.

    Raises:
        TrainingError: the library is not installed.
    """

    def __init__(
        self, run_dir: Path, plan: Plan, segment: Segment, mode: Literal["online", "offline"]
    ) -> None:
        """Begin the run, or go on with it: its id is that of the folder."""
        try:
            import wandb
        except ImportError as error:
            raise TrainingError(_missing("--wandb", "wandb")) from error
        self._plan, self._segment = plan, segment
        self._run: Any = wandb.init(
            project="megamoe",
            name=run_dir.resolve().name,
            id=sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            config=to_json(plan),
            settings=wandb.Settings(silent=True, console="off"),  # the console is ours
        )
        self._run.define_metric("*", step_metric="tokens_seen")

    def record_step(self, result: StepResult) -> None:
        """Log every number of the step."""
        record = step_record(result, self._plan, self._segment)
        numbers = {f"train/{tag}": value for tag, value in scalars(record)}
        self._run.log(numbers | {"tokens_seen": result.tokens_seen})

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Log held-out losses."""
        losses = {f"heldout_loss_nats_per_token/{item.source}": item.loss for item in results}
        self._run.log(losses | {"tokens_seen": results[0].tokens_seen})

    def record_save(self, result: SaveResult) -> None:
        """Log how long training stood still."""
        stall = {"save/stall_seconds": result.stall_seconds}
        self._run.log(stall | {"tokens_seen": result.tokens_seen})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record; a list gives its largest."""
    for name, value in record.items():
        if isinstance(value, list):
            if value:
                yield name, max(value)
        elif isinstance(value, (int, float)) and name not in ("step", "segment", "tokens_seen"):
            yield name, value


def _missing(flag: str, package: str) -> str:
    return (
        f"{flag}: the package {package!r} is not installed; `pip install {package}`, or leave "
        f"{flag} out"
    )
