"""Where a trained model lies: its plan, the checkpoint, and the tokenizer of its data."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import expand_inputs
from data_prep.tokenize import TOKENIZER_FOLDER
from data_prep.tokenizer import META_NAME, Tokenizer, load_tokenizer, read_meta
from megamoe.checkpoints.folder import Progress, latest, read_progress
from megamoe.checkpoints.manifest import MANIFEST
from megamoe.errors import CheckpointError, DataError, MegamoeError
from megamoe.plan.json import digest, read_plan
from megamoe.plan.plan import Plan, Segment

_PLAN = "plan.json"
_SHARD_ENDINGS = (".bin", ".idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A checkpoint and the plan that it was made by."""

    plan: Plan
    checkpoint: Path
    progress: Progress

    @property
    def segment(self) -> Segment:
        """Return the segment that made the checkpoint."""
        return self.plan.segments[self.progress.segment]


def find_checkpoint(path: Path) -> Place:
    """Return the latest checkpoint of a run folder, or the one that is given itself.

    Raises:
        CheckpointError: it is neither, or there is none yet, or it belongs to another plan.
    """
    if (path / _PLAN).is_file():
        run, checkpoint = path, latest(path / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(
                f"{path}: has no checkpoint yet; `megamoe run {path}` goes on until there is one"
            )
    else:
        run, checkpoint = path.resolve().parent.parent, path
        if not ((path / MANIFEST).is_file() and (run / _PLAN).is_file()):
            raise CheckpointError(
                f"{path}: is neither a run folder nor a checkpoint in one; give for example "
                "runs/tiny or runs/tiny/checkpoints/000000000564224"
            )
    plan, progress = read_plan(run / _PLAN), read_progress(checkpoint)
    if progress.plan_digest != digest(plan):
        raise CheckpointError(f"{checkpoint}: belongs to another plan than {run / _PLAN}")
    return Place(plan=plan, checkpoint=checkpoint, progress=progress)


def open_tokenizer(plan: Plan, folder: Path | None) -> Tokenizer:
    """Return a tokenizer: of a folder, or of the data that a run was trained on.

    Raises:
        DataError: it is not there, or has other ids than the model.
    """
    assert plan.data is not None, "a run has data"
    if folder is None:
        folder = Path(plan.data.folder) / TOKENIZER_FOLDER
        if not (folder / META_NAME).is_file():
            raise DataError(
                f"{folder}: the run's tokenizer is not there; give --tokenizer DIR, a folder that "
                "`megamoe data tokenizer train` has made"
            )
    meta = read_meta(folder)
    expected = (plan.data.vocab_size, plan.data.eod_id)
    if (meta.vocab_size, meta.eod_id) != expected:
        raise DataError(
            f"{folder}: has {meta.vocab_size:,} ids and {meta.eod_id} at the end of a document, the "
            f"run's data {expected[0]:,} and {expected[1]}; give the tokenizer of its data"
        )
    package = "tokenizers" if meta.algorithm == "byte-level-bpe" else "sentencepiece"
    require_packages("data", package)
    return load_tokenizer(folder)


def find_texts(names: list[str]) -> list[Path]:
    """Return the shards and the files of text that names, folders and patterns stand for.

    Raises:
        DataError: a name stands for nothing, or for what is not read.
    """
    found: list[Path] = []
    for name in names:
        found += [Path(name)] if shard_prefix(Path(name)) else expand_inputs([name])
    return found


def shard_prefix(path: Path) -> Path | None:
    """Return the prefix of a shard that is given by it or by one of its files; else None."""
    prefix = path.with_suffix("") if path.suffix in _SHARD_ENDINGS else path
    is_shard = all(prefix.with_name(prefix.name + ending).is_file() for ending in _SHARD_ENDINGS)
    return prefix if is_shard else None


def require_packages(extra: str, *names: str) -> None:
    """Raise MegamoeError for the first package that is not installed.

    Args:
        extra: of megamoe, which brings them.
        names: as they are imported.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MegamoeError(
                f"this needs the package {name!r}, which is not installed; "
                f"give `pip install megamoe[{extra}]`"
            )
