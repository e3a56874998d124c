"""float64 wherever the engine says float32, so that only a fault of a layout is left to see.

The engine and Megatron-core write float32 into norms, routing, losses and buffers. Here the name itself
is changed, in a process that does nothing else, before either is imported.
"""

from typing import Any

import torch


def enable() -> None:
    """Let torch.float32 and Tensor.float mean float64 from here on."""
    # What files call a dtype is looked up in tables that torch makes at their first use: of the two
    # names that now mean float64 the wrong one would win.
    torch.storage._dtype_to_storage_type_map()
    torch.storage._storage_type_to_dtype_map()
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    original = torch.Tensor.type

    def type_of(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # Megatron-Core 0.16.1 optimizer/distrib_optimizer.py:420 asks which optimizer by this name.
        if dtype is None:
            return original(self).replace("Double", "Float")
        return original(self, dtype, **kwargs)

    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]
