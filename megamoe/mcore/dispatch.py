"""Tokens to experts and back where one rank holds them all: no messages, no question to the host.

Shapes: T tokens, E experts, K experts of a token, R = T * K rows sorted by expert, D hidden.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor, nn


def use_local_dispatch(model: nn.Module) -> None:
    """Replace the dispatchers of a model whose ranks hold whole layers of experts.

    Megatron-Core 0.16.1 moe_utils.py permute and token_dispatcher.py:862 bring counts and indices to
    the host in every layer, where a GPU then waits, and sort_chunks_by_idxs copies all rows into the
    order they have.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            dispatcher = module.token_dispatcher
            if dispatcher.ep_size == dispatcher.tp_size == 1:
                module.token_dispatcher = LocalDispatcher(module.config, dispatcher)


class LocalDispatcher(MoETokenDispatcher):
    """Copies each token to its experts' rows and adds up what they give."""

    def __init__(self, config: Any, groups: Any) -> None:
        """Take the groups of Megatron-core's dispatcher in its place."""
        assert config.moe_expert_capacity_factor is None, "every token goes to all its experts"
        assert not config.moe_shared_expert_overlap, "there are no messages to overlap with"
        self.config, self.shared_experts = config, None
        self.ep_group, self.tp_group = groups.ep_group, groups.tp_group
        self.tp_ep_group = groups.tp_ep_group
        self.ep_size = self.tp_size = 1
        self.tp_rank = 0
        self.cudagraph_attrs: list[str] = []
        self.valid_cudagraph_attrs = None

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the rows, sorted by expert and then by token, and the weight of each."""
        self.hidden_shape = hidden_states.shape
        num_tokens, top_k = len(routing_map), self.config.moe_router_topk
        self.counts_E = routing_map.sum(dim=0)
        # Where the map is true, expert by expert. Their number is known, so that a sort finds them
        # on the device; a mask would have to be counted.
        order_R = (~routing_map).T.reshape(-1).byte().argsort(stable=True)[: num_tokens * top_k]
        self.tokens_R = order_R % num_tokens
        self.rows_TK = self.tokens_R.argsort(stable=True).view(num_tokens, top_k)
        tokens_TD = hidden_states.reshape(num_tokens, -1)
        rows_RD: Tensor = _Spread.apply(tokens_TD, self.tokens_R, self.rows_TK)  # type: ignore[no-untyped-call]
        return rows_RD, probs.T.reshape(-1).index_select(0, order_R)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return both: the experts are here."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows, the number of each expert's, on the device, and their weights."""
        return hidden_states, self.counts_E, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the rows: they are in order."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return the rows: the tokens are here."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the sum of each token's rows, in the shape of the layer's input."""
        output_TD: Tensor = _Collect.apply(hidden_states, self.tokens_R, self.rows_TK)  # type: ignore[no-untyped-call]
        return output_TD.view(self.hidden_shape)


def _spread(x_TD: Tensor, tokens_R: Tensor) -> Tensor:
    return x_TD.index_select(0, tokens_R)


def _collect(x_RD: Tensor, rows_TK: Tensor) -> Tensor:
    """Return the sum of each token's rows: read, not scattered, so that the order is fixed."""
    return x_RD.index_select(0, rows_TK.reshape(-1)).view(*rows_TK.shape, -1).sum(dim=1)


class _Spread(torch.autograd.Function):
    """A row for each expert of each token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        """Return [R, D]."""
        ctx.save_for_backward(rows_TK)
        return _spread(x_TD, tokens_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the sum of the rows' gradients."""
        (rows_TK,) = ctx.saved_tensors
        return _collect(gradients[0], rows_TK), None, None


class _Collect(torch.autograd.Function):
    """The sum of the rows of each token."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        """Return [T, D]."""
        ctx.save_for_backward(tokens_R)
        return _collect(x_RD, rows_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return each row the gradient of its token."""
        (tokens_R,) = ctx.saved_tensors
        return _spread(gradients[0], tokens_R), None, None
