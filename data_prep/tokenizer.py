"""A tokenizer folder: the model file, `tokenizer_meta.json`, and encoding and decoding with them.

Those that are trained here lose nothing: any text comes back from its tokens byte for byte. What an
imported one loses is its own. Special tokens are never read out of text: a document that spells
`<|eod|>` gets the tokens of those seven characters.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from megamoe.errors import DataError

META_NAME = "tokenizer_meta.json"
TRAINED = 1
IMPORTED = 2  # the meta file also lists the special tokens

# Of a tokenizer that is trained here; a token's id is its place here, whatever the algorithm.
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
IMPORTED_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_NAMES = {TRAINED: MODEL_NAMES, IMPORTED: IMPORTED_NAMES}
# SentencePiece writes a space as this letter; the letter itself goes through its three bytes.
_SPACE_MARK = "\u2581"


@dataclass(frozen=True, slots=True, kw_only=True)
class FimIds:
    """Ids of the fill-in-the-middle tokens; most published tokenizers have none of their own for eod."""

    prefix: int
    middle: int
    suffix: int
    eod: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerMeta:
    """What `tokenizer_meta.json` says.

    Args:
        format: `TRAINED` or `IMPORTED`.
        algorithm: A key of `MODEL_NAMES`, or of `IMPORTED_NAMES`.
        vocab_size: Number of ids, special ones included.
        eod_id: Ends every document in a shard.
        pad_id: Fills a sequence; never in a shard.
        bos_id: Reserved; never in a shard.
        fim: The fill-in-the-middle tokens.
        sha256: Of the model file.
        file: Name of the model file beside the meta file.
        special_tokens: What each of them is spelt as, by id; text never becomes one of them.
    """

    format: int
    algorithm: str
    vocab_size: int
    eod_id: int
    pad_id: int
    bos_id: int | None
    fim: FimIds | None
    sha256: str
    file: str
    special_tokens: dict[int, str]


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
        special = self.meta.special_tokens
        pieces = []
        for is_special, run in groupby(ids, special.__contains__):
            if is_special:
                pieces += [special[token] for token in run]
            else:
                pieces.append(self.codec.decode(list(run)))
        return "".join(pieces)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text that ids add to that of the ids before them: many a codec drops a first space."""
        text = self.decode([*before, *ids])
        head = self.decode(before)
        return text[len(head) :] if text.startswith(head) else self.decode(ids)


def trained_meta(algorithm: str, vocab_size: int, model: bytes) -> TokenizerMeta:
    """The meta data of a model whose first ids are `SPECIAL_TOKENS`."""
    return TokenizerMeta(
        format=TRAINED,
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
        special_tokens=dict(enumerate(SPECIAL_TOKENS)),
    )


def write_tokenizer(folder: Path, meta: TokenizerMeta, model: bytes) -> None:
    """Writes the model and its meta file into `folder`."""
    fields = asdict(meta)
    if meta.format == TRAINED:
        del fields["special_tokens"]
    lines = json.dumps(fields, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The meta file goes last: with it a folder becomes a tokenizer.
        (folder / META_NAME).unlink(missing_ok=True)
        (folder / meta.file).write_bytes(model)
        (folder / META_NAME).write_text(lines, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error


def read_meta(folder: Path) -> TokenizerMeta:
    """The meta data of a tokenizer folder, its model file checked.

    Raises:
        DataError: It is not such a folder, or the model is not the one the meta file names.
    """
    path = folder / META_NAME
    if not path.is_file():
        raise DataError(f"{folder}: not a tokenizer folder (no {META_NAME}); {_remedy(folder)}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        is_known = fields["algorithm"] in _NAMES.get(fields["format"], ())
        meta = _meta(fields) if is_known else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the meta file of a tokenizer: {error}") from error
    if meta is None:
        raise DataError(
            f"{path}: format {fields['format']} of {fields['algorithm']} is not known; train or"
            " import anew"
        )
    model = folder / meta.file
    if not model.is_file():
        raise DataError(f"{model}: the tokenizer's model file is missing; train or import anew")
    if hashlib.sha256(model.read_bytes()).hexdigest() != meta.sha256:
        raise DataError(f"{model}: not the file {META_NAME} was written for; train or import anew")
    return meta


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, ready to encode."""
    meta = read_meta(folder)
    model = folder / meta.file
    if meta.format == IMPORTED:
        return Tokenizer(meta, imported_codec(model, meta.special_tokens))
    if meta.algorithm == "byte-level-bpe":
        return Tokenizer(meta, _ByteLevelCodec(model))
    return Tokenizer(meta, _SentencePieceCodec(model))


def imported_codec(model: Path, special_tokens: Iterable[int]) -> Codec:
    """The codec of a published model file; text does not become one of these ids where it can help."""
    if model.suffix == ".json":
        return _HuggingFaceCodec(model, set(special_tokens))
    return _PlainSentencePieceCodec(model)


def _meta(fields: dict[str, Any]) -> TokenizerMeta:
    if fields["format"] == TRAINED:
        fields["special_tokens"] = dict(enumerate(SPECIAL_TOKENS))
    words = {int(token): word for token, word in fields["special_tokens"].items()}
    fim = fields["fim"] and FimIds(**fields["fim"])
    return TokenizerMeta(**{**fields, "fim": fim, "special_tokens": words})


def _remedy(folder: Path) -> str:
    if any((folder / name).is_file() for name in IMPORTED_NAMES.values()):
        return f"make one of it with 'megamoe data tokenizer import {folder} -o OUT'"
    return "make one with 'megamoe data tokenizer train'"


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


class _HuggingFaceCodec(_ByteLevelCodec):
    def __init__(self, model: Path, special_tokens: set[int]) -> None:
        super().__init__(model)
        added = self._model.get_added_tokens_decoder()
        if any(token in special_tokens and not added[token].special for token in added):
            # Only what the file calls special can be kept from being read out of text.
            fields = json.loads(model.read_bytes())
            for entry in fields["added_tokens"]:
                entry["special"] = entry["special"] or entry["id"] in special_tokens
            self._model = type(self._model).from_str(json.dumps(fields))
            self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()


class _PlainSentencePieceCodec:
    """As the library encodes; ours takes more care of the letter that stands for a space."""

    def __init__(self, model: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        known = self._model.get_piece_size()  # a vocabulary may have gaps above
        text: str = self._model.decode([token for token in ids if token < known])
        return text
