"""The routed experts of a layer: two weights for all of them, multiplied group by group.

Shapes: T tokens sorted by expert, E local experts, D hidden, F ffn of one expert (over etp).
"""

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamoe.nn.grouped import grouped_linear

Offset = tuple[int, int, int]  # axis, position on it, number of positions


class GroupedExperts(MegatronModule):
    """SwiGLU experts, with the outputs and the checkpoints of Megatron-core's SequentialMLP.

    Megatron-Core 0.16.1 transformer/moe/experts.py multiplies all experts at once only with
    Transformer Engine or grouped_gemm; SequentialMLP needs neither, and launches each expert by
    itself after waiting for the counts of tokens. A checkpoint has SequentialMLP's keys and shapes,
    expert by expert, so that each reads the other's and initial weights are the same.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: Any,
        **_: Any,  # name: Megatron-Core 0.19.2 transformer/moe/moe_layer.py gives one
    ) -> None:
        """Make room for this rank's experts, or for its part of each with etp above 1."""
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        ffn_dim, rest = divmod(config.moe_ffn_hidden_size, self.tp_group.size())
        assert rest == 0, (config.moe_ffn_hidden_size, self.tp_group.size())
        # The rows of the gate, then those of the other factor.
        self.weight1 = self._weight(2 * ffn_dim, config.hidden_size, split_dim=1)
        self.weight2 = self._weight(config.hidden_size, ffn_dim, split_dim=2)

    def forward(self, tokens_TD: Tensor, counts_E: Tensor, probs_T: Tensor) -> tuple[Tensor, None]:
        """Return each token's output of its expert times its weight there, and no bias.

        The sum over etp is the dispatcher's, as with SequentialMLP.
        """
        hidden_TF = _swiglu(grouped_linear(tokens_TD, self.weight1, counts_E), probs_T)
        return grouped_linear(hidden_TF, self.weight2, counts_E), None

    def backward_dw(self) -> None:
        """Do nothing: the backward pass has computed the gradients of the weights."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Offset, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return what a checkpoint holds, under the keys that SequentialMLP has."""
        assert not (metadata or {}).get("singleton_local_shards"), "one key for all experts"
        key, replica_id = f"{prefix}experts", (0, 0, self.dp_group.rank())
        build1 = partial(self._shards1, offsets=sharded_offsets)
        build2 = partial(self._shards2, offsets=sharded_offsets)
        return {
            f"{prefix}weight1": ShardedTensorFactory(
                f"{key}.linear_fc1.weight", self.weight1, build1, _merge1, replica_id
            ),
            f"{prefix}weight2": ShardedTensorFactory(
                f"{key}.linear_fc2.weight", self.weight2, build2, torch.stack, replica_id
            ),
        }

    def _weight(self, rows: int, columns: int, *, split_dim: int) -> nn.Parameter:
        shape = (self.num_local_experts, rows, columns)
        device = torch.cuda.current_device()
        weight = nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split_dim, stride=1)
        # Its gradient is reduced over the experts' own groups, in every layout. Megatron-Core 0.16.1
        # tensor_parallel/layers.py:886 says so of its own experts only with expert parallelism; with
        # ep 1 and tp above etp each rank would keep the gradient of its own tokens.
        weight.allreduce = False  # type: ignore[attr-defined]
        return weight

    def _expert_offset(self, expert: int, axis: int) -> Offset:
        position = self.ep_group.rank() * self.num_local_experts + expert
        return axis, position, self.ep_group.size() * self.num_local_experts

    def _shards1(
        self,
        key: str,
        weight_EFD: Tensor,
        replica_id: ReplicaId,
        _: slice | None,
        *,
        offsets: tuple[Offset, ...],
    ) -> list[list[ShardedTensor]]:
        """Return both factors of each expert; each is split over etp by itself."""
        rank, size = self.tp_group.rank(), self.tp_group.size()
        axis = len(offsets)
        return [
            [
                _shard(
                    key,
                    half_FD,
                    replica_id,
                    (*offsets, self._expert_offset(expert, axis), (axis + 1, position, 2 * size)),
                )
                for position, half_FD in zip((rank, size + rank), expert_FD.chunk(2), strict=True)
            ]
            for expert, expert_FD in enumerate(weight_EFD.detach().unbind())
        ]

    def _shards2(
        self,
        key: str,
        weight_EDF: Tensor,
        replica_id: ReplicaId,
        _: slice | None,
        *,
        offsets: tuple[Offset, ...],
    ) -> list[ShardedTensor]:
        axis = len(offsets)
        split = (axis + 2, self.tp_group.rank(), self.tp_group.size())
        return [
            _shard(key, matrix_DF, replica_id, (*offsets, self._expert_offset(expert, axis), split))
            for expert, matrix_DF in enumerate(weight_EDF.detach().unbind())
        ]


def _swiglu(hidden_TF: Tensor, probs_T: Tensor) -> Tensor:
    """Return silu(gate) * up * prob; the product with a float32 prob is rounded once."""
    gate_TF, up_TF = hidden_TF.chunk(2, dim=-1)
    return (nn.functional.silu(gate_TF) * up_TF * probs_T[:, None]).to(hidden_TF.dtype)


def _shard(
    key: str, matrix: Tensor, replica_id: ReplicaId, offsets: tuple[Offset, ...]
) -> ShardedTensor:
    """Return one expert's matrix at its place; the last offset is along one of its own axes."""
    return ShardedTensor.from_rank_offsets(
        key, matrix, *offsets, replica_id=replica_id, prepend_axis_num=len(offsets) - 1
    )


def _merge1(loaded: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(halves) for halves in loaded])
