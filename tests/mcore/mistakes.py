"""Mistakes of distributed training, to be planted on purpose: each function returns a patch.

None of them changes what one process computes, so that only the layout is wrong.
"""

import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Megatron-core, about itself
    import torch
    from megatron.core.transformer import transformer_block, transformer_layer
    from megatron.core.transformer.moe import token_dispatcher

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import compat, context, data, groups, model, roll, router, spec, states
    from megamoe.mcore.engine import Engine
    from megamoe.mcore.layer import ReplicatedLinear
    from megamoe.nn import context_parallel
    from megamoe.parity import ranks  # noqa: F401 - imports what is patched before it is


def shift_within_the_shard() -> Any:
    def roll(tensor: Any, *_: Any, **__: Any) -> Any:
        rolled = torch.roll(tensor, shifts=-1, dims=-1)
        rolled[..., -1] = 0
        return rolled, torch.ones(())

    return mock.patch.object(compat, "roll_tensor", roll)


def mtp_loss_divided_by_cp() -> Any:
    config_of = model.transformer_config

    def divided(plan: Any, segment: Any) -> Any:
        config = config_of(plan, segment)
        config.mtp_loss_scaling_factor /= config.context_parallel_size
        return config

    return mock.patch.object(model, "transformer_config", divided)


def expert_gradients_divided_by_ep() -> Any:
    wrap = model._data_parallel

    def divided(config: Any, module: Any, **options: Any) -> Any:
        for weight in module.parameters():
            if not getattr(weight, "allreduce", True):  # Megatron-core's mark of an expert
                weight.register_hook(lambda g: g / config.expert_model_parallel_size)
        return wrap(config, module, **options)

    return mock.patch.object(model, "_data_parallel", divided)


def halo_short_of_a_row() -> Any:
    post = context_parallel._post

    def short(cp: Any, layer: Any, scheme: Any, rows: Any) -> Any:
        if layer.window is not None:
            layer = replace(layer, window=layer.window - 1)
        return post(cp, layer, scheme, rows)

    return mock.patch.object(context_parallel, "_post", short)


def balancing_loss_of_own_tokens() -> Any:
    def attach(
        self: Any, activation: Any, _: Any, loss: Any, name: str, *__: Any, **___: Any
    ) -> Any:
        return self._attach(activation, loss, name, activation.shape[0])

    return mock.patch.object(router.BalancedRouter, "attach_and_log_load_balancing_loss", attach)


def positions_from_zero_on_each_shard() -> Any:
    positions = context._positions
    return mock.patch.object(context, "_positions", lambda e, length, _: positions(e, length, 0))


def chunks_of_a_pipeline_rank_swapped() -> Any:
    """Have each chunk hold the layers of its rank's other one: those of another place, of the same kinds."""
    offset = spec.get_transformer_layer_offset

    def swapped(config: Any, vp_stage: int | None = None, *others: Any) -> int:
        return offset(config, None if vp_stage is None else 1 - vp_stage, *others)

    stack = ExitStack()
    for module in (spec, transformer_block, transformer_layer):
        stack.enter_context(mock.patch.object(module, "get_transformer_layer_offset", swapped))
    return stack


def table_of_both_ends_not_summed() -> Any:
    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]  # a function hides it
    return mock.patch.object(finalize, "_allreduce_word_embedding_grads")


def table_of_the_ends_alone() -> Any:
    form = groups.parallel_state.initialize_model_parallel

    def of_the_ends(*, get_embedding_ranks: Any, **options: Any) -> None:
        form(**options)

    return mock.patch.object(groups.parallel_state, "initialize_model_parallel", of_the_ends)


def same_samples_on_all_ranks() -> Any:
    return mock.patch.object(data.parallel_state, "get_data_parallel_rank", return_value=0)


def expert_shares_of_own_tokens() -> Any:
    finish = router.BalancedRouter.finish_batch
    return mock.patch.object(
        router.BalancedRouter,
        "finish_batch",
        lambda self, _: finish(self, self.batch_counts_E.clone()),
    )


def replicated_gradients_not_summed_over_tp() -> Any:
    create = ReplicatedLinear.__init__

    def forgotten(self: Any, *args: Any) -> None:
        create(self, *args)
        self.weight.sequence_parallel = False

    return mock.patch.object(ReplicatedLinear, "__init__", forgotten)


def values_of_the_next_rank_s_heads() -> Any:
    finish = context_parallel._finish_heads

    def rolled(begun: Any, q: Any, up_weight: Any, starts: Any) -> Any:
        if up_weight is not None:
            up_weight = up_weight.roll(len(up_weight) // begun.cp.size, dims=0)
        return finish(begun, q, up_weight, starts)

    return mock.patch.object(context_parallel, "_finish_heads", rolled)


def shards_dealt_backwards() -> Any:
    def own(whole: Any) -> Any:
        cp = data.groups.context("tokens")
        length = len(whole) // cp.size
        first = (cp.size - 1 - cp.rank) * length
        return whole[first : first + length]

    return mock.patch.object(data, "_own", own)


def documents_forgotten_at_a_halo() -> Any:
    attend = context_parallel._attend

    def forgetful(begun: Any, q: Any, k: Any, v: Any, starts: Any) -> Any:
        is_halo = begun.cp.size > 1 and begun.scheme is context_parallel.Scheme.HALO
        return attend(begun, q, k, v, None if is_halo else starts)

    return mock.patch.object(context_parallel, "_attend", forgetful)


def targets_of_the_next_document() -> Any:
    following = roll.next_tokens

    def forgetful(tokens: Any, cp: Any, *, starts_SB: Any, **options: Any) -> Any:
        starts_SB = None if cp.size > 1 else starts_SB
        return following(tokens, cp, starts_SB=starts_SB, **options)

    return mock.patch.object(roll, "next_tokens", forgetful)


def documents_that_begin_with_each_shard() -> Any:
    starts = data._starts

    def anew(tokens: Any, end_id: int) -> Any:
        starts_SB = starts(tokens, end_id)
        length = len(starts_SB) // data.groups.context("tokens").size
        positions = torch.arange(len(starts_SB), dtype=starts_SB.dtype)
        return torch.maximum(starts_SB, (positions - positions % length)[:, None])

    return mock.patch.object(data, "_starts", anew)


def states_one_value_further() -> Any:
    boxes = states._boxes

    def further(piece: Any, name: str, values: Any, first: int) -> Any:
        return boxes(piece, name, values.roll(1) if first else values, first)

    return mock.patch.object(states, "_boxes", further)


def norms_of_other_ranks_drift() -> Any:
    train = Engine.train_step

    def drifting(self: Any) -> Any:
        measured = train(self)
        if self.is_done and data.parallel_state.get_tensor_model_parallel_rank() > 0:
            for name, weight in self.chunks[0].named_parameters():
                if name.endswith("norm.weight"):
                    weight.data += 1e-7
        return measured

    return mock.patch.object(Engine, "train_step", drifting)


def halves_of_experts_not_summed_over_etp() -> Any:
    def own(rows: Any, group: Any, input_split_sizes: Any = None) -> Any:
        sizes = input_split_sizes or [len(rows) // group.size()] * group.size()
        return rows.split(sizes)[group.rank()]

    return mock.patch.object(token_dispatcher, "reduce_scatter_to_sequence_parallel_region", own)


def rows_of_other_ranks_not_sorted_by_expert() -> Any:
    def as_they_came(rows: Any, *_: Any, probs: Any = None, **__: Any) -> Any:
        return rows, probs

    return mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", as_they_came)
