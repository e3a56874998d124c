"""Memory that was never written reads as NaN, so that a result built on it cannot pass."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory() -> Iterator[None]:
    """Have torch fill what `empty` and its like return."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


@pytest.fixture
def generator() -> torch.Generator:
    """Return a generator of a fixed seed."""
    return torch.Generator().manual_seed(20_260_101)
