"""Trains a tokenizer of exactly the wished size on a user's documents."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.tokenizer import (
    MODEL_NAMES,
    SPECIAL_TOKENS,
    TokenizerMeta,
    trained_meta,
    write_tokenizer,
)
from megamoe.errors import DataError

# 256 bytes and the special tokens, before anything is learnt.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Longest piece of a line given to SentencePiece, which refuses sentences over its limit in bytes.
_MAX_LINE_CHARACTERS = 100_000
_MAX_LINE_BYTES = 4 * _MAX_LINE_CHARACTERS
# Unigram's sums depend on the number of threads: fixed, so that the model does not depend on the
# machine.
_NUM_THREADS = 4


def train_tokenizer(
    algorithm: str, vocab_size: int, texts: Iterable[str], out: Path
) -> TokenizerMeta:
    """Trains on `texts`, writes the tokenizer folder `out` and returns its meta data.

    The same texts in the same order give the same bytes.

    Raises:
        DataError: The texts cannot fill the vocabulary, or `vocab_size` is too small.
    """
    assert algorithm in MODEL_NAMES, algorithm
    if vocab_size <= MIN_VOCAB_SIZE:
        raise DataError(
            f"--vocab-size {vocab_size} leaves nothing to learn; use more than {MIN_VOCAB_SIZE},"
            " which bytes and special tokens take"
        )
    if algorithm == "byte-level-bpe":
        model = _train_byte_level(vocab_size, _not_empty(texts))
    else:
        kind = algorithm.removeprefix("sentencepiece-")
        model = _train_sentencepiece(kind, vocab_size, _not_empty(texts))
    meta = trained_meta(algorithm, vocab_size, model)
    write_tokenizer(out, meta, model)
    return meta


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise DataError("the input holds no text to train a tokenizer on; give more files")


def _train_byte_level(vocab_size: int, texts: Iterator[str]) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt != vocab_size:
        raise _too_little_text(vocab_size, learnt)
    model: str = tokenizer.to_str(pretty=True)
    return model.encode()


def _train_sentencepiece(kind: str, vocab_size: int, texts: Iterator[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            control_symbols=list(SPECIAL_TOKENS[4:]),
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=_NUM_THREADS,
            minloglevel=2,
            pad_id=0,
            pad_piece=SPECIAL_TOKENS[0],
            bos_id=1,
            bos_piece=SPECIAL_TOKENS[1],
            eos_id=2,
            eos_piece=SPECIAL_TOKENS[2],
            unk_id=3,
            unk_piece=SPECIAL_TOKENS[3],
        )
    except (RuntimeError, OSError) as error:
        raise _sentencepiece_error(vocab_size, str(error)) from error
    return model.getvalue()


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Lines of bounded length; the line break itself is a token of its own."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                yield line[start : start + _MAX_LINE_CHARACTERS]


def _sentencepiece_error(vocab_size: int, message: str) -> DataError:
    """SentencePiece's own words turned into what the user can do."""
    if too_large := re.search(r"value <= (\d+)", message):
        return _too_little_text(vocab_size, int(too_large[1]))
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"--vocab-size {vocab_size} is less than the characters of this text need; use more"
            f" than {too_small[1]}, or byte-level-bpe"
        )
    return DataError(f"SentencePiece could not train: {' '.join(message.split())}")


def _too_little_text(vocab_size: int, learnt: int) -> DataError:
    return DataError(
        f"the text is enough for a vocabulary of {learnt}, not {vocab_size}; use --vocab-size"
        f" {learnt} or less, or give more text"
    )
