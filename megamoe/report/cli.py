"""`megamoe report`: what a run did, as a page."""

import argparse
import sys
from pathlib import Path

from megamoe.checkpoints.refused import one_line
from megamoe.report.write import write_report

_EPILOG = """example:
  megamoe report runs/tiny
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe report`."""
    parser.epilog = _EPILOG
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder, finished or not")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    with one_line(args.run_dir, "mend that and give the command again"):
        files = write_report(args.run_dir)
    for name, file in files:
        sys.stdout.write(f"{name:<10}  {file}\n")
    return 0
