"""What a benchmark writes: the machine, the versions, and each case as soon as it is measured."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "numpy", "transformers")


class Record:
    """A result that is whole on disk after every case, or only shown where there is no file."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        """Begin a result with what was known before the first case."""
        self.path = path
        self.result = {**head, "cases": {}}

    def add(self, name: str, value: Any) -> None:
        """Keep a case and write the file anew, in one move."""
        self.result["cases"][name] = value
        self.save()

    def tokens_per_s(self, name: str) -> float | None:
        """Return the speed of a case; None where it failed, was skipped or is not there."""
        speed: float | None = self.result["cases"].get(name, {}).get("tokens_per_s")
        return speed

    def give_up(self, what: dict[str, Any], keep: tuple[str, ...]) -> None:
        """Set the cases aside, but for some: memory ran out, and they are tried with less."""
        cases = self.result["cases"]
        aside = {name: value for name, value in cases.items() if name not in keep}
        self.result.setdefault("out_of_memory", []).append({**what, "cases": aside})
        self.result["cases"] = {name: value for name, value in cases.items() if name in keep}
        self.save()

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def say(text: str) -> None:
    """Show a line of progress at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return machine, versions, commit and command."""
    machine: dict[str, Any] = {
        "device": device.type,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": (_output("git", "-C", str(ROOT), "status", "--short") or "").splitlines(),
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return machine


def result_path(device: torch.device) -> Path | None:
    """Return where a result belongs that names no file: none for one of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace("nvidia", "").strip()
    date = datetime.now(UTC).date().isoformat()
    return ROOT / "benchmarks" / "results" / f"{name.replace(' ', '-')}-{date}.json"


def _versions() -> dict[str, str | None]:
    import megatron.core

    found: dict[str, str | None] = {"megatron-core": megatron.core.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = str(torch.__version__)  # tells what it was built for; its metadata do not
    return found


def _output(*command: str) -> str | None:
    """Return what a command writes, or None where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
