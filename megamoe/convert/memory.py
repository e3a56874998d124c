"""What memory a conversion takes at most: the largest tensors and the files decide, not the layers."""

import math

import torch

# torch (0.28 GB; 0.56 GB if built for CUDA), and the search for NaN (0.19 GB: 16 million values)
_BASE_BYTES = 500_000_000 if torch.version.cuda is None else 800_000_000
_BYTES_PER_TENSOR = 8_000  # of theirs, in the lists of what is converted, and in the audit


def export_bytes(theirs: list[int], largest_ours: int, shard_bytes: int) -> int:
    """Return the most that an export takes.

    It holds the tensors of one file, and the one of ours that is split or put together from parts.
    Then the file is mapped, when the allocator may not have given back what its tensors had.

    Args:
        theirs: bytes of each of their tensors, as written.
        largest_ours: bytes of the largest of ours as stored, or of its largest expert.
        shard_bytes: most bytes of tensors in a file, but for a tensor that is larger.
    """
    return _base(len(theirs)) + 2 * max(shard_bytes, *theirs) + largest_ours


def import_bytes(num_theirs: int, largest_ours: int) -> int:
    """Return the most that an import takes: tensors of theirs that make one of ours, and that one.

    Args:
        num_theirs: number of their tensors.
        largest_ours: bytes of the largest of ours as written, or of its largest expert.
    """
    return _base(num_theirs) + 2 * largest_ours


def need(num_bytes: int) -> str:
    """Return a line that says how much memory is needed."""
    return f"needs at most {math.ceil(num_bytes / 1e8) / 10:.1f} GB of memory"


def _base(num_tensors: int) -> int:
    return _BASE_BYTES + _BYTES_PER_TENSOR * num_tensors
