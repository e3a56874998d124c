"""Tokenizers lose nothing, have exactly the wished size, and come out the same each time."""

import json
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import ALGORITHMS
from data_prep.files import raise_error, read_documents
from data_prep.sample_corpus import CORPORA, SAMPLE_FOLDER
from data_prep.tokenizer import (
    MODEL_NAMES,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    read_meta,
)
from data_prep.tokenizer_train import train_tokenizer
from megamoe.errors import DataError

CODE = "def add(left, right):\n\tif left:\n        return left + right  # 더하기\n\n\n"
KOREAN = "동해물과 백두산이 마르고 닳도록 하느님이 보우하사 우리나라 만세. 값은 12,345원이다.\n"
ENGLISH = "The quick brown fox jumps over the lazy dog, and then over 1,024 more of them.\n"
VOCAB_SIZE = 1_200


def sample_texts() -> list[str]:
    """The beginnings of some documents of each sample corpus."""
    texts = []
    for corpus in CORPORA:
        path = SAMPLE_FOLDER / f"{corpus}.jsonl.zst"
        documents = read_documents(path, "text", raise_error)
        texts += [document.text[:2_000] for document in islice(documents, 25)]
    return texts


TEXTS = [f"{KOREAN}{ENGLISH}{CODE}{number}" for number in range(40)]

HARD = [
    "",
    " ",
    "\n\n\n\t\t  \r\n ",
    "    leading and trailing    ",
    "😀👩‍👩‍👧‍👦 한글 뷁 ㅋㅋㅋ 漢字 \u0000 \ufeff \u2028",
    "\u2581 the mark \u2581\u2581 of a space",
    "각 각",  # the same syllable composed and in jamo: neither may be changed
    "".join(SPECIAL_TOKENS) + "<0x41><s></s><unk>",
    "ﬁ ① ½ Å",  # NFKC would change all of these
    CODE,
    KOREAN,
    ENGLISH,
]


@cache
def folder_of(root: Path, algorithm: str) -> Path:
    out = root / algorithm
    train_tokenizer(algorithm, VOCAB_SIZE, sample_texts(), out)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(params=ALGORITHMS)
def tokenizer(request, root) -> Tokenizer:
    return load_tokenizer(folder_of(root, request.param))


def test_the_command_line_offers_every_algorithm():
    assert tuple(MODEL_NAMES) == ALGORITHMS


@pytest.mark.parametrize("text", HARD)
def test_a_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n▁<|>가")))
)
def test_any_text_comes_back_from_any_tokenizer(root, text):
    for algorithm in ALGORITHMS:
        tokenizer = load_tokenizer_once(folder_of(root, algorithm))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(len(SPECIAL_TOKENS) <= token < VOCAB_SIZE for token in ids)


load_tokenizer_once = cache(load_tokenizer)


def test_text_cannot_spell_a_special_token(tokenizer):
    for token in SPECIAL_TOKENS:
        assert min(tokenizer.encode(f"a{token}b")) >= len(SPECIAL_TOKENS)


def test_special_tokens_are_spelt_out_when_decoded(tokenizer):
    ids = [4, *tokenizer.encode("가 b"), 7, 2]
    assert tokenizer.decode(ids) == "<|fim_prefix|>가 b<|fim_eod|><|eod|>"


def test_the_meta_file_says_what_the_model_is(tokenizer):
    meta = tokenizer.meta
    assert (meta.pad_id, meta.bos_id, meta.eod_id) == (0, 1, 2)
    assert (meta.fim.prefix, meta.fim.middle, meta.fim.suffix, meta.fim.eod) == (4, 5, 6, 7)
    assert meta.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_meta_file_of_a_trained_tokenizer_is_of_format_1(root, algorithm):
    fields = json.loads((folder_of(root, algorithm) / "tokenizer_meta.json").read_text())
    names = "format algorithm vocab_size eod_id pad_id bos_id fim sha256 file"
    assert list(fields) == names.split()
    assert fields["format"] == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_model_itself_has_the_size_and_the_special_tokens(root, algorithm):
    folder = folder_of(root, algorithm)
    if algorithm == "byte-level-bpe":
        vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        names = sorted(vocab, key=vocab.get)
    else:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        names = [model.id_to_piece(token) for token in range(model.vocab_size())]
    assert tuple(names[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS
    assert len(set(names)) == len(names) == VOCAB_SIZE


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_twice_gives_the_same_bytes(tmp_path, algorithm):
    metas = [train_tokenizer(algorithm, 1_000, sample_texts(), tmp_path / name) for name in "ab"]
    assert metas[0] == metas[1]
    model = MODEL_NAMES[algorithm]
    assert (tmp_path / "a" / model).read_bytes() == (tmp_path / "b" / model).read_bytes()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_too_little_text_names_a_size_that_works(tmp_path, algorithm):
    with pytest.raises(DataError, match=r"enough for a vocabulary of \d+, not 5000") as caught:
        train_tokenizer(algorithm, 5000, TEXTS, tmp_path)
    possible = int(str(caught.value).split("vocabulary of ")[1].split(",")[0])
    assert train_tokenizer(algorithm, possible, TEXTS, tmp_path).vocab_size == possible


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_vocabulary_must_hold_more_than_the_bytes(tmp_path, algorithm):
    with pytest.raises(DataError, match=r"--vocab-size 264 leaves nothing to learn; use more"):
        train_tokenizer(algorithm, 264, TEXTS, tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_a_vocabulary_smaller_than_the_alphabet_names_a_size_that_works(tmp_path, algorithm):
    syllables = ["".join(chr(0xAC00 + code) for code in range(500)) * 40] * 2
    with pytest.raises(DataError, match=r"characters of this text need; use more than") as caught:
        train_tokenizer(algorithm, 300, syllables, tmp_path)
    least = int(str(caught.value).split("more than ")[1].split(",")[0]) + 1
    assert train_tokenizer(algorithm, least, syllables, tmp_path).vocab_size == least


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(tmp_path, algorithm, texts):
    with pytest.raises(DataError, match="the input holds no text to train a tokenizer on"):
        train_tokenizer(algorithm, 300, texts, tmp_path)


def test_a_line_longer_than_sentencepiece_allows_is_learnt_from(tmp_path):
    texts = ["가나다라마바사 아자차카타파하 " * 60_000]
    assert train_tokenizer("sentencepiece-bpe", 300, texts, tmp_path).vocab_size == 300


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not a tokenizer folder .*'megamoe data tokenizer train'"):
        read_meta(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"fim": {"x": 1}}'])
def test_a_broken_meta_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer_meta.json").write_text(content)
    with pytest.raises(DataError, match="not the meta file of a tokenizer"):
        read_meta(tmp_path)


def test_a_meta_file_of_another_format_is_refused(tmp_path):
    train_tokenizer("byte-level-bpe", 300, TEXTS, tmp_path)
    path = tmp_path / "tokenizer_meta.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="format 2 of byte-level-bpe is not known; train or im"):
        read_meta(tmp_path)


def test_a_changed_or_missing_model_is_refused(tmp_path):
    train_tokenizer("byte-level-bpe", 300, TEXTS, tmp_path)
    model = tmp_path / "tokenizer.json"
    model.write_text(model.read_text() + " ")
    with pytest.raises(DataError, match=r"not the file tokenizer_meta\.json was written for"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(DataError, match="the tokenizer's model file is missing"):
        load_tokenizer(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/tok: cannot be written: Not a directory"):
        train_tokenizer("byte-level-bpe", 300, TEXTS, tmp_path / "file" / "tok")
