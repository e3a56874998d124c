"""What the names of a checkpoint's tensors tell."""

_OPTIMIZER = "optimizer.state."  # after a chunk's prefix, if any; then the kind, then the weight
_MASTER = f"{_OPTIMIZER}param."
_RANDOM = "random."
SHARES = "previous_shares_E"  # of a router: what it balances by, no weight


def kind_of(name: str) -> str:
    """Return what a tensor is: 'weights', 'optimizer exp_avg', 'random state', ..."""
    _, of_optimizer, rest = name.partition(_OPTIMIZER)
    if of_optimizer:
        return f"optimizer {rest.partition('.')[0]}"
    if name.endswith(f".{SHARES}"):
        return "expert shares"
    return "random state" if name.startswith(_RANDOM) else "weights"


def weight_of_master(name: str) -> str | None:
    """Return the weight that a tensor is the optimizer's float32 copy of; None: it is no such copy."""
    return name.partition(_MASTER)[2] or None
