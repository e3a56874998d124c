"""The loop, and nothing else."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from megamoe.step import EvalResult, SaveResult, StepResult


class Engine(Protocol):
    """A model with its optimizer and data: megamoe.mcore provides one, tests provide a fake."""

    @property
    def is_done(self) -> bool:
        """Whether the segment's tokens are spent."""
        ...

    def train_step(self) -> StepResult:
        """Forward, backward and optimizer step on the next global batch."""
        ...

    def evaluate(self) -> list[EvalResult]:
        """Loss on held-out text, source by source."""
        ...

    def save(self, *, wait: bool) -> object:
        """Begin to write a checkpoint that a later process continues from, or write all of it."""
        ...

    def ended_saves(self) -> list[SaveResult]:
        """Return the saves that have ended since the last call, failed ones too."""
        ...

    def close(self) -> None:
        """Let a save that is being written be finished."""
        ...


class Hook(Protocol):
    """Something done after a step, on every rank, in the order of the list."""

    def after_step(self, result: StepResult, engine: Engine) -> None:
        """Record, evaluate, save, show."""
        ...


def training_steps(engine: Engine) -> Iterator[StepResult]:
    """Yield optimizer steps until the segment's tokens are spent."""
    while not engine.is_done:
        yield engine.train_step()


def train(engine: Engine, hooks: Sequence[Hook]) -> None:
    """Run one segment of the curriculum to its end."""
    for result in training_steps(engine):
        for hook in hooks:
            hook.after_step(result, engine)
