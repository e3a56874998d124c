"""A data folder: what goes into its shards, and what a failure leaves behind."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.files import Document
from data_prep.manifest import Shard, read_manifest
from data_prep.shards import read_document
from data_prep.tokenize import Job, Outcome, is_held_out, tokenize_source
from data_prep.tokenizer import load_tokenizer
from data_prep.tokenizer_train import train_tokenizer
from megamoe.errors import DataError

TEXTS = [f"문서 {number}: def f(x):\n\treturn x + {number}\n" for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer("byte-level-bpe", 280, TEXTS, folder)
    return folder


@pytest.fixture
def job(tokenizer, tmp_path) -> Job:
    return Job(
        tokenizer=tokenizer,
        source="korean",
        out=tmp_path / "data",
        heldout=0.1,
        fim="text",
        seed=1234,
        workers=1,
        replaces=False,
    )


def run(job: Job, texts: list[str] = TEXTS) -> Outcome:
    return tokenize_source(job, (Document(text, "here") for text in texts), lambda *_: None)


def decoded(folder: Path, shard: Shard) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    return [
        tokenizer.decode(read_document(folder / shard.prefix, number))
        for number in range(shard.documents)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_train_and_heldout_together_are_the_documents_in_order_each_with_its_end(job):
    shards = run(job).shards
    train, heldout = decoded(job.out, shards.train), decoded(job.out, shards.heldout)
    assert train == [f"{text}<|eod|>" for text in TEXTS if not is_held_out(text, 0.1)]
    assert heldout == [f"{text}<|eod|>" for text in TEXTS if is_held_out(text, 0.1)]
    assert heldout
    assert not set(train) & set(heldout)


def test_equal_texts_go_the_same_way_whatever_the_source(job):
    first = run(job, TEXTS + TEXTS).shards
    second = run(replace(job, source="other"), TEXTS[::-1]).shards
    assert first.heldout.documents == 2 * second.heldout.documents
    assert not set(decoded(job.out, first.train)) & set(decoded(job.out, second.heldout))


def test_about_the_wished_share_is_held_out_and_a_larger_share_holds_more_of_the_same():
    texts = [f"{number}" for number in range(20_000)]
    few = {text for text in texts if is_held_out(text, 0.03)}
    # 600 are expected, with a standard deviation of 24; the hash is fixed, so is the count.
    assert abs(len(few) - 600) < 4 * 24
    assert few < {text for text in texts if is_held_out(text, 0.05)}


@pytest.mark.parametrize("rule", ["text", "code"])
def test_the_fim_shard_holds_the_training_documents_reordered(job, rule):
    shards = run(replace(job, fim=rule)).shards
    for plain, fim in zip(
        decoded(job.out, shards.train), decoded(job.out, shards.fim), strict=True
    ):
        start, rest = fim.split("<|fim_suffix|>")
        suffix, before = rest.split("<|fim_middle|>")
        assert start == "<|fim_prefix|>"
        assert before.endswith("<|fim_eod|><|eod|>")
        assert before.removesuffix("<|fim_eod|><|eod|>") + suffix + "<|eod|>" == plain
    assert shards.fim.bytes_text == shards.train.bytes_text


def test_the_manifest_says_what_the_files_hold(job):
    outcome = run(job)
    fields = json.loads((job.out / "manifest.json").read_text())
    meta = json.loads((job.out / "tokenizer" / "tokenizer_meta.json").read_text())
    names = ("algorithm", "vocab_size", "eod_id", "pad_id", "sha256", "file")
    assert fields["format"] == 1
    assert fields["tokenizer"] == {name: meta[name] for name in names}
    assert read_manifest(job.out).sources == {"korean": outcome.shards}
    for shard in fields["sources"]["korean"].values():
        for ending in ("bin", "idx"):
            raw = (job.out / f"{shard['prefix']}.{ending}").read_bytes()
            assert hashlib.sha256(raw).hexdigest() == shard[f"sha256_{ending}"]
        assert (job.out / f"{shard['prefix']}.bin").stat().st_size == 2 * shard["tokens"]
    train = fields["sources"]["korean"]["train"]
    kept = [text for text in TEXTS if not is_held_out(text, 0.1)]
    assert train["bytes_text"] == sum(len(text.encode()) for text in kept)
    assert train["documents"] == len(kept)


def test_what_was_not_asked_for_is_null(job):
    run(replace(job, heldout=None, fim=None))
    source = json.loads((job.out / "manifest.json").read_text())["sources"]["korean"]
    assert (source["heldout"], source["fim"]) == (None, None)
    assert source["train"]["documents"] == len(TEXTS)


def test_the_number_of_workers_and_the_batches_do_not_change_a_byte(job, tmp_path):
    texts = TEXTS * 8
    run(job, texts)
    run(replace(job, out=tmp_path / "two", workers=2), texts)
    assert contents(job.out) == contents(tmp_path / "two")


def test_empty_documents_are_left_out_and_counted(job):
    outcome = run(replace(job, heldout=None), ["", "a", " \n\t", "b"])
    assert (outcome.empty, outcome.shards.train.documents) == (2, 2)


def test_several_sources_build_one_folder(job):
    run(job)
    before = contents(job.out)
    run(replace(job, source="code", fim="code"), TEXTS[::2])
    assert set(read_manifest(job.out).sources) == {"code", "korean"}
    after = contents(job.out)
    assert all(after[name] == raw for name, raw in before.items() if name != "manifest.json")


def test_another_tokenizer_is_refused(job, tmp_path):
    run(job)
    train_tokenizer("byte-level-bpe", 270, TEXTS, tmp_path / "other")
    with pytest.raises(
        DataError, match=r"made with another tokenizer \(byte-level-bpe, 280 ids\); use --tokeni"
    ):
        run(replace(job, source="code", tokenizer=tmp_path / "other"))


def test_a_source_that_is_there_is_refused_or_replaced(job):
    run(job)
    with pytest.raises(DataError, match="source korean is there already; use --replace, or"):
        run(job, TEXTS[:50])
    run(replace(job, replaces=True, heldout=None, fim=None), TEXTS[:50])
    assert read_manifest(job.out).sources["korean"].train.documents == 50
    shards = {name for name in contents(job.out) if name.endswith((".bin", ".idx"))}
    assert shards == {"korean.bin", "korean.idx"}


def die(job: Job, texts: list[str]) -> None:
    os._exit(9)


def broken_after(number: int) -> Iterator[Document]:
    yield from (Document(text, "here") for text in TEXTS[:number])
    raise DataError("line 200 is bad")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_in_the_middle_leaves_the_folder_as_it_was(job, workers):
    run(job)
    before = contents(job.out)
    failing = replace(job, source="code", workers=workers)
    with pytest.raises(DataError, match="line 200 is bad"):
        tokenize_source(failing, broken_after(200), lambda *_: None)
    assert contents(job.out) == before
    with pytest.raises(DataError, match="line 200 is bad"):
        tokenize_source(replace(failing, source="korean", replaces=True), broken_after(200), print)
    assert contents(job.out) == before


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(job, monkeypatch):
    monkeypatch.setattr("data_prep.tokenize._encode_in_worker", die)
    with pytest.raises(DataError, match=r"source korean: a worker process died, .* fewer"):
        run(replace(job, workers=2))
    assert contents(job.out) == {}


def test_a_failure_while_shards_are_put_in_place_leaves_the_former_manifest(job, monkeypatch):
    run(job)
    before = (job.out / "manifest.json").read_bytes()

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_prep.tokenize.sync_folder", disk_full)
    with pytest.raises(DataError, match=r"data: cannot be written: No space left on device"):
        run(replace(job, source="code"))
    assert (job.out / "manifest.json").read_bytes() == before
    assert not [path for path in job.out.iterdir() if path.name.startswith(".code")]


def test_the_order_of_two_calls_does_not_change_the_folder(job, tmp_path):
    for out, sources in ((job.out, ("a", "b")), (tmp_path / "other", ("b", "a"))):
        for source in sources:
            run(replace(job, out=out, source=source))
    assert contents(job.out) == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "a/b"}, "--source 'a/b': use letters, digits, '-' and '_' only"),
        ({"source": "korean.fim"}, "--source 'korean.fim': use letters"),
        ({"heldout": 0.0}, "--heldout 0.0: use a share between 0 and 1"),
        ({"heldout": 1.0}, "--heldout 1.0: use a share between 0 and 1"),
        ({"seed": -1}, "--seed -1: use a number from 0"),
        ({"workers": 0}, "--workers 0: use 1 or more"),
    ],
)
def test_a_job_that_cannot_be_meant_is_refused(job, changes, message):
    with pytest.raises(DataError, match=message):
        replace(job, **changes)


def test_an_input_without_text_is_an_error(job):
    with pytest.raises(DataError, match="source korean: the input holds no document with text"):
        run(job, ["", "  "])
    assert contents(job.out) == {}


def test_a_share_that_leaves_a_shard_empty_is_an_error(job):
    with pytest.raises(DataError, match=r"--heldout 1e-09 of 300 documents leaves heldout empty"):
        run(replace(job, heldout=1e-9))
    with pytest.raises(DataError, match=r"--heldout 0.999999 of 300 documents leaves train empty"):
        run(replace(job, heldout=0.999999))


def test_a_folder_that_is_a_file_is_an_error(job):
    job.out.write_text("")
    with pytest.raises(DataError, match="data: cannot be written: File exists"):
        run(job)


def test_a_broken_manifest_is_not_written_over(job):
    job.out.mkdir()
    (job.out / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="not a manifest of tokenised data"):
        run(job)
