"""The weights of a checkpoint as the engine writes it: which tensors they are, beside all others."""

import torch

from megamoe.checkpoints.place import Place
from megamoe.checkpoints.tensors import kind_of, weight_of_master
from megamoe.convert import audit
from megamoe.convert.ours import our_tensors
from megamoe.mcore.stored import TensorReader


def weight_sources(place: Place, reader: TensorReader, *, exact: bool) -> dict[str, str]:
    """Return for each weight the tensor to read it from, in the order of our layers.

    Args:
        place: the checkpoint.
        reader: reads it.
        exact: rounded weights are read from the optimizer's float32 copies where there are any.

    Raises:
        CheckpointError: a weight of the model is missing, extra or misshaped.
    """
    ours, where = our_tensors(place.plan.model), str(place.checkpoint)
    found = {name for name in reader.tensors if kind_of(name) == "weights"}
    audit.check_names(where, found, set(ours))
    for name, shape in ours.items():
        audit.check_shape(where, name, reader.tensors[name].shape, shape)
    rounded = {name for name in ours if exact and reader.tensors[name].dtype != torch.float32}
    masters = {weight_of_master(name): name for name in reader.tensors}
    return {name: masters.get(name, name) if name in rounded else name for name in ours}
