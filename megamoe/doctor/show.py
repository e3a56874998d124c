"""A diagnosis as text of 80 to 100 columns, or as JSON with the same content."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from megamoe.doctor.diagnosis import Diagnosis, Gpu, OptionalPackage, Package

_WIDTH = 96
_INDENT = 22


def as_json(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as JSON."""
    return json.dumps(asdict(diagnosis), indent=2, ensure_ascii=False) + "\n"


def as_text(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as plain text."""
    machine = diagnosis.machine
    lines = [
        *_entry("megamoe", f"{diagnosis.megamoe}, commit {diagnosis.commit or 'unknown'}"),
        *_entry("Python", diagnosis.python),
        *_entry("system", machine.system),
        *_entry("CPU cores", f"{machine.num_cpus:,}"),
        *_entry("memory", gigabytes(machine.memory_bytes) if machine.memory_bytes else "unknown"),
        *_entry("CUDA runtime", diagnosis.cuda_runtime or _no_runtime(diagnosis)),
        *_entry("NVIDIA driver", diagnosis.nvidia_driver or "none"),
        *_entry("NCCL", diagnosis.nccl or "none"),
        *_gpu_lines(diagnosis.gpus),
        "",
        "needed to train",
        *(line for part in diagnosis.required for line in _entry(part.name, _state(part))),
        *_entry(diagnosis.engine.name, _engine_state(diagnosis.engine)),
        *_entry(diagnosis.compiler.name, _state(diagnosis.compiler)),
        "",
        "can be done without",
        *(line for part in diagnosis.optional for line in _optional_lines(part)),
        "",
        *_verdict_lines(diagnosis),
    ]
    return "\n".join(lines) + "\n"


def gigabytes(count: int) -> str:
    """Return bytes as people say them: '8.2 GB'."""
    return f"{count / 1e9:,.1f} GB"


def _no_runtime(diagnosis: Diagnosis) -> str:
    is_here = any(part.name == "torch" and part.state == "present" for part in diagnosis.required)
    return "none: torch is a CPU build" if is_here else "none"


def _gpu_lines(gpus: tuple[Gpu, ...]) -> Iterator[str]:
    if not gpus:
        yield from _entry("GPUs", "none")
    for index, gpu in enumerate(gpus):
        problem = f"; does not compute: {gpu.problem}" if gpu.problem else ""
        memory = gigabytes(gpu.memory_bytes) if gpu.memory_bytes else "memory unknown"
        yield from _entry(
            f"GPU {index}",
            f"{gpu.name}, {memory}, compute capability {gpu.compute_capability}{problem}",
        )


def _optional_lines(package: OptionalPackage) -> Iterator[str]:
    state = _state(
        Package(
            name=package.name,
            state=package.state,
            version=package.version,
            cause=package.cause,
        )
    )
    yield from _entry(package.name, state)
    unused = "" if package.used_by_this_version else "not used by this version; "
    yield from _entry("", f"{unused}for: {package.use}")
    yield from _entry("", f"instead: {package.instead}")


def _state(package: Package) -> str:
    if package.state == "broken":
        return f"broken: {package.cause}"
    return (package.version or "version unknown") if package.state == "present" else "absent"


def _engine_state(engine: Package) -> str:
    if engine.state == "broken":
        return f"broken: {engine.cause}"
    return "can be imported" if engine.state == "present" else "not tried without the above"


def _verdict_lines(diagnosis: Diagnosis) -> Iterator[str]:
    for problem in diagnosis.problems:
        yield from _filled("problem: ", f"{problem.what}; remedy: {problem.remedy}")
    yield from _filled("verdict: ", diagnosis.verdict)


def _entry(name: str, text: str) -> list[str]:
    return _filled(f"  {name:<{_INDENT - 2}}", text, indent=_INDENT)


def _filled(start: str, text: str, *, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
