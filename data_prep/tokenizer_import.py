"""A published tokenizer becomes a tokenizer folder: its model file as it is, beside its special ids.

The ids are those that the files of a Hugging Face folder name, by word or by number.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from data_prep.tokenizer import (
    IMPORTED,
    IMPORTED_NAMES,
    Codec,
    FimIds,
    TokenizerMeta,
    imported_codec,
    write_tokenizer,
)
from megamoe.errors import DataError

# The first that names a token is believed, and the model file last.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)
_ADDED = "added_tokens.json"
# Prefix, middle, suffix as published tokenizers spell them, and what ends such a document, if they
# have it.
_FIM_WORDS: tuple[tuple[str, str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_eod|>"),  # ours, VAETKI, Qwen
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", None),  # StarCoder
    ("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", None),  # GLM
    # DeepSeek: the suffix comes after the hole
    (
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        None,
    ),
    ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"),  # Code Llama
    ("[PREFIX]", "[MIDDLE]", "[SUFFIX]", None),  # Codestral
)

_Beside = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A token, and which file or option gives it its part."""

    token: int
    word: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What was written, and what may end a document: the first does."""

    meta: TokenizerMeta
    ends: tuple[Named, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """The tokens of a model file, and those that the files beside it add."""

    model: Path
    algorithm: str
    size: int  # above the largest id
    special: dict[int, str]
    find: Callable[[str], int | None]
    spell: Callable[[int], str | None]
    own: dict[str, int]  # ids of the model file's own eos, pad and bos


def import_tokenizer(
    source: Path, out: Path, *, end_token: str | None, pad_token: str | None
) -> Imported:
    """Writes the tokenizer folder `out`.

    Args:
        source: A folder with tokenizer.json or tokenizer.model, or one of these files.
        out: Gets a copy of that file.
        end_token: Ends documents; None: what is named eos.
        pad_token: Pads; None: what is named pad, else bos, else what ends documents.

    Raises:
        DataError: A file cannot be read, nothing says what ends a document, or a token will not do.
    """
    model = _model_file(source)
    beside = {name: _read(model.with_name(name)) for name in (*_BESIDE, _ADDED)}
    vocabulary = _vocabulary(model, beside)
    ends = _given(vocabulary, "--end-token", end_token) or _named(vocabulary, "eos", beside)
    pads = _given(vocabulary, "--pad-token", pad_token) or _named(vocabulary, "pad", beside)
    begins = _named(vocabulary, "bos", beside)
    if not ends:
        raise DataError(f"{model}: no file says what ends a document; give --end-token TOKEN")
    fim = _fim(vocabulary)
    special = dict(vocabulary.special)
    special |= {named.token: named.word for named in (ends[0], *pads, *begins)}
    special |= {token: vocabulary.spell(token) or "" for token in _ids(fim)}
    codec = imported_codec(model, special)
    _check(codec, model, ends[0])
    if pad_token:
        _check(codec, model, pads[0])
    would_pad = [x.token for x in (*pads, *begins) if not _is_spelt(codec, x.token, x.word)]
    content = model.read_bytes()
    meta = TokenizerMeta(
        format=IMPORTED,
        algorithm=vocabulary.algorithm,
        vocab_size=vocabulary.size,
        eod_id=ends[0].token,
        pad_id=next((token for token in would_pad if token != ends[0].token), ends[0].token),
        bos_id=begins[0].token if begins else None,
        fim=None if any(_is_spelt(codec, token, special[token]) for token in _ids(fim)) else fim,
        sha256=hashlib.sha256(content).hexdigest(),
        file=model.name,
        special_tokens={token: special[token] for token in sorted(special)},
    )
    write_tokenizer(out, meta, content)
    return Imported(meta=meta, ends=ends)


def _model_file(source: Path) -> Path:
    names = tuple(IMPORTED_NAMES.values())
    if source.is_file() and source.name in names:
        return source
    for name in names:
        if (source / name).is_file():
            return source / name
    raise DataError(
        f"{source}: holds neither {' nor '.join(names)}; give the folder of a published tokenizer"
    )


def _read(path: Path) -> dict[str, Any]:
    """The object of a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path}: holds no JSON object")
    return fields


def _vocabulary(model: Path, beside: _Beside) -> _Vocabulary:
    found = _of_json(model) if model.suffix == ".json" else _of_sentencepiece(model)
    special, added = dict(found.special), _added(model, beside)
    for token, (word, is_special) in added.items():
        if is_special or found.spell(token) is None:
            special[token] = word
    tokens = {word: token for token, word in special.items()}

    def find(word: str) -> int | None:
        return tokens[word] if word in tokens else found.find(word)

    def spell(token: int) -> str | None:
        return special[token] if token in special else found.spell(token)

    return _Vocabulary(
        model=model,
        algorithm=found.algorithm,
        size=max(found.size, *(token + 1 for token in added), 0),
        special=special,
        find=find,
        spell=spell,
        own=found.own,
    )


def _added(model: Path, beside: _Beside) -> dict[int, tuple[str, bool]]:
    """Words that the files beside the model add by id, and whether they are special."""
    try:
        added = {int(token): (str(word), False) for word, token in beside[_ADDED].items()}
        listed = beside["tokenizer_config.json"].get("added_tokens_decoder", {})
        for token, entry in listed.items():
            added[int(token)] = (str(entry["content"]), bool(entry.get("special")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{model.parent}: its added tokens have no words and ids: {error!r}"
        ) from error
    return added


def _of_json(model: Path) -> _Vocabulary:
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_file(str(model))
    except Exception as error:  # the library's errors have no class of their own
        raise DataError(f"{model}: `tokenizers` cannot read it: {error}") from error
    added = loaded.get_added_tokens_decoder()
    return _Vocabulary(
        model=model,
        algorithm="huggingface",
        size=max(loaded.get_vocab().values(), default=-1) + 1,
        special={token: entry.content for token, entry in added.items() if entry.special},
        find=loaded.token_to_id,
        spell=loaded.id_to_token,
        own={},
    )


def _of_sentencepiece(model: Path) -> _Vocabulary:
    import sentencepiece

    try:
        loaded = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{model}: SentencePiece cannot read it: {error}") from error
    pieces = {token: loaded.id_to_piece(token) for token in range(loaded.get_piece_size())}
    tokens = {piece: token for token, piece in pieces.items()}
    own = {"eos": loaded.eos_id(), "pad": loaded.pad_id(), "bos": loaded.bos_id()}
    return _Vocabulary(
        model=model,
        algorithm="sentencepiece",
        size=len(pieces),
        special={
            token: piece
            for token, piece in pieces.items()
            if loaded.is_control(token) or loaded.is_unknown(token)
        },
        find=tokens.get,
        spell=pieces.get,
        own={role: token for role, token in own.items() if token >= 0},
    )


def _given(vocabulary: _Vocabulary, option: str, word: str | None) -> tuple[Named, ...]:
    """The token of an option; none where it was not given."""
    if word is None:
        return ()
    token = vocabulary.find(word)
    if token is None:
        raise DataError(f"{option} {word!r} is no token of {vocabulary.model}; give one of it")
    return (Named(token=token, word=word, where=option),)


def _named(vocabulary: _Vocabulary, role: str, beside: _Beside) -> tuple[Named, ...]:
    """The tokens that files give a role, each once."""
    named: dict[int, Named] = {}
    for token, where in _roles(vocabulary, role, beside):
        word = vocabulary.spell(token)
        if word is not None and token not in named:
            named[token] = Named(token=token, word=word, where=where)
    return tuple(named.values())


def _roles(vocabulary: _Vocabulary, role: str, beside: _Beside) -> Iterator[tuple[int, str]]:
    for name in _BESIDE:
        for key in (f"{role}_token", f"{role}_token_id"):
            value = beside[name].get(key)
            for item in value if isinstance(value, list) else [value]:
                word = item.get("content") if isinstance(item, dict) else item
                token = vocabulary.find(word) if isinstance(word, str) else word
                if isinstance(token, int):
                    yield token, name
    if role in vocabulary.own:
        yield vocabulary.own[role], vocabulary.model.name


def _fim(vocabulary: _Vocabulary) -> FimIds | None:
    for prefix_word, middle_word, suffix_word, end_word in _FIM_WORDS:
        prefix, middle = vocabulary.find(prefix_word), vocabulary.find(middle_word)
        suffix = vocabulary.find(suffix_word)
        if prefix is not None and middle is not None and suffix is not None:
            eod = vocabulary.find(end_word) if end_word else None
            return FimIds(prefix=prefix, middle=middle, suffix=suffix, eod=eod)
    return None


def _ids(fim: FimIds | None) -> list[int]:
    return [token for token in astuple(fim) if token is not None] if fim else []


def _check(codec: Codec, model: Path, named: Named) -> None:
    if _is_spelt(codec, named.token, named.word):
        raise DataError(
            f"{model}: text can become {named.word} ({named.where}), which documents may not hold;"
            " give another token, or a folder with tokenizer.json"
        )


def _is_spelt(codec: Codec, token: int, word: str) -> bool:
    """Whether text becomes the token: its name, or what it stands for, at a beginning or later."""
    texts = (word, codec.decode([token]))
    return any(token in codec.encode(before + text) for text in texts for before in ("", "0"))
