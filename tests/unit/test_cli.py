"""The `megamoe` command: fast, lazy, one line for a mistake, a traceback for a bug."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import megamoe
from megamoe import __main__ as command
from megamoe.errors import MegamoeError

ROOT = Path(megamoe.__file__).parent.parent
HEAVY = ("torch", "numpy", "megatron", "rich", "transformers", "sentencepiece")
MAX_HELP_S = 0.5


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "megamoe", *arguments]
    return subprocess.run(full, capture_output=True, text=True, check=False, cwd=ROOT)


def processor_s() -> float:
    """Return the processor time that child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments", [("--help",), ("recipe", "show", "vaetki_7b_a1b")])
def test_it_answers_in_half_a_second(arguments: tuple[str, ...]):
    # Processor time: on a machine with nothing else to do it is the time one waits.
    times = []
    for _ in range(5):
        start = processor_s()
        assert run(*arguments).returncode == 0
        times.append(processor_s() - start)
    assert min(times) < MAX_HELP_S


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipe", "show", "vaetki_7b_a1b", "--scale", "tiny"],
        ["recipe", "list"],
        ["model", "params", "vaetki_7b_a1b", "--formula"],
    ],
)
def test_it_imports_nothing_heavy(arguments: list[str]):
    script = (
        "import sys; from megamoe.__main__ import main; "
        f"status = main({arguments!r}); "
        f"sys.exit(status or ' '.join(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode in (0, 1)
    assert done.stderr.strip() == ""


def test_only_the_module_of_the_given_command_is_imported():
    script = (
        "import sys; from megamoe.__main__ import main; main(['--help']); "
        "sys.stderr.write(' '.join(m for m in sys.modules if m.endswith('.cli')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == ""


def test_help_names_every_command_that_is_installed(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "recipe" in text
    assert "examples:" in text


@pytest.mark.parametrize(
    "arguments", [["recipe"], ["recipe", "show"], ["recipe", "check"], ["recipe", "list"]]
)
def test_every_command_of_recipe_has_help_with_an_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert command.main([*arguments, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: megamoe {' '.join(arguments)}" in text
    assert "\nexample" in text
    assert f"  megamoe {' '.join(arguments)}" in text


def test_version(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megamoe {megamoe.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["recpie"], "did you mean 'recipe'?"),
        (["recipe"], "required: COMMAND"),
        (["recipe", "shwo", "vaetki_7b_a1b"], "did you mean 'show'?"),
        (["recipe", "show"], "required: RECIPE"),
        (["recipe", "show", "vaetki_7b_a1b", "--scale", "tny"], "did you mean 'tiny'?"),
        (["recipe", "show", "vaetki_7b_a1b", "--st", "x"], "unrecognized arguments: --st x"),
        (["recipe", "show", "vaetki_7b_a1b", "--set"], "expected one argument"),
        (["recipe", "show", "vaetki_7b_a1b", "--set", "general.lr.peek=1"], "did you mean 'peak'?"),
        (["xyzzy"], "known: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("megamoe: error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def with_command(monkeypatch: pytest.MonkeyPatch, body: Callable[..., int]) -> None:
    """Put a command named 'probe' into the table, whose module is made here."""
    module = ModuleType("probe_cli")

    def configure(parser):
        parser.set_defaults(run=body)

    module.__dict__.update(configure=configure)
    module.__spec__ = command.importlib.util.spec_from_loader("probe_cli", loader=None)
    monkeypatch.setitem(sys.modules, "probe_cli", module)
    entry = command.Command(name="probe", help="probe", module="probe_cli")
    monkeypatch.setattr(command, "COMMANDS", (*command.COMMANDS, entry))


def test_the_status_is_what_the_command_returns(monkeypatch: pytest.MonkeyPatch):
    with_command(monkeypatch, lambda args: 7)
    assert command.main(["probe"]) == 7


def test_a_message_of_many_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(args):
        raise MegamoeError("first\nsecond\n  third")

    with_command(monkeypatch, fail)
    assert command.main(["probe"]) == 2
    assert capsys.readouterr().err == "megamoe: error: first second third\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(args):
        raise ZeroDivisionError("a bug")

    with_command(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command.main(["probe"])


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch):
    def fail(args):
        raise KeyboardInterrupt

    with_command(monkeypatch, fail)
    assert command.main(["probe"]) == 130


def test_a_reader_that_leaves_is_no_error():
    full = [sys.executable, "-m", "megamoe", "recipe", "show", "vaetki_7b_a1b"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            full, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_a_package_that_is_not_installed_is_a_mistake_and_a_lost_module_of_ours_a_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, lost in (("needs_other", "no_such_package"), ("needs_ours", "megamoe.no_such")):
        (tmp_path / f"{name}.py").write_text(f"import {lost}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = [
        command.Command(name=name, help=name, module=name) for name in ("needs_other", "needs_ours")
    ]
    monkeypatch.setattr(command, "COMMANDS", commands)
    assert command.main(["needs_other"]) == 2
    assert "needs the package 'no_such_package'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError, match=r"megamoe\.no_such"):
        command.main(["needs_ours"])


@pytest.mark.parametrize("text", ["import os\n", "X = [\n", "RECIPE = 5\n"])
def test_the_installed_command_prints_one_line_and_exits_with_2(text: str, tmp_path: Path):
    path = tmp_path / "wrong.py"
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "megamoe", "recipe", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"megamoe: error: {path}:")
