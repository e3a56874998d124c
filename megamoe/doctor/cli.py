"""`megamoe doctor`: what this machine has, what it can do, what is wrong with it."""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence

import megamoe
from megamoe.commit import running_commit
from megamoe.doctor.component import OPTIONAL, REQUIREMENTS
from megamoe.doctor.diagnosis import Diagnosis, Found, diagnose, is_broken
from megamoe.doctor.machine import driver_version, this_machine
from megamoe.doctor.probe import Facts, probe_all
from megamoe.doctor.show import as_json, as_text
from megamoe.errors import MegamoeError

LIMIT_S = 60.0
_MAX_AT_ONCE = 4  # a child that imports torch takes half a gigabyte
# Probes that are made only where these can be imported.
_FURTHER = {
    "torch-build": ("torch",),
    "gpus": ("torch",),
    "engine": tuple(item.name for item in REQUIREMENTS),
}
_EPILOG = """examples:
  megamoe doctor
  megamoe doctor --json > doctor.json

exit status: 0 when this machine can plan or train; 1 when something that training needs is
installed and broken; 2 for a mistake in the command.

The output holds no host name, no folders and no values of environment variables: it can be
pasted into a bug report.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe doctor`."""
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=LIMIT_S,
        metavar="SECONDS",
        help=f"for the import of one package; default: {LIMIT_S:g}",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine this machine and print what was found; 1 when what training needs is broken."""
    if not args.time_limit > 0:
        raise MegamoeError(
            f"--time-limit: {args.time_limit:g} leaves no time; give seconds above 0"
        )
    diagnosis = examine(args.time_limit)
    sys.stdout.write(as_json(diagnosis) if args.json else as_text(diagnosis))
    return 1 if is_broken(diagnosis) else 0


def examine(limit_s: float) -> Diagnosis:
    """Return the diagnosis of this machine; each probe may take `limit_s` seconds."""
    machine = this_machine()
    at_once = min(_MAX_AT_ONCE, machine.num_cpus)
    jobs: dict[str, tuple[str, ...]] = {item: (item,) for item in ("nvidia-smi", "compiler")}
    for item in (*REQUIREMENTS, *OPTIONAL):
        jobs[item.name] = ("import", ",".join(item.modules), ",".join(item.distributions))
    facts = probe_all(jobs, limit_s=limit_s, at_once=at_once)
    further = [name for name, needed in _FURTHER.items() if not _missing(facts, needed)]
    facts |= {name: {"absent": True} for name in _FURTHER}
    facts |= probe_all({name: (name,) for name in further}, limit_s=limit_s, at_once=at_once)
    return diagnose(
        Found(
            megamoe=megamoe.__version__,
            commit=running_commit(),
            python=platform.python_version(),
            machine=machine,
            driver=driver_version(),
            facts=facts,
        )
    )


def _missing(facts: Mapping[str, Facts], needed: Sequence[str]) -> list[str]:
    return [name for name in needed if facts[name].keys() & {"absent", "broken"}]
