"""Checkpoints without an engine: whole folders with a manifest, and a shard that is not read."""

from pathlib import Path

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.folder import Progress
from megamoe.checkpoints.manifest import write_file, write_manifest

SHARDS = {"__0_0.distcp": (b"weights of rank 0" * 9, 0), "__1_0.distcp": (b"and of rank 1" * 9, 1)}


def save(folder: Path, progress: Progress, *, keep: int = 9) -> Path:
    """Publish a checkpoint as a run does and return its folder."""
    name = files.name_of(progress.tokens_seen)
    partial = files.begin(folder, name)
    if partial is None:
        return folder / name
    entries = [write_file(partial / shard, *content) for shard, content in SHARDS.items()]
    entries.append(write_file(partial / "tensors.json", b'{"a.weight": ["float32", [2, 3]]}', 0))
    write_manifest(partial, [*entries, files.write_progress(partial, progress)])
    files.publish(partial, folder / name, keep)
    return folder / name


def progress(tokens: int, **changes: object) -> Progress:
    """Return where a run stands after so many tokens."""
    fields = {
        "plan_digest": "0" * 64,
        "segment": 0,
        "step": tokens // 64,
        "tokens_seen": tokens,
        "segment_done": False,
        "ledger": (("general", "korean", tokens),),
    }
    return Progress(**{**fields, **changes})  # type: ignore[arg-type]


def three(run: Path) -> Path:
    """Save after 64, 128 and 192 tokens; return the folder of the checkpoints."""
    for tokens in (64, 128, 192):
        save(run / "checkpoints", progress(tokens))
    return run / "checkpoints"


def names(folder: Path) -> list[str]:
    """Return what is in a folder, by name."""
    return sorted(path.name for path in folder.iterdir())
