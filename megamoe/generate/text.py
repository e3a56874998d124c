"""Tokens after a prompt, and the text that they spell as they come."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from data_prep.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character
_LONGEST_CHARACTER = 4  # bytes in UTF-8, so as many tokens at most


def following(
    prompt: list[int],
    step: Callable[[list[int]], Tensor],
    choose: Callable[[Tensor], int],
    *,
    max_tokens: int,
    end: int,
) -> Iterator[int]:
    """Yield the tokens after a prompt, until the end token, which is not yielded.

    Args:
        prompt: at least one token.
        step: takes the tokens that are new and returns the logits of the one after them.
        choose: takes the logits and returns a token.
        max_tokens: how many are yielded at most.
        end: the token that ends a document.
    """
    new = prompt
    for _ in range(max_tokens):
        token = choose(step(new))
        if token == end:
            return
        yield token
        new = [token]


class TextStream:
    """Text of tokens one after another; a character that several tokens spell comes as a whole."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """Begin after the tokens `before`; they settle whether a first space is text."""
        self._tokenizer = tokenizer
        self._before = list(before)
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that is certain now; empty within a character."""
        self._waiting.append(token)
        text = self._tokenizer.decode_after(self._before, self._waiting)
        # A model may also have learnt the letter that stands for bytes that are none.
        is_cut = text.endswith(_INCOMPLETE) and self._tokenizer.encode(text) != self._waiting
        if is_cut and len(self._waiting) < _LONGEST_CHARACTER:
            return ""
        if not is_cut:
            # Tokens that spell nothing by themselves do not show that something came before.
            kept = [] if self._tokenizer.decode(self._waiting) else self._before
            self._before = kept + self._waiting
        self._waiting = []
        return text

    def finish(self) -> str:
        """Return what is left: bytes that are no character."""
        text = self._tokenizer.decode_after(self._before, self._waiting)
        self._waiting = []
        return text
