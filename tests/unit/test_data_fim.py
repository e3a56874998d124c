"""Fill-in-the-middle documents: a reordering of the text, cut where it should be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.fim import cut_code, cut_text, encode_parts
from data_prep.tokenizer import SPECIAL_TOKENS, FimIds, Tokenizer, TokenizerMeta

CODE = "def f(a,  b):\n    if a:\n\treturn b\n\n\nclass X:\n    pass\n"


class LetterCodec:
    """A letter is its code point plus ten."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) + 10 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token - 10) for token in ids)


LETTERS = Tokenizer(
    TokenizerMeta(
        format=1,
        algorithm="byte-level-bpe",
        vocab_size=400,
        eod_id=2,
        pad_id=0,
        bos_id=1,
        fim=FimIds(prefix=4, middle=5, suffix=6, eod=7),
        sha256="",
        file="",
        special_tokens=dict(enumerate(SPECIAL_TOKENS)),
    ),
    LetterCodec(),
)


@pytest.mark.parametrize("cut", [cut_text, cut_code])
@given(text=st.text(min_size=1), seed=st.integers(0, 2**63 - 1))
def test_the_parts_put_together_are_the_text_and_the_middle_is_not_empty(cut, text, seed):
    parts = cut(text, seed)
    assert parts.prefix + parts.middle + parts.suffix == text
    assert parts.middle
    assert cut(text, seed) == parts


def test_the_order_is_variant_2():
    parts = cut_text("abcdefgh", 3)
    assert LETTERS.decode(encode_parts(LETTERS, parts)) == (
        f"<|fim_prefix|><|fim_suffix|>{parts.suffix}<|fim_middle|>{parts.prefix}{parts.middle}"
        "<|fim_eod|>"
    )


def test_every_pair_of_places_in_a_text_is_chosen():
    found = {(parts.prefix, parts.middle) for parts in (cut_text("abc", s) for s in range(400))}
    assert len(found) == 6  # pairs out of four places


def test_code_is_cut_at_starts_of_lines_and_ends_of_words_only():
    for seed in range(300):
        parts = cut_code(CODE, seed)
        assert allowed(parts.prefix, parts.middle + parts.suffix)
        assert allowed(parts.prefix + parts.middle, parts.suffix)


def allowed(before: str, after: str) -> bool:
    if not before or not after or before.endswith("\n"):
        return True
    return not before[-1].isspace() and after[0].isspace()


def test_the_seed_and_the_text_move_the_cuts():
    assert len({cut_text("a" * 1000, seed).prefix for seed in range(20)}) > 15
    assert len({len(cut_text(f"{number:03}" * 300, 1).prefix) for number in range(20)}) > 15
