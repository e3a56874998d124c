"""The manifest: read back as written, replaced whole, never half."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from data_prep.manifest import (
    Manifest,
    Shard,
    SourceShards,
    TokenizerEntry,
    locked,
    read_manifest,
    write_atomically,
    write_manifest,
)
from megamoe.errors import DataError

TOKENIZER = TokenizerEntry(
    algorithm="byte-level-bpe", vocab_size=300, eod_id=2, pad_id=0, sha256="aa", file="t.json"
)


def shard(prefix: str) -> Shard:
    return Shard(
        prefix=prefix, documents=2, tokens=10, bytes_text=30, sha256_bin="b", sha256_idx="c"
    )


MANIFEST = Manifest(
    tokenizer=TOKENIZER,
    sources={
        "korean": SourceShards(train=shard("korean"), heldout=shard("korean.heldout"), fim=None)
    },
)


def test_a_manifest_is_read_as_it_was_written_from_the_folder_or_the_file(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert read_manifest(tmp_path / "manifest.json") == MANIFEST


def test_the_file_has_the_agreed_layout(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    shard_fields = {
        "prefix": "korean",
        "documents": 2,
        "tokens": 10,
        "bytes_text": 30,
        "sha256_bin": "b",
        "sha256_idx": "c",
    }
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "format": 1,
        "tokenizer": {
            "algorithm": "byte-level-bpe",
            "vocab_size": 300,
            "eod_id": 2,
            "pad_id": 0,
            "sha256": "aa",
            "file": "t.json",
        },
        "sources": {
            "korean": {
                "train": shard_fields,
                "heldout": {**shard_fields, "prefix": "korean.heldout"},
                "fim": None,
            }
        },
    }


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not a data folder .*'megamoe data tokenize'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a manifest of tokenised data"),
        ("[]", "not a manifest of tokenised data"),
        ('{"format": 2}', "format 2 is not known; tokenize anew"),
        ('{"format": 1, "tokenizer": {}, "sources": {}}', "not a manifest of tokenised data"),
    ],
)
def test_a_broken_manifest_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_source_must_have_a_train_shard(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    path = tmp_path / "manifest.json"
    fields = json.loads(path.read_text())
    fields["sources"]["korean"]["train"] = None
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="not a manifest of tokenised data: KeyError"):
        read_manifest(tmp_path)


def test_a_failure_before_the_rename_keeps_the_former_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"former")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def add_sources(folder: Path, names: list[str]) -> None:
    for name in names:
        with locked(folder):
            manifest = read_manifest(folder)
            entry = SourceShards(train=shard(name), heldout=None, fim=None)
            sources = {**manifest.sources, name: entry}
            write_manifest(folder, Manifest(tokenizer=TOKENIZER, sources=sources))


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    write_manifest(tmp_path, Manifest(tokenizer=TOKENIZER, sources={}))
    context = multiprocessing.get_context("fork")
    lists = [[f"{letter}{number}" for number in range(20)] for letter in "ab"]
    processes = [context.Process(target=add_sources, args=(tmp_path, names)) for names in lists]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert set(read_manifest(tmp_path).sources) == {*lists[0], *lists[1]}
