"""Lines of JSON: whole ones, each once, also where there is no room for a while."""

import json
import os

import pytest

from megamoe.plan import lines
from megamoe.plan.lines import LinesFile, append_line
from tests.unit.disks import room

LINE = len('{"step": 100, "text": ""}\n')


def record(step, text=""):
    return {"step": step, "text": text}


def steps(path):
    """Steps of a file in which every line is whole."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lines.jsonl"


@pytest.mark.parametrize("durable", [False, True])
def test_what_has_no_room_waits_and_is_written_once_there_is(path, durable):
    said = []
    file = LinesFile(path, said.append, durable=durable)
    file.append(record(100))
    with room(2 * LINE + LINE // 2):
        for step in range(101, 105):
            file.append(record(step))
        assert steps(path) == [100, 101]
        assert said == [
            f"{path}: File too large; its lines wait in memory until they can be written"
        ]
    file.append(record(105))
    assert steps(path) == list(range(100, 106))
    with room(6 * LINE):
        file.append(record(106))
    file.close()
    assert steps(path) == list(range(100, 107))
    assert len(said) == 1


def test_a_line_that_fits_is_not_kept_back_by_a_part_of_another(path):
    file = LinesFile(path, print)
    with room(3 * LINE):
        file.append(record(100))
        file.append(record(101, "x" * 3 * LINE))
        assert steps(path) == [100]
    file.close()
    assert steps(path) == [100, 101]


def test_what_could_not_be_written_at_the_end_is_told(path):
    said = []
    file = LinesFile(path, said.append)
    file.append(record(100))
    with room(LINE):
        file.append(record(101))
        file.append(record(102))
        file.close()
    assert said[1:] == [f"{path}: File too large; 2 lines are lost"]
    assert steps(path) == [100]


def test_no_more_than_a_bound_waits_and_what_is_over_it_is_told(path, monkeypatch):
    monkeypatch.setattr(lines, "MOST_WAITING", 3 * LINE)
    said = []
    file = LinesFile(path, said.append)
    with room(0):
        for step in range(100, 105):
            file.append(record(step))
    file.append(record(105))
    file.append(record(106))
    file.close()
    assert steps(path) == [100, 101, 102, 105, 106]
    assert said[1:] == [f"{path}: 2 lines are lost"]


def test_a_listener_who_cannot_write_ends_nothing(path):
    def say(line):
        raise OSError(28, "No space left on device")

    file = LinesFile(path, say)
    with room(0):
        file.append(record(100))
    file.close()
    assert steps(path) == [100]


def test_an_interrupt_within_a_line_leaves_it_to_be_written_again(path, monkeypatch):
    file = LinesFile(path, print)
    write = os.write

    def interrupted(descriptor, content):
        write(descriptor, content[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.append(record(100))
    file.append(record(101))
    file.close()
    assert steps(path) == [100, 101]


@pytest.mark.parametrize("torn", [b"", b'{"st', b"x" * 200_000])
@pytest.mark.parametrize("whole", [0, 1, 9_000])
def test_a_file_is_cut_after_its_last_whole_line(path, torn, whole):
    before = [json.dumps(record(step)) + "\n" for step in range(whole)]
    path.write_bytes("".join(before).encode() + torn)
    file = LinesFile(path, print)
    file.append(record(-1))
    file.close()
    assert steps(path) == [*range(whole), -1]


def test_a_single_line_is_whole_or_refused(path):
    append_line(path, record(100))
    with room(LINE + 5), pytest.raises(OSError, match="File too large"):
        append_line(path, record(101))
    append_line(path, record(102))
    assert steps(path) == [100, 102]
