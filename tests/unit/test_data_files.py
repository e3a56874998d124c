"""Every kind of input a user may have, and what is said about those that cannot be read."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_prep.files import Document, expand_inputs, raise_error, read_documents
from megamoe.errors import DataError

TEXTS = ["첫 문서\n둘째 줄\t탭", "second  document", "", "😀 third"]
COMPRESS = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": "a", key: text}) + "\n" for text in texts).encode()


def read(path: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in read_documents(path, text_key, raise_error)]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("compression", list(COMPRESS))
def test_json_lines_are_read_whatever_their_compression(tmp_path, ending, compression):
    path = tmp_path / f"a{ending}{compression}"
    path.write_bytes(COMPRESS[compression](json_lines(TEXTS)))
    assert expand_inputs([str(path)]) == (path,)
    assert read(path) == TEXTS


@pytest.mark.parametrize("compression", list(COMPRESS))
def test_a_text_file_is_one_document(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](b"line one\r\n\n  line two\n"))
    assert read(path) == ["line one\r\n\n  line two\n"]


def test_parquet_rows_are_documents(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": TEXTS, "n": list(range(4))}), path)
    assert read(path, "body") == TEXTS


def test_a_document_knows_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n{"text": "y"}\n')
    found = list(read_documents(path, "text", raise_error))
    assert found == [Document("x", f"{path}:1"), Document("y", f"{path}:3")]


def test_concatenated_compressed_files_are_read_to_their_end(tmp_path):
    for compression in (".gz", ".xz", ".zst"):
        path = tmp_path / f"a.jsonl{compression}"
        path.write_bytes(b"".join(COMPRESS[compression](json_lines([text])) for text in TEXTS))
        assert read(path) == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_compressed_file_cut_short_is_an_error(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    raw = COMPRESS[compression](json_lines([f"{number * 7919}" for number in range(20_000)]))
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: cannot be read: "):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"plain words")
    with pytest.raises(
        DataError, match=rf"^{path}: (cannot be read|not a Parquet file): "
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_folders_and_patterns_stand_for_their_files_each_once(tmp_path):
    for name in ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "sub/notes.md", "sub/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["a.txt", "b.jsonl", "sub/c.jsonl.gz", "sub/d.parquet"]
    everything = tuple(tmp_path / name for name in names)
    assert expand_inputs([str(tmp_path), f"{tmp_path}/*.jsonl"]) == everything
    assert expand_inputs([f"{tmp_path}/**/*.gz"]) == (tmp_path / "sub/c.jsonl.gz",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.jsonl", r"missing\.jsonl: no such file, folder or pattern$"),
        ("korean.jsonk", r"no such file, folder or pattern; is it .*korean\.jsonl\?"),
        ("*.parquet", r"\*\.parquet: no such file, folder or pattern"),
        ("notes.doc", r"notes\.doc: not a kind of file that is read; use \.jsonl, \.json, \.txt"),
        ("empty", r"empty: the folder holds no \.jsonl"),
        ("rows.parquet.gz", r"not a kind of file that is read"),
    ],
)
def test_an_input_that_cannot_be_meant_is_refused(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    for name in ("korean.jsonl", "notes.doc", "rows.parquet.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        expand_inputs([str(tmp_path / given)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl:2: not a JSON object: .*; fix it or --skip-bad"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not a JSON object"),
        (b'["text"]', r"a\.jsonl:2: a list, not a JSON object with 'text'"),
        (b'{"text": 3}', r"a\.jsonl:2: 'text' holds a int, not text"),
        (b'{"text": null}', r"a\.jsonl:2: 'text' holds a NoneType, not text"),
        (b'{"texts": "x", "n": 1}', r"no field 'text'; --text-key takes .*: texts$"),
        (b'{"body": "x", "n": 1}', r"no field 'text'; --text-key takes .*: body, n$"),
    ],
)
def test_a_bad_line_is_named_or_left_out(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    with pytest.raises(DataError, match=message):
        read(path)
    bad: list[DataError] = []
    kept = [document.text for document in read_documents(path, "text", bad.append)]
    assert (kept, len(bad)) == (["good", "too"], 1)


def test_an_unknown_parquet_column_names_the_nearest(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), path)
    with pytest.raises(DataError, match=r"no column 'contents'; --text-key takes .*: content$"):
        read(path, "contents")


def test_a_parquet_row_without_text_is_bad(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x", None, "y"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: 'text' holds a NoneType, not text"):
        read(path)


def test_a_text_file_that_is_not_utf8_is_bad(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("가나".encode("cp949"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 0; convert it or --skip-bad"):
        read(path)
