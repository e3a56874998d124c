"""A tokenizer folder: the model file, `tokenizer_meta.json`, and encoding and decoding with them.

Both kinds lose nothing: any text comes back from its tokens byte for byte. Special tokens are never
read out of text: a document that spells `<|eod|>` gets the tokens of those seven characters.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from megamoe.errors import DataError

META_NAME = "tokenizer_meta.json"
FORMAT = 1

# A token's id is its place here, whatever the algorithm.
SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eod|>",
    "<|unk|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_eod|>",
)
MODEL_NAMES = {
    "byte-level-bpe": "tokenizer.json",
    "sentencepiece-bpe": "tokenizer.model",
    "sentencepiece-unigram": "tokenizer.model",
}
# SentencePiece writes a space as this letter; the letter itself goes through its three bytes.
_SPACE_MARK = "\u2581"


@dataclass(frozen=True, slots=True, kw_only=True)
class FimIds:
    """Ids of the four fill-in-the-middle tokens."""

    prefix: int
    middle: int
    suffix: int
    eod: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerMeta:
    """What `tokenizer_meta.json` says.

    Args:
        format: Version of the file's layout.
        algorithm: A key of `MODEL_NAMES`.
        vocab_size: Number of ids, special ones included.
        eod_id: Ends every document in a shard.
        pad_id: Fills a sequence; never in a shard.
        bos_id: Reserved; never in a shard.
        fim: The fill-in-the-middle tokens.
        sha256: Of the model file.
        file: Name of the model file beside the meta file.
    """

    format: int
    algorithm: str
    vocab_size: int
    eod_id: int
    pad_id: int
    bos_id: int
    fim: FimIds
    sha256: str
    file: str


class Codec(Protocol):
    """Text to ids and back, special tokens aside."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids, none of them special."""
        ...


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A codec with its meta data."""

    meta: TokenizerMeta
    codec: Codec

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special."""
        return self.codec.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, each special token spelt out."""
        pieces = []
        for is_special, run in groupby(ids, lambda token: token < len(SPECIAL_TOKENS)):
            if is_special:
                pieces += [SPECIAL_TOKENS[token] for token in run]
            else:
                pieces.append(self.codec.decode(list(run)))
        return "".join(pieces)


def write_tokenizer(folder: Path, algorithm: str, vocab_size: int, model: bytes) -> TokenizerMeta:
    """Writes the model and its meta file into `folder` and returns the meta data."""
    meta = TokenizerMeta(
        format=FORMAT,
        algorithm=algorithm,
        vocab_size=vocab_size,
        eod_id=SPECIAL_TOKENS.index("<|eod|>"),
        pad_id=SPECIAL_TOKENS.index("<|pad|>"),
        bos_id=SPECIAL_TOKENS.index("<|bos|>"),
        fim=FimIds(
            prefix=SPECIAL_TOKENS.index("<|fim_prefix|>"),
            middle=SPECIAL_TOKENS.index("<|fim_middle|>"),
            suffix=SPECIAL_TOKENS.index("<|fim_suffix|>"),
            eod=SPECIAL_TOKENS.index("<|fim_eod|>"),
        ),
        sha256=hashlib.sha256(model).hexdigest(),
        file=MODEL_NAMES[algorithm],
    )
    lines = json.dumps(asdict(meta), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The meta file goes last: with it a folder becomes a tokenizer.
        (folder / META_NAME).unlink(missing_ok=True)
        (folder / meta.file).write_bytes(model)
        (folder / META_NAME).write_text(lines, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return meta


def read_meta(folder: Path) -> TokenizerMeta:
    """The meta data of a tokenizer folder, its model file checked.

    Raises:
        DataError: It is not such a folder, or the model is not the one the meta file names.
    """
    path = folder / META_NAME
    if not path.is_file():
        raise DataError(
            f"{folder}: not a tokenizer folder (no {META_NAME}); make one with"
            " 'megamoe data tokenizer train'"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        meta = TokenizerMeta(**{**fields, "fim": FimIds(**fields["fim"])})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the meta file of a tokenizer: {error}") from error
    if meta.format != FORMAT or meta.algorithm not in MODEL_NAMES:
        raise DataError(
            f"{path}: format {meta.format} of {meta.algorithm} is not known; train anew"
        )
    model = folder / meta.file
    if not model.is_file():
        raise DataError(f"{model}: the tokenizer's model file is missing; train anew")
    if hashlib.sha256(model.read_bytes()).hexdigest() != meta.sha256:
        raise DataError(f"{model}: not the file {META_NAME} was written for; train anew")
    return meta


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, ready to encode."""
    meta = read_meta(folder)
    if meta.algorithm == "byte-level-bpe":
        return Tokenizer(meta, _ByteLevelCodec(folder / meta.file))
    return Tokenizer(meta, _SentencePieceCodec(folder / meta.file))


class _ByteLevelCodec:
    def __init__(self, model: Path) -> None:
        import tokenizers

        self._model = tokenizers.Tokenizer.from_file(str(model))
        self._model.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids, skip_special_tokens=False)
        return text


class _SentencePieceCodec:
    def __init__(self, model: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._space_mark = [
            self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
        ]

    def encode(self, text: str) -> list[int]:
        return list(self._ids(text))

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def _ids(self, text: str) -> Iterator[int]:
        first, *others = text.split(_SPACE_MARK)
        yield from self._model.encode(first)
        for part in others:
            yield from self._space_mark
            yield from self._model.encode(part)
