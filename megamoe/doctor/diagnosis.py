"""From what was found to a verdict: what this machine can do, what is wrong, what would help."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megamoe.doctor.component import (
    INSTALL,
    OPTIONAL,
    PYTHON_AT_LEAST,
    PYTHON_BELOW,
    REQUIREMENTS,
    Component,
    Requirement,
)
from megamoe.doctor.machine import Machine

Facts = dict[str, Any]
_UNTRIED = "this version of megamoe has not been tried on a GPU"
State = Literal["present", "absent", "broken"]
Ability = Literal["train_on_gpus", "train_on_cpu", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One package as it was found."""

    name: str
    state: State
    version: str | None
    cause: str | None  # of being broken, in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalPackage:
    """A package that can be done without, as it was found."""

    name: str
    state: State
    version: str | None
    cause: str | None
    use: str
    used_by_this_version: bool
    instead: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int | None  # None where the driver does not say
    compute_capability: str
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is wrong, and what would help."""

    what: str
    remedy: str
    forbids_training: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was looked at, before any judgement. Facts are those of megamoe/doctor/child.py."""

    megamoe: str
    commit: str | None
    python: str
    machine: Machine
    driver: str | None
    facts: Mapping[str, Facts]  # by name of the package or probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All that `megamoe doctor` says."""

    megamoe: str
    commit: str | None
    python: str
    machine: Machine
    cuda_runtime: str | None  # that torch was built with; None for a CPU build
    nvidia_driver: str | None
    nccl: str | None
    gpus: tuple[Gpu, ...]
    required: tuple[Package, ...]
    engine: Package
    compiler: Package
    optional: tuple[OptionalPackage, ...]
    can: Ability
    verdict: str
    problems: tuple[Problem, ...]


def diagnose(found: Found) -> Diagnosis:
    """Judge what was found."""
    facts = found.facts
    torch, smi = facts["torch-build"], facts["nvidia-smi"]
    gpus = _gpus(facts["gpus"].get("gpus") or smi.get("gpus", []))
    seen = len(facts["gpus"].get("gpus", []))
    required = tuple(_package(item.name, facts[item.name]) for item in REQUIREMENTS)
    optional = tuple(_optional(item, facts[item.name]) for item in OPTIONAL)
    engine = _package("megamoe's engine", facts["engine"])
    compiler = _package("C++ compiler", facts["compiler"])
    problems = (
        *_python_problems(found),
        *_required_problems(required),
        *_engine_problems(required, engine),
        *_gpu_problems(gpus, seen, torch, facts),
        *_compiler_problems(compiler),
        *(_optional_problem(item) for item in optional if item.state == "broken"),
    )
    usable = sum(gpu.problem is None for gpu in gpus) if seen else 0
    can = _ability(usable, engine, problems)
    return Diagnosis(
        megamoe=found.megamoe,
        commit=found.commit,
        python=found.python,
        machine=found.machine,
        cuda_runtime=torch.get("cuda"),
        nvidia_driver=found.driver or smi.get("driver"),
        nccl=torch.get("nccl"),
        gpus=gpus,
        required=required,
        engine=engine,
        compiler=compiler,
        optional=optional,
        can=can,
        verdict=_verdict(can, usable),
        problems=problems,
    )


def is_broken(diagnosis: Diagnosis) -> bool:
    """Tell whether training needs something that is here and does not work."""
    parts = (*diagnosis.required, diagnosis.engine)
    return any(part.state == "broken" for part in parts)


def _package(name: str, facts: Facts) -> Package:
    return Package(
        name=name,
        state="absent" if facts.get("absent") else "broken" if facts.get("broken") else "present",
        version=facts.get("version"),
        cause=facts.get("broken"),
    )


def _optional(item: Component, facts: Facts) -> OptionalPackage:
    package = _package(item.name, facts)
    return OptionalPackage(
        name=item.name,
        state=package.state,
        version=package.version,
        cause=package.cause,
        use=item.use,
        used_by_this_version=item.is_used,
        instead=item.instead,
    )


def _gpus(listed: Sequence[Facts]) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            name=item["name"],
            memory_bytes=item["memory_bytes"],
            compute_capability=item["capability"],
            problem=item.get("broken"),
        )
        for item in listed
    )


def _ability(num_gpus: int, engine: Package, problems: Sequence[Problem]) -> Ability:
    if engine.state != "present" or any(problem.forbids_training for problem in problems):
        return "plan"
    return "train_on_gpus" if num_gpus else "train_on_cpu"


def _verdict(can: Ability, num_gpus: int) -> str:
    if can == "train_on_gpus":
        count = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
        return f"this machine can plan, and train on CPU or {count}; {_UNTRIED}"
    if can == "train_on_cpu":
        return "this machine can plan, and train on CPU"
    return "this machine can plan, but not train"


def _python_problems(found: Found) -> Iterator[Problem]:
    if not _is_within(found.python, PYTHON_AT_LEAST, PYTHON_BELOW):
        yield Problem(
            what=f"Python {found.python} is not one that megamoe is made for",
            remedy=f"use Python {_bounds(PYTHON_AT_LEAST, PYTHON_BELOW)}; 3.11 is the tested one",
            forbids_training=False,
        )


def _required_problems(packages: Sequence[Package]) -> Iterator[Problem]:
    absent = [package.name for package in packages if package.state == "absent"]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        yield Problem(
            what=f"training needs {' and '.join(absent)}, which {verb} not installed",
            remedy=INSTALL,
            forbids_training=True,
        )
    for package, needed in zip(packages, REQUIREMENTS, strict=True):
        if package.state == "broken":
            yield Problem(
                what=f"{package.name} is broken: {package.cause}",
                remedy=f"install it again: {_reinstall(needed)}",
                forbids_training=True,
            )
        elif package.version and not _is_within(package.version, needed.at_least, needed.below):
            yield Problem(
                what=f"{package.name} {package.version} is not one that megamoe is made for",
                remedy=f"install {package.name} {_bounds(needed.at_least, needed.below)}",
                forbids_training=False,
            )


def _engine_problems(required: Sequence[Package], engine: Package) -> Iterator[Problem]:
    if engine.state == "broken" and all(package.state == "present" for package in required):
        yield Problem(
            what=f"megamoe's engine cannot be imported: {engine.cause}",
            remedy=f"install the versions megamoe is made for, {INSTALL}, and mend what is broken",
            forbids_training=True,
        )


def _gpu_problems(
    gpus: Sequence[Gpu], seen: int, torch: Facts, facts: Mapping[str, Facts]
) -> Iterator[Problem]:
    asked, smi = facts["gpus"], facts["nvidia-smi"]
    if smi.get("broken"):
        yield _gpu_problem(f"the NVIDIA driver does not answer: {smi['broken']}", "mend the driver")
    if gpus and not seen and "cuda" in torch:
        cause = f" ({asked['broken']})" if asked.get("broken") else ""
        if torch["cuda"] is None:
            what = "torch is a CPU build and sees no GPU"
            remedy = "install torch with CUDA from https://pytorch.org"
        else:
            what = f"torch sees none of the GPUs that the driver lists{cause}"
            remedy = (
                f"look at CUDA_VISIBLE_DEVICES; or use a driver for CUDA {torch['cuda']}, or a "
                "torch built for an older CUDA"
            )
        yield _gpu_problem(what, remedy)
    for index, gpu in enumerate(gpus):
        if gpu.problem is not None:
            yield _gpu_problem(
                f"GPU {index} does not compute: {gpu.problem}",
                "see whether torch was built for it, whether another process holds it, and dmesg",
            )


def _gpu_problem(what: str, remedy: str) -> Problem:
    return Problem(what=what, remedy=remedy, forbids_training=False)


def _compiler_problems(compiler: Package) -> Iterator[Problem]:
    if compiler.state != "present":
        yield Problem(
            what="no C++ compiler: models with an expert bias, such as k_exaone_236b_a23b, do not "
            "train, because Megatron-core compiles a part of their router",
            remedy="install g++",
            forbids_training=False,
        )


def _optional_problem(package: OptionalPackage) -> Problem:
    return Problem(
        what=f"{package.name} is broken: {package.cause}",
        remedy=f"install it again or remove it; instead of it: {package.instead}",
        forbids_training=False,
    )


def _reinstall(needed: Requirement) -> str:
    return f"pip install --force-reinstall {needed.distributions[0]}"


def _is_within(version: str, at_least: tuple[int, ...], below: tuple[int, ...]) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
    return numbers >= at_least and (not below or numbers < below)


def _bounds(at_least: tuple[int, ...], below: tuple[int, ...]) -> str:
    low, high = (".".join(str(part) for part in bound) for bound in (at_least, below))
    return f"{low} or later, below {high}" if high else f"{low} or later"
