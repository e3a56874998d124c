"""The tokenizer of a run's data folder, copied into a Hugging Face folder and compared with its own."""

import json
import shutil
from pathlib import Path

from megamoe.errors import CheckpointError
from megamoe.plan.plan import Data

_FOLDER = "tokenizer"  # in that of the data
_META = "tokenizer_meta.json"
_BYTE_LEVEL = "tokenizer.json"  # the form that transformers read as it is
_SENTENCEPIECE = "tokenizer.model"


def copy_tokenizer(data: Data | None, folder: Path) -> str:
    """Copy the tokenizer of a plan's data, if it is there; return what was done, in a line."""
    if data is None:
        return "no tokenizer: the plan has no data"
    source = tokenizer_of(data)
    if source is None:
        return f"no tokenizer: {Path(data.folder) / _FOLDER} has no {_META}"
    file = source.name
    shutil.copyfile(source, folder / file)
    if file != _BYTE_LEVEL:
        return f"tokenizer: {file}, which transformers read where sentencepiece is installed"
    words = _special_words(source, {"eos_token": data.eod_id, "pad_token": data.pad_id})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **words,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return f"tokenizer: {file}"


def tokenizer_of(data: Data | None) -> Path | None:
    """Return the file of the tokenizer of a plan's data; None where there is no tokenizer.

    Raises:
        CheckpointError: the file is gone that its description names.
    """
    if data is None or not (meta := Path(data.folder) / _FOLDER / _META).is_file():
        return None
    file: Path = meta.with_name(json.loads(meta.read_bytes())["file"])
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing, {_META} names it; restore it")
    return file


def compare_tokenizer(folder: Path, data: Data | None) -> str | None:
    """Return, in a line, whose tokenizer a run has that begins from a folder; None: folder has none."""
    found = [name for name in (_BYTE_LEVEL, _SENTENCEPIECE) if (folder / name).is_file()]
    if not found:
        return None
    command = f"`megamoe data tokenizer import {folder} -o OUT`"
    if data is None:
        return (
            f"{found[0]} of the folder is not taken along: the plan has no data to be beside; "
            f"{command} makes a tokenizer of it, for `megamoe generate RUN --tokenizer OUT`"
        )
    own = Path(data.folder) / _FOLDER / found[0]
    if own.is_file() and own.read_bytes() == (folder / found[0]).read_bytes():
        return f"tokenizer: that of {data.folder}, the same as the folder's"
    return (
        f"tokenizer: that of {data.folder}, another file than the folder's {found[0]}; the weights "
        f"know text by the ids they were trained with, which {command} brings to data"
    )


def _special_words(path: Path, ids: dict[str, int]) -> dict[str, str]:
    added = json.loads(path.read_bytes()).get("added_tokens", [])
    words = {token["id"]: token["content"] for token in added}
    return {name: words[number] for name, number in ids.items() if number in words}
