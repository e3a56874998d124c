"""Ranks that hold the same part of a weight must hold the same bits: a checkpoint stores one copy only."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from megamoe.mcore import groups
from megamoe.mcore.init import sharded_tensors
from megamoe.mcore.model import unwrap


def unequal_copies(chunks: Iterable[Any]) -> list[str]:
    """Return the weights of which two ranks hold different copies, sorted; all ranks call this.

    For the few ranks of a comparison: each tells all others a hash of every weight it has.
    """
    mine = {
        (part.key, tuple(part.global_offset)): hashlib.sha256(
            part.data.detach().cpu().contiguous().view(torch.uint8).numpy()
        ).hexdigest()
        for chunk in chunks
        for part in sharded_tensors(unwrap(chunk).sharded_state_dict(metadata=groups.sharding()))
        if part.data is not None
    }
    seen: dict[tuple[str, tuple[int, ...]], set[str]] = {}
    for hashes in groups.told_by_all(mine):
        for place, digest in hashes.items():
            seen.setdefault(place, set()).add(digest)
    return sorted({name for (name, _), digests in seen.items() if len(digests) > 1})
