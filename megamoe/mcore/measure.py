"""What a step measured, over all ranks, in one all-reduce.

Shapes: L layers (decoder, then multi-token prediction), E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megamoe.mcore.compat import layer_index, take_mtp_losses
from megamoe.mcore.router import BalancedRouter
from megamoe.recipe import Model

AUX_LOSSES = (
    ("aux_loss", "load_balancing_loss"),
    ("sequence_aux_loss", "seq_load_balancing_loss"),
    ("global_aux_loss", "global_aux_loss"),
    ("z_loss", "z_loss"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Values of the global batch, equal on all ranks."""

    loss: float
    loss_tokens: int
    mtp_loss: float | None
    aux_losses: tuple[tuple[str, float], ...]
    expert_load: tuple[float, ...]


def measure(
    model: Model, chunks: list[DistributedDataParallel], losses: list[dict[str, Tensor]]
) -> Measures:
    """Add up what every rank measured; after training, tell the routers that the batch is over."""
    routers = list(_routers(chunks))
    num_layers = model.num_layers + (model.mtp.num_layers if model.mtp else 0)
    heads = 4 + len(AUX_LOSSES)
    num_experts = model.experts.num_routed
    # All of it stays on the device until the end: a value brought to the host waits for the GPU.
    device = torch.cuda.current_device()
    totals = torch.zeros(heads + num_layers * num_experts, dtype=torch.float64, device=device)
    _add_losses(totals, losses)
    counts_LE = totals[heads:].view(num_layers, num_experts)
    for router in routers:
        for index, (_, name) in enumerate(AUX_LOSSES):
            totals[4 + index] += router.loss_sums.get(name, 0.0)
        counts_LE[layer_index(router, model.num_layers)] += router.batch_counts_E
    torch.distributed.all_reduce(totals)
    is_training = bool(counts_LE.any())  # an evaluation counts no tokens
    for router in routers if is_training else ():
        router.finish_batch(counts_LE[layer_index(router, model.num_layers)])
    return _summary(totals[:heads].tolist(), counts_LE, is_training=is_training)


def _add_losses(totals: Tensor, losses: list[dict[str, Tensor]]) -> None:
    """Put in [loss sum, tokens, MTP loss sum, MTP targets]; ranks of a tp group hold the same."""
    mtp_losses = take_mtp_losses()
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        for part in losses:
            totals[0] += part["loss"]
            totals[1] += part["tokens"]
        if mtp_losses is not None:
            totals[2] = mtp_losses.double().sum()
            totals[3] = sum(part["mtp_targets"] for part in losses)


def _routers(chunks: list[DistributedDataParallel]) -> Iterator[BalancedRouter]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                yield module


def _summary(heads: list[float], counts_LE: Tensor, *, is_training: bool) -> Measures:
    loss, tokens, mtp_loss, mtp_targets = heads[:4]
    moe_LE = counts_LE[counts_LE.sum(dim=1) > 0]
    load = (moe_LE.amax(dim=1) / moe_LE.mean(dim=1)).tolist() if is_training else []
    aux = tuple(
        (name, heads[4 + index] / tokens / max(len(moe_LE), 1))
        for index, (name, _) in enumerate(AUX_LOSSES)
        if heads[4 + index] != 0
    )
    return Measures(
        loss=loss / tokens,
        loss_tokens=int(tokens),
        mtp_loss=mtp_loss / mtp_targets if mtp_targets else None,
        aux_losses=aux,
        expert_load=tuple(load),
    )
