"""The tokenizer of an exported folder is the one that the run's text was made with."""

import importlib.util
from pathlib import Path

import pytest

from data_prep.tokenizer import MODEL_NAMES, load_tokenizer
from data_prep.tokenizer_train import train_tokenizer
from megamoe.convert.tokenizer import compare_tokenizer, copy_tokenizer
from megamoe.plan.plan import Data
from tests.unit.test_data_tokenizer import sample_texts

TEXTS = (
    "동해물과 백두산이 마르고 닳도록",
    "We hold these truths  to be self-evident,\n\n\tthat all men",
    "def add(left, right):\n    return left + right  # 더하기\n",
    "🙂 é e\u0301 ᄒᆞᆯᄊᆡ",
)


def data_with(folder: Path, algorithm: str) -> Data:
    """Return a plan's data with a tokenizer beside it."""
    meta = train_tokenizer(algorithm, 1_000, sample_texts(), folder / "tokenizer")
    return Data(
        folder=str(folder),
        eod_id=meta.eod_id,
        pad_id=meta.pad_id,
        vocab_size=meta.vocab_size,
        heldout=(),
    )


@pytest.mark.parametrize("algorithm", MODEL_NAMES)
def test_transformers_encode_with_an_exported_tokenizer_as_we_do(algorithm, tmp_path):
    for package in ("transformers", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import transformers

    data, out = data_with(tmp_path / "data", algorithm), tmp_path / "out"
    out.mkdir()
    assert copy_tokenizer(data, out).startswith(f"tokenizer: {MODEL_NAMES[algorithm]}")
    ours = load_tokenizer(tmp_path / "data/tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == data.eod_id
    if algorithm == "byte-level-bpe":
        assert theirs.pad_token_id == data.pad_id
    # What documents never are read as, prompts may be: transformers look for special tokens.
    assert theirs("<|eod|>")["input_ids"] == [data.eod_id] != ours.encode("<|eod|>")


def test_an_import_tells_whose_tokenizer_the_run_has(tmp_path):
    data = data_with(tmp_path / "data", "byte-level-bpe")
    folder = tmp_path / "out"
    folder.mkdir()
    assert compare_tokenizer(folder, data) is None
    copy_tokenizer(data, folder)
    assert compare_tokenizer(folder, data).endswith("the same as the folder's")
    assert compare_tokenizer(folder, None).startswith("tokenizer.json of the folder is not taken")
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert "another file than the folder's tokenizer.json" in compare_tokenizer(folder, data)
