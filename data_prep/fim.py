"""Fill-in-the-middle form of a document: SPM "variant 2" (Bavarian et al. 2022, appendix D).

    <|fim_prefix|><|fim_suffix|> suffix <|fim_middle|> prefix middle <|fim_eod|>

Prefix, middle and suffix are the document cut at two places, chosen between characters for text
and between words or lines for code (VAETKI, section 3.2). The three parts are encoded apart, as
they are when a trained model is asked to fill a gap.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from data_prep.tokenizer import Tokenizer

# A line's start, or the end of a word: indentation stays with the line it belongs to.
_CODE_CUT = re.compile(r"(?<=\n)|(?<=\S)(?=\s)")


@dataclass(frozen=True, slots=True)
class Parts:
    """A document cut in three; the middle is never empty."""

    prefix: str
    middle: str
    suffix: str


def cut_text(text: str, seed: int) -> Parts:
    """Cuts between any two characters, every pair of places equally likely.

    The choice depends on the seed and the text alone.
    """
    return _cut(text, _generator(text, seed).sample(range(len(text) + 1), 2))


def cut_code(text: str, seed: int) -> Parts:
    """Cuts at starts of lines and ends of words, every pair of places equally likely."""
    inner = {match.start() for match in _CODE_CUT.finditer(text)}
    places = sorted(inner | {0, len(text)})
    return _cut(text, _generator(text, seed).sample(places, 2))


def encode_parts(tokenizer: Tokenizer, parts: Parts) -> list[int]:
    """Tokens of the parts in the order of variant 2, with the special tokens that there are."""
    fim = tokenizer.meta.fim
    assert fim is not None, tokenizer.meta
    return [
        fim.prefix,
        fim.suffix,
        *tokenizer.encode(parts.suffix),
        fim.middle,
        *tokenizer.encode(parts.prefix),
        *tokenizer.encode(parts.middle),
        *([] if fim.eod is None else [fim.eod]),
    ]


def _generator(text: str, seed: int) -> random.Random:
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "little"))
    return random.Random(digest.digest())


def _cut(text: str, places: list[int]) -> Parts:
    first, second = sorted(places)
    return Parts(text[:first], text[first:second], text[second:])
