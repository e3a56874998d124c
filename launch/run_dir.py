"""A run folder: the plan, where and how it ran, what happened, logs and checkpoints.

plan.json         every number of the run; never changes
environment.json  versions, machine and command of the first launch
events.jsonl      one line for each thing that happened; only ever appended to
logs/             what each rank wrote
checkpoints/      <tokens seen>/, and `latest`, which names one of them
metrics.jsonl     one line for each step and evaluation (written by rank 0)
"""

import json
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import megamoe
from megamoe.commit import running_commit
from megamoe.errors import LaunchError
from megamoe.plan.json import differences, digest, read_plan, write_plan, write_text_atomically
from megamoe.plan.lines import LinesFile, append_line
from megamoe.plan.plan import Plan

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "triton",
    "flash-attn",
    "deep-ep",
)
_MAX_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDir:
    """A run folder on disk and the plan it holds."""

    path: Path
    plan: Plan
    plan_digest: str

    @property
    def logs(self) -> Path:
        """Folder of what each rank wrote."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"


def open_run_dir(path: Path) -> RunDir:
    """Open an existing run folder.

    Raises:
        PlanError: it holds no readable plan.
    """
    plan = read_plan(path / "plan.json")
    return RunDir(path=path, plan=plan, plan_digest=digest(plan))


def settle_run_dir(path: Path, plan: Plan, facts: Mapping[str, object]) -> RunDir:
    """Make a run folder for a plan, or open the one that already holds it. Call it under the lock.

    Args:
        path: the folder.
        plan: what will run.
        facts: kept in the first event, beside the plan.

    Raises:
        LaunchError: the folder holds another plan; says what differs.
    """
    for folder in (path, path / "logs", path / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
    if not (path / "environment.json").exists():
        text = json.dumps(_environment(sys.argv), indent=2, ensure_ascii=False) + "\n"
        write_text_atomically(path / "environment.json", text)
        record_event(path, "created", facts)
    if not (path / "plan.json").exists():
        write_plan(path / "plan.json", plan)
    run_dir = open_run_dir(path)
    if run_dir.plan_digest != digest(plan):
        changes = differences(run_dir.plan, plan)
        shown = "; ".join(changes[:_MAX_SHOWN])
        more = f"; and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else ""
        raise LaunchError(
            f"{path}: holds another plan ({shown}{more}); give another --run-dir, or continue the "
            f"one it holds with `megamoe run {path}`"
        )
    return run_dir


def record_event(path: Path, event: str, facts: Mapping[str, object]) -> None:
    """Append an event, with the time, to the run's events.jsonl; it is on disk on return.

    Raises:
        OSError: it cannot be written.
    """
    append_line(path / "events.jsonl", _event(event, facts))


class Events:
    """The events of a run under way: where the disk is full they wait, and the run goes on.

    Args:
        path: the run folder.
        say: is told, a line at a time, what could not be written.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Open events.jsonl."""
        self._lines = LinesFile(path / "events.jsonl", say, durable=True)

    def record(self, event: str, facts: Mapping[str, object]) -> None:
        """Append an event, with the time; it is on disk on return if there is room."""
        self._lines.append(_event(event, facts))

    def close(self) -> None:
        """Tell what could not be written."""
        self._lines.close()


def _event(event: str, facts: Mapping[str, object]) -> dict[str, object]:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": time, "event": event, **facts}


def _environment(command: Sequence[str]) -> dict[str, object]:
    """Describe this machine and its software. No environment variables: they hold secrets."""
    return {
        "megamoe": megamoe.__version__,
        "commit": running_commit(),
        "command": list(command),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
