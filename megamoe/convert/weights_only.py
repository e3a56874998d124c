"""A checkpoint of weights alone, written tensor by tensor; a run goes on from it or begins with it.

The engine begins the optimizer's state where it finds none (megamoe/mcore/checkpoint.py).
"""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megamoe.checkpoints import folder as files
from megamoe.checkpoints.folder import Progress
from megamoe.checkpoints.manifest import write_file, write_manifest
from megamoe.errors import CheckpointError
from megamoe.mcore.stored import TensorWriter

# What Megatron-core's dist_checkpointing wants to find in metadata.json.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class NewCheckpoint:
    """A checkpoint that is being written: its tensors, and what else goes beside them."""

    def __init__(self, tensors: TensorWriter) -> None:
        """Begin with no tensor."""
        self.tensors = tensors
        self.notes: dict[str, bytes] = {}  # files, by name


@contextmanager
def new_checkpoint(run_dir: Path, progress: Progress) -> Iterator[NewCheckpoint]:
    """Yield a checkpoint of a run that has none; it is published when all went well.

    Args:
        run_dir: the run.
        progress: where the run stands with these weights.

    Raises:
        CheckpointError: the run has a checkpoint.
    """
    folder = run_dir / "checkpoints"
    if (newest := files.latest(folder)) is not None:
        raise CheckpointError(f"{newest}: is there already; give a run folder without checkpoints")
    name = files.name_of(progress.tokens_seen)
    partial = files.begin(folder, name)
    assert partial is not None, "the folder has no checkpoint"
    try:
        with TensorWriter(partial) as writer:
            new = NewCheckpoint(writer)
            yield new
            _finish(partial, new, progress)
        files.publish(partial, folder / name, keep=1)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _finish(partial: Path, new: NewCheckpoint, progress: Progress) -> None:
    """Write what a checkpoint has beside its shards, the manifest last."""
    shards, tensors = new.tensors.finish()
    common = io.BytesIO()
    torch.save({}, common)
    contents = {
        "common.pt": common.getvalue(),
        "metadata.json": json.dumps(_FORMAT).encode(),
        "tensors.json": json.dumps(tensors, indent=0).encode(),
        **new.notes,
    }
    written = [write_file(partial / name, content, rank=0) for name, content in contents.items()]
    write_manifest(partial, [*shards, *written, files.write_progress(partial, progress)])
