"""The guard of this folder: what was never written is NaN."""

import pytest
import torch


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(63),
        lambda: torch.empty_like(torch.ones(63)),
        lambda: torch.ones(3).new_empty(63),
        lambda: torch.empty(63, dtype=torch.bfloat16),
        lambda: torch.empty_strided((9, 7), (1, 9)),
        lambda: torch.ones(3).resize_(63)[3:],
    ],
)
def test_memory_that_was_never_written_is_nan(make):
    assert make().isnan().all()
