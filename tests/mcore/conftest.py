"""Megatron-core is made to run here before any test module imports it."""

import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    from megamoe.mcore import cpu

    cpu.enable()
    import megamoe.mcore.engine
    import megamoe.mcore.groups  # noqa: F401 - imported for the tests below

HERE = Path(__file__).parent
# Megatron-Core 0.16.1 calls what torch 2.13 has renamed or means to remove.
IGNORED = (
    "ignore:.torch.distributed.*is deprecated:FutureWarning",
    "ignore:Please use DTensor instead:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Megatron-core warn about its own calls of torch."""
    for item in items:
        if HERE in item.path.parents:
            for warning in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(warning))
