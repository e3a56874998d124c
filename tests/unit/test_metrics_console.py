"""What a person sees: a bar on a terminal, lines elsewhere."""

import io
import os

import pytest

from megamoe.train.console import BarConsole, LineConsole, duration, open_console
from tests.unit.test_metrics_records import SEGMENT, measured, result


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def steps_to(console, last):
    for step in range(1, last + 1):
        console.record_step(result(step))
    console.close()


def test_lines_stand_at_both_ends_and_now_and_then_between():
    stream = io.StringIO()
    steps_to(open_console(stream, SEGMENT), SEGMENT.num_steps)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "general: 100,352 tokens in 147 steps, sequences of 64, on 2 ranks"
    assert lines[1].startswith("general  step 1/147  tokens 512/100,352  loss 3.5000  lr 1.00e-03")
    assert lines[2].startswith("general  step 7/147")
    assert lines[-1].startswith("general  step 147/147")
    assert len(lines) == 1 + 1 + 147 // 7


def test_a_resumed_segment_speaks_at_once():
    stream = io.StringIO()
    console = LineConsole(stream, SEGMENT)
    console.record_step(result(12))
    assert "step 12/147" in stream.getvalue()


def test_the_end_is_foreseen_from_the_pace():
    stream = io.StringIO()
    LineConsole(stream, SEGMENT).record_step(result(1))
    left = (100_352 - 512) / 1_024  # seconds
    assert f"1,024 tokens/s  eta {duration(left)}" in stream.getvalue()


def test_a_held_out_loss_is_a_line():
    stream = io.StringIO()
    LineConsole(stream, SEGMENT).record_evals([measured(14), measured(14, source="code")])
    line = "general  step 14/147  held-out loss: korean 3.7500  code 3.7500\n"
    assert stream.getvalue().endswith(line)


def test_a_terminal_gets_one_live_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    console = open_console(stream, SEGMENT)
    assert isinstance(console, BarConsole)
    console.record_step(result(10, mtp_loss=4.25))
    console.record_evals([measured(10)])
    console.close()
    shown = stream.getvalue()
    assert "loss 3.5000  mtp 4.2500  1,024 tokens/s" in shown
    assert "held-out loss: korean 3.7500" in shown
    assert "5%" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3_599, "59 min 59 s"),
        (3_600, "1 h 00 min"),
        (86_399, "23 h 59 min"),
        (86_400, "1 d 0 h"),
        (13 * 86_400 + 7_300, "13 d 2 h"),
    ],
)
def test_times_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_lines_into_a_file_on_a_full_disk_end_nothing():
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        stream = io.TextIOWrapper(full, write_through=True)
        steps_to(LineConsole(stream, SEGMENT), 3)
        stream.detach()


def test_lines_that_nobody_reads_any_more_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:  # noqa: PTH123
        stream = io.TextIOWrapper(pipe, write_through=True)
        with pytest.raises(BrokenPipeError):
            LineConsole(stream, SEGMENT)
        stream.detach()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_line_of_no_step_is_said_whole(stream):
    console = open_console(stream, SEGMENT)
    console.say("runs/[a]/metrics.jsonl: 3 lines are lost")
    console.close()
    assert "runs/[a]/metrics.jsonl: 3 lines are lost" in stream.getvalue()
