"""One probe, run as a script in a process of its own: it may fail, crash or hang and harm nobody.

    python -P child.py TASK ARGUMENT...

What packages print is dropped; the answer is one JSON object on the standard output. In it are
no values of environment variables, no host name and no folders: people paste it in public.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
MAX_CAUSE = 200  # characters
_SHORTEST_SECRET = 6  # characters; shorter values are words such as 'C' or '1'
_PATH = re.compile(r"(?<![\w.])(?:~|\.{1,2}|<hidden>)?/(?:[^\s/'\"(),:;]+/)*")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,59}")


def main(arguments: Sequence[str]) -> None:
    """Answer one task and leave at once, without what packages would do at exit."""
    answer = os.dup(1)  # not inherited by what a package starts
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    try:
        facts = TASKS[arguments[0]](*arguments[1:])
    except BaseException as error:  # SystemExit is one of the ways to be broken
        facts = {"broken": cause(error)}
    os.write(answer, json.dumps(facts).encode())
    os._exit(0)


def cause(error: BaseException) -> str:
    """Return an error as one line that can be shown to anybody."""
    words = " ".join(str(error).split())
    name = type(error).__name__
    return scrub(f"{name}: {words}" if words else name)[:MAX_CAUSE]


def scrub(text: str) -> str:
    """Return a text without values of the environment, the host's name and folders."""
    values = set(os.environ.values())
    folders = {part for value in values for part in value.split(os.pathsep) if part[:1] == "/"}
    for value in sorted(values | folders, key=len, reverse=True):
        if len(value) < _SHORTEST_SECRET:
            break
        text = text.replace(value, "<hidden>")
    for name in {socket.gethostname(), os.environ.get("USER", ""), os.environ.get("LOGNAME", "")}:
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<hidden>", text)
    return _PATH.sub("", text)


def import_package(modules: str, distributions: str) -> Facts:
    """Import a package's modules, given with commas between them; tell its version."""
    names = modules.split(",")
    installed = _installed(distributions.split(","))
    if not _is_there(names[0]):
        return {"absent": True}
    try:
        imported = [importlib.import_module(name) for name in names]
    except ModuleNotFoundError:
        if installed is None:  # part of another package, which does not bring what it needs
            return {"absent": True}
        raise
    version = installed or str(getattr(imported[0], "__version__", ""))
    return {"version": version if _VERSION.fullmatch(version) else None}


def describe_torch() -> Facts:
    """Tell what torch was built with."""
    torch = importlib.import_module("torch")
    facts: Facts = {"cuda": torch.version.cuda, "nccl": None, "kernels_for": []}
    if torch.version.cuda is not None:
        facts["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        facts["kernels_for"] = list(torch.cuda.get_arch_list())
    return facts


def describe_gpus() -> Facts:
    """Tell what torch sees of each GPU, and whether it computes."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"gpus": []}
    torch.cuda.init()
    return {"gpus": [_gpu(torch, index) for index in range(torch.cuda.device_count())]}


def ask_nvidia_smi() -> Facts:
    """Tell what the driver sees of each GPU."""
    if shutil.which("nvidia-smi") is None:
        return {"absent": True}
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
        return {"broken": scrub(f"nvidia-smi: {said}")[:MAX_CAUSE]}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    gpus = [
        {"name": name, "memory_bytes": _bytes_of(mebibytes), "capability": capability}
        for name, mebibytes, capability, _ in rows
    ]
    return {"gpus": gpus, "driver": rows[0][3] if rows else None}


def find_compiler() -> Facts:
    """Tell which C++ compiler torch.compile would call."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return {"absent": True}
    done = subprocess.run(
        [compiler, "-dumpfullversion"], capture_output=True, text=True, check=False
    )
    version = done.stdout.strip()
    return {"version": version if _VERSION.fullmatch(version) else None}


def import_engine() -> Facts:
    """Import what a rank imports before it trains."""
    sys.path.append(str(Path(__file__).parents[2]))
    importlib.import_module("megamoe.mcore.cpu").enable()
    for name in ("megamoe.mcore.engine", "megamoe.mcore.groups", "megamoe.train.hooks"):
        importlib.import_module(name)
    return {}


def _gpu(torch: Any, index: int) -> Facts:  # noqa: ANN401  (torch, imported by name)
    properties = torch.cuda.get_device_properties(index)
    facts: Facts = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "broken": None,
    }
    try:
        total = torch.ones(64, 64, device=f"cuda:{index}").matmul(torch.ones(64, 64).cuda(index))
        if float(total.sum()) != 64.0**3:
            facts["broken"] = "a product of two matrices came out wrong"
    except Exception as error:  # whatever a driver says
        facts["broken"] = cause(error)
    return facts


def _bytes_of(mebibytes: str) -> int | None:
    """Return the bytes; None for '[N/A]', as of GPUs that share the memory of the processor."""
    return int(mebibytes) * 2**20 if mebibytes.isdecimal() else None


def _is_there(module: str) -> bool:
    """Look for a module without importing the packages around it."""
    parts = module.split(".")
    spec = importlib.util.find_spec(parts[0])
    for depth in range(2, len(parts) + 1):
        if spec is None:
            return False
        name, folders = ".".join(parts[:depth]), spec.submodule_search_locations
        spec = importlib.machinery.PathFinder.find_spec(name, folders)
    return spec is not None


def _installed(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


TASKS: dict[str, Callable[..., Facts]] = {
    "import": import_package,
    "torch-build": describe_torch,
    "gpus": describe_gpus,
    "nvidia-smi": ask_nvidia_smi,
    "compiler": find_compiler,
    "engine": import_engine,
}

if __name__ == "__main__":
    main(sys.argv[1:])
