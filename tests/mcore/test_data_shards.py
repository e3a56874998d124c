"""Shards are Megatron's own files, byte for byte, and Megatron reads them back."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from data_prep.shards import ShardWriter, read_document, token_dtype

LENGTHS = (1, 63, 100, 2, 4_097)


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    with warnings.catch_warnings():
        # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def documents(vocab_size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, vocab_size, length, dtype=np.int32) for length in LENGTHS]


def write(prefix: Path, vocab_size: int) -> None:
    with ShardWriter(prefix, vocab_size) as writer:
        for tokens_T in documents(vocab_size):
            writer.add(tokens_T)
        files = writer.finish()
    assert (files.documents, files.tokens) == (len(LENGTHS), sum(LENGTHS))


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 163_840])
def test_both_files_equal_those_of_megatron(megatron, tmp_path, vocab_size):
    write(tmp_path / "ours", vocab_size)
    dtype = megatron.DType.optimal_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for tokens_T in documents(vocab_size):
        builder.add_document(torch.from_numpy(tokens_T), [len(tokens_T)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert token_dtype(vocab_size) == np.dtype(dtype).name
    for ending in ("bin", "idx"):
        ours, theirs = tmp_path / f"ours.{ending}", tmp_path / f"theirs.{ending}"
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("vocab_size", [300, 163_840])
def test_megatron_and_we_read_the_documents_back(megatron, tmp_path, vocab_size):
    write(tmp_path / "shard", vocab_size)
    dataset = megatron.IndexedDataset(str(tmp_path / "shard"))
    assert len(dataset) == len(LENGTHS)
    assert dataset.document_indices.tolist() == list(range(len(LENGTHS) + 1))
    for number, tokens_T in enumerate(documents(vocab_size)):
        assert dataset[number].tolist() == tokens_T.tolist()
        assert read_document(tmp_path / "shard", number) == tokens_T.tolist()


def test_a_shard_without_documents_is_megatrons_too(megatron, tmp_path):
    with ShardWriter(tmp_path / "ours", 300) as writer:
        writer.finish()
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
