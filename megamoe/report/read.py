"""Reads a run folder: its plan, what was measured, what happened, what was saved."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoints.folder import all_checkpoints, latest, read_progress
from megamoe.errors import CheckpointError, MegamoeError
from megamoe.plan.json import read_plan
from megamoe.plan.plan import Plan

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk."""

    name: str
    step: int
    tokens_seen: int
    size_bytes: int
    is_latest: bool
    ledger: tuple[tuple[str, str, int], ...]  # (stage, source, tokens drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """Everything a report is made from."""

    path: Path
    plan: Plan
    tokens_asked: tuple[int, ...] | None  # of each segment, by the recipe; None where not recorded
    steps: tuple[Record, ...]
    evals: tuple[Record, ...]
    saves: tuple[Record, ...]
    events: tuple[Record, ...]
    environment: Record
    checkpoints: tuple[Checkpoint, ...]

    @property
    def tokens_seen(self) -> int:
        """Tokens of the last recorded step."""
        return int(self.steps[-1]["tokens_seen"]) if self.steps else 0

    @property
    def tokens_planned(self) -> int:
        """Tokens of all segments."""
        return sum(segment.tokens for segment in self.plan.segments)


def read_run(path: Path) -> RunRecords:
    """Read a run folder, finished or not.

    Raises:
        MegamoeError: it is no run folder, or a line of its records is damaged.
    """
    if not (path / "plan.json").is_file():
        raise MegamoeError(f"{path}: is no run folder (it has no plan.json); give one of runs/")
    records = list(_lines(path / "metrics.jsonl"))
    events = tuple(_lines(path / "events.jsonl"))
    asked = next((event["tokens_asked"] for event in events if "tokens_asked" in event), None)
    environment = path / "environment.json"
    return RunRecords(
        path=path,
        plan=read_plan(path / "plan.json"),
        tokens_asked=None if asked is None else tuple(asked),
        steps=tuple(record for record in records if record["kind"] == "step"),
        evals=tuple(record for record in records if record["kind"] == "eval"),
        saves=tuple(record for record in records if record["kind"] == "save"),
        events=events,
        environment=json.loads(environment.read_text()) if environment.exists() else {},
        checkpoints=tuple(_checkpoints(path / "checkpoints")),
    )


def _lines(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if line.endswith("\n"):
                    raise MegamoeError(f"{path}:{number}: not JSON ({error})") from error
                return  # the last line, cut short by a crash
            yield record


def _checkpoints(folder: Path) -> Iterator[Checkpoint]:
    # A report shows what it can read; `megamoe checkpoint verify` says what is damaged.
    newest = None
    with suppress(CheckpointError):
        newest = latest(folder)
    for path in all_checkpoints(folder):
        try:
            progress = read_progress(path)
        except CheckpointError:
            continue
        yield Checkpoint(
            name=path.name,
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            size_bytes=sum(file.stat().st_size for file in path.iterdir()),
            is_latest=path == newest,
            ledger=progress.ledger,
        )
