"""The `megamoe` command. A command's module is imported only when that command is given."""

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import megamoe
from megamoe.errors import MegamoeError

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE
MAX_MESSAGE = 2_000  # characters of an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command and the module that holds it.

    `configure(parser)` of the module adds arguments or subcommands and sets `run`, a function of
    the parsed arguments that returns the exit status.
    """

    name: str
    help: str
    module: str


# launch and data_prep stand beside megamoe, which never imports them but by these names.
COMMANDS = (
    Command(name="recipe", help="show, check or list recipes", module="megamoe.recipe.cli"),
    Command(name="model", help="count a model's parameters", module="megamoe.model.cli"),
    Command(name="plan", help="settle every number for one cluster", module="megamoe.plan.cli"),
    Command(name="run", help="plan for this machine and train here", module="launch.cli_run"),
    Command(name="train", help="be one rank of a run", module="megamoe.train.main"),
    Command(name="data", help="make tokenised shards from text", module="data_prep.cli"),
    Command(
        name="checkpoint",
        help="verify, inspect, compare and merge checkpoints",
        module="megamoe.checkpoints.cli",
    ),
    Command(
        name="convert",
        help="write and read Hugging Face folders",
        module="megamoe.convert.cli",
    ),
    Command(
        name="generate",
        help="let a trained model go on after a prompt",
        module="megamoe.generate.cli",
    ),
    Command(
        name="eval",
        help="measure a trained model on files of text",
        module="megamoe.generate.eval_cli",
    ),
    Command(
        name="parity",
        help="compare layouts with one process, number by number",
        module="megamoe.parity.cli",
    ),
    Command(name="report", help="report on a run", module="megamoe.report.cli"),
    Command(name="doctor", help="say what this machine can do", module="megamoe.doctor.cli"),
)
OWN_PACKAGES = ("megamoe", "launch", "data_prep", "megamoe_kernels")
EPILOG = """examples:
  megamoe recipe list
  megamoe recipe show vaetki_7b_a1b
  megamoe COMMAND --help
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, with the nearest word."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake instead of printing the usage."""
        raise MegamoeError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401  # argparse's
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise argparse.ArgumentError(action, f"{value!r} is not known; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for a mistake of the user's.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except MegamoeError as error:
        message = " ".join(str(error).split())[:MAX_MESSAGE]
        sys.stderr.write(f"megamoe: error: {message}\n")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        sys.stderr.write("megamoe: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. What is left in the buffer would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    return status


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    try:
        parsed, unknown = parser.parse_known_args(arguments)
    except SystemExit as leave:  # --help and --version have printed what was asked
        return leave.code if isinstance(leave.code, int) else 0
    if unknown:
        words = " ".join(unknown)
        raise MegamoeError(
            f"unrecognized arguments: {words}; see `megamoe {parsed.command} --help`"
        )
    status: int = parsed.run(parsed)
    return status


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="megamoe",
        description="Pretrain Mixture-of-Experts language models on Megatron-core.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megamoe {megamoe.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    given = next((word for word in arguments if not word.startswith("-")), None)
    for command in COMMANDS:
        described = f"{command.help[0].upper()}{command.help[1:]}."
        child = subparsers.add_parser(
            command.name,
            help=command.help,
            description=described,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.name == given:
            _configure(child, command)
    return parser


def _configure(parser: argparse.ArgumentParser, command: Command) -> None:
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OWN_PACKAGES:
            raise
        raise MegamoeError(
            f"`megamoe {command.name}` needs the package {missing!r}, which is not installed; "
            "give `pip install megamoe[train]`"
        ) from error
    module.configure(parser)


if __name__ == "__main__":
    raise SystemExit(main())
