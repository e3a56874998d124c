"""What a person sees of a run: one live bar on a terminal, a line now and then elsewhere."""

import errno
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megamoe.plan.plan import Segment
from megamoe.step import EvalResult, SaveResult, StepResult

_LINES_PER_SEGMENT = 20
_SMOOTHING = 0.9  # of tokens per second, from step to step


class _Pace:
    """Tokens per second, smoothed over steps, and what is left of the segment."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.tokens = 0  # of the segment
        self.tokens_per_s = 0.0

    def update(self, result: StepResult) -> None:
        now = result.step_tokens / result.seconds
        self.tokens_per_s = (
            _SMOOTHING * self.tokens_per_s + (1 - _SMOOTHING) * now if self.tokens_per_s else now
        )
        self.tokens = result.tokens_seen - self.segment.tokens_start

    @property
    def eta(self) -> str:
        return duration((self.segment.tokens - self.tokens) / self.tokens_per_s)


class LineConsole:
    """Plain lines: the first step, the last, and about twenty between them.

    Args:
        stream: where to write.
        segment: what runs now.
    """

    def __init__(self, stream: TextIO, segment: Segment) -> None:
        """Say what begins."""
        self._stream = stream
        self._pace = _Pace(segment)
        self._every = max(1, segment.num_steps // _LINES_PER_SEGMENT)
        self._has_written = False
        self._write(segment_line(segment))

    def record_step(self, result: StepResult) -> None:
        """Write a line when one is due."""
        self._pace.update(result)
        segment = self._pace.segment
        step = result.step - segment.steps_start
        if self._has_written and step % self._every and step != segment.num_steps:
            return
        self._has_written = True
        self._write(
            f"{result.stage}  step {step:,}/{segment.num_steps:,}  "
            f"tokens {self._pace.tokens:,}/{segment.tokens:,}  {losses(result)}  "
            f"lr {result.lr:.2e}  grad {result.grad_norm:.2f}  "
            f"{self._pace.tokens_per_s:,.0f} tokens/s  eta {self._pace.eta}"
        )

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Write a line."""
        self._write(eval_line(results, self._pace.segment))

    def record_save(self, result: SaveResult) -> None:
        """Write a line."""
        self._write(save_line(result, self._pace.segment))

    def say(self, line: str) -> None:
        """Write a line that is of no step."""
        self._write(line)

    def close(self) -> None:
        """Nothing is open."""

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError as error:
            # Into a file on a full disk: no reason to end a run, and metrics.jsonl has it all.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


class BarConsole:
    """One live bar; evaluations stay above it.

    Args:
        stream: a terminal.
        segment: what runs now.
    """

    def __init__(self, stream: TextIO, segment: Segment) -> None:
        """Draw the empty bar."""
        self._pace = _Pace(segment)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[state]}"),
            console=Console(file=stream),
            auto_refresh=False,
            expand=True,
        )
        self._progress.console.print(segment_line(segment), highlight=False)
        self._task = self._progress.add_task(segment.stage, total=segment.tokens, state="")
        self._progress.start()

    def record_step(self, result: StepResult) -> None:
        """Move the bar."""
        self._pace.update(result)
        state = f"{losses(result)}  {self._pace.tokens_per_s:,.0f} tokens/s  eta {self._pace.eta}"
        self._progress.update(self._task, completed=self._pace.tokens, state=state)
        self._progress.refresh()

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Print above the bar."""
        self._progress.console.print(eval_line(results, self._pace.segment), highlight=False)

    def record_save(self, result: SaveResult) -> None:
        """Print above the bar."""
        self._progress.console.print(save_line(result, self._pace.segment), highlight=False)

    def say(self, line: str) -> None:
        """Print a line above the bar that is of no step."""
        self._progress.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def open_console(stream: TextIO, segment: Segment) -> LineConsole | BarConsole:
    """Return the console that suits the stream."""
    return BarConsole(stream, segment) if stream.isatty() else LineConsole(stream, segment)


def segment_line(segment: Segment) -> str:
    """Return what a segment is about to do, in one line."""
    return (
        f"{segment.stage}: {segment.tokens:,} tokens in {segment.num_steps:,} steps, "
        f"sequences of {segment.seq_len:,}, on {segment.world_size} ranks"
    )


def eval_line(results: Sequence[EvalResult], segment: Segment) -> str:
    """Return the held-out losses of one evaluation as a line."""
    step = results[0].step - segment.steps_start
    measured = "  ".join(f"{result.source} {result.loss:.4f}" for result in results)
    return f"{segment.stage}  step {step:,}/{segment.num_steps:,}  held-out loss: {measured}"


def save_line(result: SaveResult, segment: Segment) -> str:
    """Return how a checkpoint was written, or why not, as a line."""
    step = result.step - segment.steps_start
    where = f"{segment.stage}  step {step:,}/{segment.num_steps:,}"
    if result.error is not None:
        return f"{where}  no checkpoint: {result.error}"
    size = f"{result.num_bytes / 1e6:,.1f} MB"
    return (
        f"{where}  checkpoint: {size} in {result.seconds:.2f} s, stall {result.stall_seconds:.2f} s"
    )


def losses(result: StepResult) -> str:
    """Return the losses of a step: 'loss 2.3456  mtp 3.4567'."""
    mtp = "" if result.mtp_loss is None else f"  mtp {result.mtp_loss:.4f}"
    return f"loss {result.loss:.4f}{mtp}"


def duration(seconds: float) -> str:
    """Return a time as people say it: '42 s', '3 min 05 s', '2 h 10 min', '3 d 4 h'."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3_600, whole // 86_400
    if whole < 60:
        return f"{whole} s"
    if hours == 0:
        return f"{minutes} min {whole % 60:02} s"
    if days == 0:
        return f"{hours} h {minutes % 60:02} min"
    return f"{days} d {hours % 24} h"
