"""A checkpoint's model in this process, which becomes a world of one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megamoe.checkpoints.place import Place
from megamoe.packages import require_packages

if TYPE_CHECKING:
    from megamoe.mcore.inference import TrainedModel


@contextmanager
def opened(place: Place) -> Iterator["TrainedModel"]:
    """Yield the model, its weights loaded.

    Raises:
        MegamoeError: what trains is not installed.
        CheckpointError: the checkpoint is damaged.
    """
    require_packages("train", "torch", "megatron", "numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core's, about itself
        from megamoe.mcore import cpu

        cpu.enable()
        from megamoe.mcore.inference import TrainedModel, alone

        with alone(place.plan, place.segment) as (plan, segment):
            yield TrainedModel(plan, segment, place.checkpoint)
