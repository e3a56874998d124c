"""What a text costs a model: loss a token, perplexity, bits a byte.

Shapes: T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from data_prep.files import raise_error, read_documents
from data_prep.tokenizer import Tokenizer
from megamoe.errors import DataError
from megamoe.generate.inputs import shard_prefix
from megamoe.mcore.data import Windows, read_tokens
from megamoe.mcore.inference import TrainedModel

_TOKENS_AT_ONCE = 2_048
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Tokens of one file; documents follow one another, each with its end token."""

    name: str
    tokens: NDArray[numpy.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the tokens of a text cost that were predicted: all but the first of all, or of each document."""

    name: str
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
        """Return bits per byte of text, which does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.num_bytes


def read_texts(
    files: list[Path], tokenizer: Tokenizer, *, text_key: str, max_tokens: int
) -> Iterator[Text]:
    """Yield the text of each file: a shard (PREFIX.bin), or text that is tokenised here.

    Args:
        files: as `find_texts` gives them.
        tokenizer: of the model.
        text_key: field of a JSON line that holds the text.
        max_tokens: how many are read of each at most, and one more to predict.

    Raises:
        DataError: a file is malformed, or too short to predict anything.
    """
    for file in files:
        if prefix := shard_prefix(file):
            tokens_T = read_tokens(prefix, max_tokens)
        else:
            tokens_T = _tokenize(file, tokenizer, text_key, max_tokens)
        yield _checked(str(file), tokens_T, tokenizer)


def cost_of(text: Text, model: TrainedModel, tokenizer: Tokenizer) -> Cost:
    """Return what a text costs, in windows as those of held-out text during training.

    Where documents were masked, they are here, and their first tokens are not predicted.

    Raises:
        DataError: no token is predicted.
    """
    seq_len = model.segment.seq_len
    end_id = tokenizer.meta.eod_id if model.segment.document_mask else None
    predicted = text.tokens[1:]
    if end_id is not None:
        predicted = predicted[text.tokens[:-1] != end_id]
    if not len(predicted):
        raise DataError(
            f"{text.name}: holds no document of 2 tokens; they are needed to predict one"
        )
    windows = Windows(text.tokens, seq_len, tokenizer.meta.pad_id, end_id)
    at_once = max(1, _TOKENS_AT_ONCE // seq_len)
    nats = 0.0
    for batch in windows.micro_batches(-(-windows.num_windows // at_once), at_once):
        nats += float(model.token_losses(batch).double().sum())
    return Cost(
        name=text.name,
        tokens=len(predicted),
        nats=nats,
        num_bytes=_num_bytes(predicted, tokenizer),
    )


def _tokenize(
    file: Path, tokenizer: Tokenizer, text_key: str, max_tokens: int
) -> NDArray[numpy.int64]:
    ids: list[int] = []
    for document in read_documents(file, text_key, raise_error):
        if document.text:
            ids += [*tokenizer.encode(document.text), tokenizer.meta.eod_id]
        if len(ids) > max_tokens:
            break
    return numpy.array(ids[: max_tokens + 1], dtype=numpy.int64)


def _checked(name: str, tokens_T: NDArray[numpy.int64], tokenizer: Tokenizer) -> Text:
    if len(tokens_T) < 2:
        raise DataError(f"{name}: holds {len(tokens_T)} tokens; 2 are needed to predict one")
    if (largest := int(tokens_T.max())) >= tokenizer.meta.vocab_size:
        raise DataError(
            f"{name}: holds token {largest:,}, the tokenizer has {tokenizer.meta.vocab_size:,}; "
            "give text, or a shard of the same tokenizer"
        )
    return Text(name=name, tokens=tokens_T)


def _num_bytes(tokens_T: NDArray[numpy.int64], tokenizer: Tokenizer) -> int:
    """Return the bytes that tokens spell, without a character that is cut off at either end."""
    special = tokenizer.meta.special_tokens
    spelt = [token for token in tokens_T.tolist() if token not in special]
    return len(tokenizer.decode(spelt).strip(_NO_CHARACTER).encode())
