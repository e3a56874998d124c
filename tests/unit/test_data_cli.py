"""`megamoe data`, from the words a user types to the lines that come back."""

import argparse
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.cli import configure
from megamoe.errors import DataError

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "pyarrow", "tokenizers", "sentencepiece", "torch", "rich", "multiprocessing")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="megamoe data")
    configure(root)
    return root


def data(*words: str | Path) -> int:
    args = parser().parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [
        json.dumps({"text": f"문서 {number}. def f():\n\treturn {number}"}) for number in range(99)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"one plain text"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text) -> Path:
    root = tmp_path_factory.mktemp("made")
    train = ("tokenizer", "train", "--algorithm", "byte-level-bpe", "--vocab-size", "290")
    assert data(*train, "-o", root / "tok", text) == 0
    options = ("--heldout", "0.1", "--fim", "--code", "--workers", "1")
    make = ("tokenize", "--tokenizer", root / "tok", "-o", root / "data")
    assert data(*make, "--source", "mine", *options, f"{text}/*.jsonl", text / "b.txt.gz") == 0
    return root


def test_importing_the_commands_imports_nothing_heavy():
    program = f"import sys, data_prep.cli; print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", ["sample", "tokenizer train", "tokenizer import", "tokenize", "inspect"]
)
def test_every_command_has_help_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        data(*command.split(), "--help")
    assert caught.value.code == 0
    assert "example" in capsys.readouterr().out


def test_the_sample_command_prints_sizes(tmp_path, capsys):
    assert data("sample", tmp_path / "text") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "korean.jsonl.zst: 1,741 documents, 2,451,117 bytes of text" in lines[0]
    assert len(lines) == 4


def test_train_and_tokenize_print_what_they_made(tmp_path, text, capsys):
    train = ("tokenizer", "train", "--algorithm", "sentencepiece-bpe", "--vocab-size", "320")
    assert data(*train, "-o", tmp_path / "tok", text) == 0
    make = ("tokenize", "--tokenizer", tmp_path / "tok", "--workers", "1", "-o", tmp_path / "out")
    assert data(*make, "--source", "mine", text) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/tok: sentencepiece-bpe, 320 ids, sha256 ")
    assert second.startswith(f"{tmp_path}/out/mine.bin: train, 100 documents, ")


def console_blocks(page: str) -> list[tuple[list[str], str]]:
    """Words and expected output of each `$` line in the page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    steps = [
        step.partition("\n") for block in blocks for step in block.split("$ megamoe data ")[1:]
    ]
    return [(command.split(), output) for command, _, output in steps]


def without_numbers(output: str) -> str:
    """The output with figures and digests that depend on a library's version masked."""
    return re.sub(r" +", " ", re.sub(r"[0-9a-f]{16}|[0-9][0-9,.]*", "N", output))


@pytest.mark.slow
def test_the_commands_of_the_guide_print_what_it_says(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    steps = console_blocks(page)
    assert len(steps) == 7
    for words, expected in steps[:-1]:
        assert data(*words) == 0
        assert without_numbers(capsys.readouterr().out) == without_numbers(expected)
    assert data(*steps[-1][0]) == 0
    assert capsys.readouterr().out.startswith("<|fim_prefix|><|fim_suffix|>")


def test_inspect_prints_the_table(folder, capsys):
    assert data("inspect", folder / "data") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["source", "part", "documents", "tokens"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["mine", "train"],
        ["mine", "heldout"],
        ["mine", "fim"],
    ]
    assert lines[4].startswith("tokenizer: byte-level-bpe, 290 ids, ")


def test_inspect_decodes_a_document(folder, capsys):
    words = ("inspect", folder / "data", "--source", "mine", "--document", "0")
    assert data(*words) == 0
    assert capsys.readouterr().out == "문서 0. def f():\n\treturn 0<|eod|>\n"
    assert data(*words, "--part", "fim") == 0
    assert capsys.readouterr().out.startswith("<|fim_prefix|><|fim_suffix|>")


def test_bad_lines_are_left_out_only_when_asked(folder, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\noops\n{"text": ""}\n{"n": 1}\n')
    make = ("tokenize", "--tokenizer", folder / "tok", "--workers", "1", "-o", tmp_path / "out")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a JSON object"):
        data(*make, "--source", "mine", path)
    assert data(*make, "--source", "mine", "--skip-bad", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"2 bad lines left out; the first: {path}:2: not a JSON object")
    assert lines[2] == "1 empty documents left out"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "{}/text"), "not a data folder"),
        (("inspect", "{}/data", "--source", "x"), "data: no source x; it has mine"),
        (("inspect", "{}/data", "--document", "1"), "--document says which .*; add --source NAME"),
        (
            ("inspect", "{}/data", "--source", "mine", "--document", "100"),
            r"data/mine: no document 100; there are \d+, counted from 0",
        ),
        (
            ("tokenize", "--tokenizer", "{}/data", "--source", "x", "-o", "{}/y", "{}/tok"),
            "tok: the folder holds no|data: not a tokenizer folder",
        ),
        (
            ("tokenize", "--tokenizer", "{}/t", "--source", "x", "-o", "{}/y", "--code", "z.txt"),
            "--code says where --fim cuts; add --fim, or leave --code out",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, words, message):
    with pytest.raises(DataError, match=message) as caught:
        data(*(word.format(folder) for word in words))
    assert "\n" not in str(caught.value)


def test_a_part_that_was_not_made_is_refused(folder, text, tmp_path):
    make = ("tokenize", "--tokenizer", folder / "tok", "--workers", "1", "-o", tmp_path)
    data(*make, "--source", "mine", text)
    words = ("inspect", tmp_path, "--source", "mine", "--document", "0", "--part", "fim")
    with pytest.raises(DataError, match="source mine has no fim; it has train"):
        data(*words)


def test_a_shard_that_was_deleted_or_broken_is_named(folder, text, tmp_path):
    make = ("tokenize", "--tokenizer", folder / "tok", "--workers", "1", "-o", tmp_path)
    data(*make, "--source", "mine", text)
    (tmp_path / "mine.idx").write_bytes(b"")
    document = ("inspect", tmp_path, "--source", "mine", "--document", "0")
    with pytest.raises(DataError, match=r"mine\.idx: not the index of a shard; tokenize again"):
        data(*document)
    (tmp_path / "mine.idx").unlink()
    with pytest.raises(DataError, match=r"mine: the shard cannot be read: .*; tokenize again"):
        data(*document)
    with pytest.raises(DataError, match=r"mine\.idx: the manifest names it but it is missing"):
        data("inspect", tmp_path)
