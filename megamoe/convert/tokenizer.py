"""The tokenizer of a run's data folder, copied into a Hugging Face folder and compared with its own."""

import json
import shutil
from pathlib import Path

from megamoe.plan.plan import Data

_META = "tokenizer_meta.json"
_BYTE_LEVEL = "tokenizer.json"  # the form that transformers read as it is
_SENTENCEPIECE = "tokenizer.model"


def copy_tokenizer(data: Data | None, folder: Path) -> str:
    """Copy the tokenizer of a plan's data, if it is there; return what was done, in a line."""
    if data is None:
        return "no tokenizer: the plan has no data"
    source = Path(data.folder) / "tokenizer"
    if not (source / _META).is_file():
        return f"no tokenizer: {source} has no {_META}"
    file = json.loads((source / _META).read_bytes())["file"]
    shutil.copyfile(source / file, folder / file)
    if file != _BYTE_LEVEL:
        return f"tokenizer: {file}, which transformers read where sentencepiece is installed"
    words = _special_words(source / file, {"eos_token": data.eod_id, "pad_token": data.pad_id})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **words,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return f"tokenizer: {file}"


def compare_tokenizer(folder: Path, data: Data | None) -> str | None:
    """Return, in a line, whose tokenizer a run has that begins from a folder; None: folder has none."""
    found = [name for name in (_BYTE_LEVEL, _SENTENCEPIECE) if (folder / name).is_file()]
    if not found:
        return None
    if data is None:
        return f"{found[0]} of the folder is not taken along: the plan has no data to be beside"
    own = Path(data.folder) / "tokenizer" / found[0]
    if own.is_file() and own.read_bytes() == (folder / found[0]).read_bytes():
        return f"tokenizer: that of {data.folder}, the same as the folder's"
    return (
        f"tokenizer: that of {data.folder}, another file than the folder's {found[0]}; "
        "the weights know text by the ids they were trained with"
    )


def _special_words(path: Path, ids: dict[str, int]) -> dict[str, str]:
    added = json.loads(path.read_bytes()).get("added_tokens", [])
    words = {token["id"]: token["content"] for token in added}
    return {name: words[number] for name, number in ids.items() if number in words}
