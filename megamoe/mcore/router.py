"""The router of an MoE layer: Megatron-core's, with balancing that does not depend on the layout."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class BalancedRouter(TopKRouter):
    """Top-k routing that counts its tokens and balances over the global batch.

    The global aux loss (Qiu et al. 2025, "Demons in the detail") weighs each expert's mean score
    by its share f of the tokens of the global batch. Megatron-Core 0.16.1 router.py (0.19.2: 526)
    adds up f over the micro-batches seen so far, so that the gradient depends on how a batch is cut
    into ranks and micro-batches. Here f is that of the global batch before, known alike to every layout, as
    the expert bias is (DeepSeek-V3, 2.1.2); in the first step f is even and the loss is flat.
    """

    def __init__(self, **options: Any) -> None:
        """Add the counts to Megatron-core's router."""
        super().__init__(**options)
        num_experts = self.config.num_moe_experts
        device = torch.cuda.current_device()
        counts = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.register_buffer("batch_counts_E", counts, persistent=False)
        shares = torch.full((num_experts,), 1 / num_experts, dtype=torch.float32, device=device)
        self.register_buffer("previous_shares_E", shares)
        self.loss_sums: dict[str, Tensor] = {}

    def routing(self, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Route as Megatron-core does and count the tokens of each expert."""
        probs_TE, map_TE = super().routing(logits, *args, **options)
        if self.training and torch.is_grad_enabled():
            self.batch_counts_E += map_TE.sum(dim=0)
        return probs_TE, map_TE

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's call
        """Keep counts, shares and biases as they are when the weights become bfloat16.

        In bfloat16 a count of tokens stops at 256. Megatron-Core 0.16.1 router.py mends its biases
        alone, before each use.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def finish_batch(self, global_counts_E: Tensor) -> None:
        """Take the counts of the finished global batch, over all ranks, and start the next."""
        total = global_counts_E.sum().clamp(min=1)
        self.previous_shares_E.copy_(global_counts_E / total)
        self.batch_counts_E.zero_()
        self.loss_sums.clear()

    def _apply_global_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,  # noqa: ARG002
        with_padding_mask: bool = False,  # noqa: FBT001, FBT002 - Megatron-core's call
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        assert not with_padding_mask, "padding is masked in the loss, not in the router"
        mean_scores_E = scores_for_aux_loss.float().mean(dim=0)
        loss = coefficient * self.config.num_moe_experts * (mean_scores_E @ self.previous_shares_E)
        return self._attach(probs, loss, "global_aux_loss", probs.shape[0])

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,  # noqa: ARG002
        aux_loss: Tensor,
        aux_loss_name: str,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Add this rank's part of a loss over the tokens of its tp x cp group.

        The parts of the group add up to the loss (Megatron-Core 0.16.1 moe_utils.py
        switch_load_balancing_loss_func with total_num_tokens), so each is weighted with the tokens
        of the whole group; 0.16.1 router.py weights with the rank's own and loses a factor tp x cp,
        0.19.2 (router.py:633) weights as here.
        """
        group_tokens = activation.shape[0] * self.tp_cp_group.size()
        return self._attach(activation, aux_loss, aux_loss_name, group_tokens)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Add coefficient * mean(logsumexp(logits)^2) over tokens (ST-MoE, eq. 5)."""
        assert padding_mask is None, "padding is masked in the loss, not in the router"
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        loss = coefficient * torch.logsumexp(logits.float(), dim=-1).square().mean()
        return self._attach(logits, loss, "z_loss", logits.shape[0])

    def _attach(self, activation: Tensor, loss: Tensor, name: str, num_tokens: int) -> Tensor:
        """Add a loss, times its tokens, to the backward pass and to this rank's sums.

        The sum of all losses is divided once by the global token count.
        """
        total = loss * num_tokens
        self.loss_sums[name] = self.loss_sums.get(name, 0) + total.detach()
        return MoEAuxLossAutoScaler.apply(activation, total)
