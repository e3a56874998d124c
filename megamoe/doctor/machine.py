"""What the standard library tells of this machine."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """An operating system and what a process may use of the hardware."""

    system: str
    num_cpus: int
    memory_bytes: int | None


def this_machine() -> Machine:
    """Return this machine. No host name: people show it to others."""
    return Machine(system=_system(), num_cpus=_num_cpus(), memory_bytes=_memory_bytes())


def driver_version(path: Path = _DRIVER) -> str | None:
    """Return the version of the NVIDIA driver as the kernel module gives it; None without one."""
    if not path.is_file():
        return None
    found = re.search(r"Kernel Module\s.*?(\d+\.\d+[\d.]*)", path.read_text())
    return found.group(1) if found else None


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def _num_cpus() -> int:
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    limit = _limit("cpu.max")
    return usable if limit is None else max(1, min(usable, int(limit)))


def _memory_bytes() -> int | None:
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = _limit("memory.max")
    return whole if limit is None else min(whole, int(limit))


def _limit(name: str) -> float | None:
    """Return what a container allows: '<bytes>' or '<microseconds> <in microseconds>'."""
    try:
        numbers = [float(word) for word in (_CGROUP / name).read_text().split()]
    except (OSError, ValueError):  # no cgroups of version 2, or 'max'
        return None
    return numbers[0] if len(numbers) == 1 else numbers[0] / numbers[1]
