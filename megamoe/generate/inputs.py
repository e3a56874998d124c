"""What a trained model reads beside itself: the tokenizer of its data, and files of text."""

import re
from pathlib import Path

from data_prep.files import expand_inputs
from data_prep.tokenize import TOKENIZER_FOLDER
from data_prep.tokenizer import META_NAME, Tokenizer, TokenizerMeta, load_tokenizer, read_meta
from megamoe.errors import DataError
from megamoe.packages import require_packages
from megamoe.plan.plan import Plan

_SHARD_ENDINGS = (".bin", ".idx")
_OF_A_GROUP = re.compile(r"([\w-]+)=(.+)")  # NAME=FILE


def open_tokenizer(plan: Plan, folder: Path | None) -> Tokenizer:
    """Return a tokenizer: of a folder, or of the data that a run was trained on.

    Raises:
        DataError: it is not there, or has other ids than the model.
    """
    folder = folder or _own_folder(plan)
    meta = read_meta(folder)
    _check_ids(plan, folder, meta)
    package = "tokenizers" if meta.file == "tokenizer.json" else "sentencepiece"
    require_packages("data", package)
    return load_tokenizer(folder)


def find_groups(words: list[str]) -> dict[str | None, list[Path]]:
    """Return the files that words stand for, those of NAME=FILE by name, the others under None.

    A file whose own name is such a word is that file.

    Raises:
        DataError: as `find_texts`.
    """
    groups: dict[str | None, list[Path]] = {}
    for word in words:
        is_file = Path(word).exists() or shard_prefix(Path(word))
        match = None if is_file else _OF_A_GROUP.fullmatch(word)
        name, file = (match[1], match[2]) if match else (None, word)
        groups.setdefault(name, []).extend(find_texts([file]))
    return groups


def find_texts(names: list[str]) -> list[Path]:
    """Return the shards and the files of text that names, folders and patterns stand for.

    Raises:
        DataError: a name stands for nothing, for what is not read, or for a shard without a token.
    """
    found: list[Path] = []
    for name in names:
        prefix = shard_prefix(Path(name))
        if prefix and not prefix.with_name(f"{prefix.name}.bin").stat().st_size:
            raise DataError(f"{name}: is a shard without a token; leave it out")
        found += [Path(name)] if prefix else expand_inputs([name])
    return found


def shard_prefix(path: Path) -> Path | None:
    """Return the prefix of a shard that is given by it or by one of its files; else None."""
    prefix = path.with_suffix("") if path.suffix in _SHARD_ENDINGS else path
    is_shard = all(prefix.with_name(prefix.name + ending).is_file() for ending in _SHARD_ENDINGS)
    return prefix if is_shard else None


def _own_folder(plan: Plan) -> Path:
    if plan.data is None:
        raise DataError(
            f"{plan.recipe}: the run's plan has no data, so no tokenizer either; give --tokenizer DIR, "
            "a folder that `megamoe data tokenizer train` or `import` has made"
        )
    folder = Path(plan.data.folder) / TOKENIZER_FOLDER
    if not (folder / META_NAME).is_file():
        raise DataError(
            f"{folder}: the run's tokenizer is not there; give --tokenizer DIR, a folder that "
            "`megamoe data tokenizer train` or `import` has made"
        )
    return folder


def _check_ids(plan: Plan, folder: Path, meta: TokenizerMeta) -> None:
    if plan.data is None:
        if meta.vocab_size > plan.model.vocab_size:
            raise DataError(
                f"{folder}: has {meta.vocab_size:,} ids, the model {plan.model.vocab_size:,}; "
                "give the tokenizer that its text was made with"
            )
        return
    expected = (plan.data.vocab_size, plan.data.eod_id)
    if (meta.vocab_size, meta.eod_id) != expected:
        raise DataError(
            f"{folder}: has {meta.vocab_size:,} ids and {meta.eod_id} at the end of a document, the "
            f"run's data {expected[0]:,} and {expected[1]}; give the tokenizer of its data"
        )
