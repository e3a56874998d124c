"""What a text costs a model: loss a token, perplexity, bits a byte.

A text is read document by document, and its windows are forgotten as they are done: memory depends on
the longest document and not on the text.

Shapes: T tokens.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy
from numpy.typing import NDArray

from data_prep.files import raise_error, read_documents
from data_prep.tokenizer import Tokenizer
from megamoe.errors import DataError
from megamoe.generate.inputs import shard_prefix
from megamoe.mcore.data import Windows, shard_documents
from megamoe.mcore.inference import TrainedModel

Tokens = NDArray[numpy.int32]

_TOKENS_AT_ONCE = 2_048
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A file's documents, read as they are asked for; each is its tokens with the end token."""

    name: str
    documents: Iterable[Tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the tokens of a text cost that were predicted: all but the first of all, or of each document."""

    tokens: int
    nats: float
    num_bytes: int  # of the text that these tokens spell

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return e to the loss."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Return bits per byte of text, which does not depend on the tokenizer; inf: it spells none."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.inf


def sum_of(costs: list[Cost]) -> Cost:
    """Return what texts cost together: a token weighs the same in each."""
    return Cost(
        tokens=sum(cost.tokens for cost in costs),
        nats=math.fsum(cost.nats for cost in costs),
        num_bytes=sum(cost.num_bytes for cost in costs),
    )


def read_text(file: Path, tokenizer: Tokenizer, *, text_key: str, max_tokens: int) -> Text:
    """Return the text of a file: a shard (PREFIX.bin), or text that is tokenised here.

    Args:
        file: as `find_texts` gives it.
        tokenizer: of the model.
        text_key: field of a JSON line that holds the text.
        max_tokens: how many are read at most, and one more to predict.
    """
    if prefix := shard_prefix(file):
        documents = shard_documents(prefix)
    else:
        documents = _tokenize(file, tokenizer, text_key)
    return Text(name=str(file), documents=_first(documents, max_tokens + 1))


def cost_of(text: Text, model: TrainedModel, tokenizer: Tokenizer) -> Cost:
    """Return what a text costs, in windows as those of held-out text during training.

    Where documents were masked, they are here, and their first tokens are not predicted.

    Raises:
        DataError: a file is malformed, holds a token that is none, or none to predict.
    """
    end_id = tokenizer.meta.eod_id if model.segment.document_mask else None
    count = _Count(text.name, tokenizer, end_id)
    seq_len = model.segment.seq_len
    at_once = max(1, _TOKENS_AT_ONCE // seq_len)
    nats = 0.0
    for part_T in _parts(map(count.add, text.documents), at_once * seq_len):
        windows = Windows(part_T, seq_len, tokenizer.meta.pad_id, end_id)
        for batch in windows.micro_batches(1, at_once):
            nats += float(model.token_losses(batch).double().sum())
    return count.cost(nats)


class _Count:
    """Counts of the documents that pass through: tokens, those predicted, the bytes they spell."""

    def __init__(self, name: str, tokenizer: Tokenizer, end_id: int | None) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._last: int | None = None
        self._tokens = 0
        self._predicted = 0
        self._num_bytes = 0

    def add(self, document_T: Tokens) -> Tokens:
        vocab_size = self._tokenizer.meta.vocab_size
        if (largest := int(document_T.max())) >= vocab_size:
            raise DataError(
                f"{self._name}: holds token {largest:,}, the tokenizer has {vocab_size:,}; "
                "give text, or a shard of the same tokenizer"
            )
        predicted_T = numpy.ones(len(document_T), dtype=bool)
        if self._end_id is not None:
            predicted_T[1:] = document_T[:-1] != self._end_id
        predicted_T[0] = self._last is not None and self._last != self._end_id
        self._last = int(document_T[-1])
        self._tokens += len(document_T)
        self._predicted += int(predicted_T.sum())
        self._num_bytes += self._bytes(document_T, predicted_T)
        return document_T

    def cost(self, nats: float) -> Cost:
        if self._tokens < 2:
            raise DataError(
                f"{self._name}: holds {self._tokens} tokens; 2 are needed to predict one"
            )
        if not self._predicted:
            raise DataError(
                f"{self._name}: holds no document of 2 tokens; they are needed to predict one"
            )
        return Cost(tokens=self._predicted, nats=nats, num_bytes=self._num_bytes)

    def _bytes(self, document_T: Tokens, predicted_T: NDArray[numpy.bool]) -> int:
        """Return the bytes that tokens spell, without a character that is cut off at either end."""
        special = self._tokenizer.meta.special_tokens
        before = [] if predicted_T[0] else document_T[:1].tolist()
        tokens = document_T[predicted_T].tolist()
        text = ""
        for is_special, run in groupby(tokens, special.__contains__):
            text += "" if is_special else self._tokenizer.decode_after(before, list(run))
            before = []
        if not predicted_T[0]:
            text = text.lstrip(_NO_CHARACTER)
        if self._last != self._tokenizer.meta.eod_id:
            text = text.rstrip(_NO_CHARACTER)
        return len(text.encode())


def _tokenize(file: Path, tokenizer: Tokenizer, text_key: str) -> Iterator[Tokens]:
    for document in read_documents(file, text_key, raise_error):
        if document.text:
            ids = [*tokenizer.encode(document.text), tokenizer.meta.eod_id]
            yield numpy.array(ids, dtype=numpy.int32)


def _first(documents: Iterable[Tokens], count: int) -> Iterator[Tokens]:
    """Yield the first tokens, in documents; none is empty."""
    for document_T in documents:
        if len(document_T):
            yield document_T[:count]
        count -= len(document_T)
        if count <= 0:
            return


def _parts(documents: Iterable[Tokens], size: int) -> Iterator[Tokens]:
    """Yield a text in parts that predict `size` tokens; each begins with the last of the one before."""
    held: list[Tokens] = []
    count = 0
    for document_T in documents:
        held.append(document_T)
        count += len(document_T)
        if count <= size:
            continue
        text_T = numpy.concatenate(held)
        while len(text_T) > size:
            yield text_T[: size + 1]
            text_T = text_T[size:]
        held, count = [text_T.copy()], len(text_T)
    if count > 1:
        yield numpy.concatenate(held)
