"""Plants known mistakes of distributed training, one at a time, and shows that parity finds each.

    python -m tests.mcore.mutations            # without one, then each; 1 when one goes unnoticed
    python -m tests.mcore.mutations NAME       # one, with the table of `megamoe parity`

None of them changes what one process computes, so that only the layout is wrong.
"""

import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from megamoe import __main__ as command

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Megatron-core, about itself
    import torch
    from megatron.core.transformer import transformer_block, transformer_layer

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import compat, context, data, model, roll, router, spec, states
    from megamoe.mcore.engine import Engine
    from megamoe.mcore.layer import ReplicatedLinear
    from megamoe.nn import context_parallel
    from megamoe.parity import ranks  # noqa: F401 - imports what is patched before it is

Patch = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One mistake, and where it shows."""

    what: str
    recipe: str
    layout: str
    plant: Patch
    options: tuple[str, ...] = ()  # of `megamoe parity`


def _shift_within_the_shard() -> Any:
    def roll(tensor: Any, *_: Any, **__: Any) -> Any:
        rolled = torch.roll(tensor, shifts=-1, dims=-1)
        rolled[..., -1] = 0
        return rolled, torch.ones(())

    return mock.patch.object(compat, "roll_tensor", roll)


def _mtp_loss_divided_by_cp() -> Any:
    config_of = model.transformer_config

    def divided(plan: Any, segment: Any) -> Any:
        config = config_of(plan, segment)
        config.mtp_loss_scaling_factor /= config.context_parallel_size
        return config

    return mock.patch.object(model, "transformer_config", divided)


def _expert_gradients_divided_by_ep() -> Any:
    wrap = model._data_parallel

    def divided(config: Any, module: Any, **options: Any) -> Any:
        for weight in module.parameters():
            if not getattr(weight, "allreduce", True):  # Megatron-core's mark of an expert
                weight.register_hook(lambda g: g / config.expert_model_parallel_size)
        return wrap(config, module, **options)

    return mock.patch.object(model, "_data_parallel", divided)


def _halo_short_of_a_row() -> Any:
    post = context_parallel._post

    def short(cp: Any, layer: Any, scheme: Any, rows: Any) -> Any:
        if layer.window is not None:
            layer = replace(layer, window=layer.window - 1)
        return post(cp, layer, scheme, rows)

    return mock.patch.object(context_parallel, "_post", short)


def _balancing_loss_of_own_tokens() -> Any:
    def attach(
        self: Any, activation: Any, _: Any, loss: Any, name: str, *__: Any, **___: Any
    ) -> Any:
        return self._attach(activation, loss, name, activation.shape[0])

    return mock.patch.object(router.BalancedRouter, "attach_and_log_load_balancing_loss", attach)


def _positions_from_zero_on_each_shard() -> Any:
    positions = context._positions
    return mock.patch.object(context, "_positions", lambda e, length, _: positions(e, length, 0))


def _chunks_of_a_pipeline_rank_swapped() -> Any:
    """Have each chunk hold the layers of its rank's other one: those of another place, of the same kinds."""
    offset = spec.get_transformer_layer_offset

    def swapped(config: Any, vp_stage: int | None = None, *others: Any) -> int:
        return offset(config, None if vp_stage is None else 1 - vp_stage, *others)

    stack = ExitStack()
    for module in (spec, transformer_block, transformer_layer):
        stack.enter_context(mock.patch.object(module, "get_transformer_layer_offset", swapped))
    return stack


def _table_of_both_ends_not_summed() -> Any:
    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]  # a function hides it
    return mock.patch.object(finalize, "_allreduce_word_embedding_grads")


def _same_samples_on_all_ranks() -> Any:
    return mock.patch.object(data.parallel_state, "get_data_parallel_rank", return_value=0)


def _expert_shares_of_own_tokens() -> Any:
    finish = router.BalancedRouter.finish_batch
    return mock.patch.object(
        router.BalancedRouter,
        "finish_batch",
        lambda self, _: finish(self, self.batch_counts_E.clone()),
    )


def _replicated_gradients_not_summed_over_tp() -> Any:
    create = ReplicatedLinear.__init__

    def forgotten(self: Any, *args: Any) -> None:
        create(self, *args)
        self.weight.sequence_parallel = False

    return mock.patch.object(ReplicatedLinear, "__init__", forgotten)


def _values_of_the_next_rank_s_heads() -> Any:
    finish = context_parallel._finish_heads

    def rolled(begun: Any, q: Any, up_weight: Any, starts: Any) -> Any:
        if up_weight is not None:
            up_weight = up_weight.roll(len(up_weight) // begun.cp.size, dims=0)
        return finish(begun, q, up_weight, starts)

    return mock.patch.object(context_parallel, "_finish_heads", rolled)


def _shards_dealt_backwards() -> Any:
    def own(whole: Any) -> Any:
        cp = data.groups.context("tokens")
        length = len(whole) // cp.size
        first = (cp.size - 1 - cp.rank) * length
        return whole[first : first + length]

    return mock.patch.object(data, "_own", own)


def _documents_forgotten_at_a_halo() -> Any:
    attend = context_parallel._attend

    def forgetful(begun: Any, q: Any, k: Any, v: Any, starts: Any) -> Any:
        is_halo = begun.cp.size > 1 and begun.scheme is context_parallel.Scheme.HALO
        return attend(begun, q, k, v, None if is_halo else starts)

    return mock.patch.object(context_parallel, "_attend", forgetful)


def _targets_of_the_next_document() -> Any:
    following = roll.next_tokens

    def forgetful(tokens: Any, cp: Any, *, starts_SB: Any, **options: Any) -> Any:
        starts_SB = None if cp.size > 1 else starts_SB
        return following(tokens, cp, starts_SB=starts_SB, **options)

    return mock.patch.object(roll, "next_tokens", forgetful)


def _documents_that_begin_with_each_shard() -> Any:
    starts = data._starts

    def anew(tokens: Any, end_id: int) -> Any:
        starts_SB = starts(tokens, end_id)
        length = len(starts_SB) // data.groups.context("tokens").size
        positions = torch.arange(len(starts_SB), dtype=starts_SB.dtype)
        return torch.maximum(starts_SB, (positions - positions % length)[:, None])

    return mock.patch.object(data, "_starts", anew)


def _states_one_value_further() -> Any:
    boxes = states._boxes

    def further(piece: Any, name: str, values: Any, first: int) -> Any:
        return boxes(piece, name, values.roll(1) if first else values, first)

    return mock.patch.object(states, "_boxes", further)


def _norms_of_other_ranks_drift() -> Any:
    train = Engine.train_step

    def drifting(self: Any) -> Any:
        measured = train(self)
        if self.is_done and data.parallel_state.get_tensor_model_parallel_rank() > 0:
            for name, weight in self.chunks[0].named_parameters():
                if name.endswith("norm.weight"):
                    weight.data += 1e-7
        return measured

    return mock.patch.object(Engine, "train_step", drifting)


MUTATIONS = {
    "mtp_shift": Mutation(
        what="tokens of multi-token prediction shifted within a shard, not across its edge",
        recipe="k_exaone_236b_a23b",
        layout="cp2",
        plant=_shift_within_the_shard,
    ),
    "mtp_scale": Mutation(
        what="loss of multi-token prediction divided by cp",
        recipe="k_exaone_236b_a23b",
        layout="cp2",
        plant=_mtp_loss_divided_by_cp,
    ),
    "expert_divisor": Mutation(
        what="gradients of experts divided by ep",
        recipe="vaetki_7b_a1b",
        layout="ep2",
        plant=_expert_gradients_divided_by_ep,
    ),
    "halo": Mutation(
        what="halo short of one row",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=_halo_short_of_a_row,
    ),
    "aux_loss": Mutation(
        what="balancing loss weighted with a rank's own tokens",
        recipe="vaetki_7b_a1b",
        layout="tp2",
        plant=_balancing_loss_of_own_tokens,
    ),
    "rope_offset": Mutation(
        what="positions that begin at 0 on each shard",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=_positions_from_zero_on_each_shard,
    ),
    "vpp_chunk": Mutation(
        what="layers of the two chunks of a pipeline rank swapped",
        recipe="keural_14b",
        layout="pp2xvpp2",
        plant=_chunks_of_a_pipeline_rank_swapped,
    ),
    "tied_table": Mutation(
        what="gradients of a table for both ends of the pipeline not summed over them",
        recipe="keural_14b",
        layout="pp2",
        plant=_table_of_both_ends_not_summed,
    ),
    "samples": Mutation(
        what="all data-parallel ranks read the samples of the first",
        recipe="vaetki_7b_a1b",
        layout="dp2",
        plant=_same_samples_on_all_ranks,
    ),
    "expert_shares": Mutation(
        what="global aux loss by the expert shares of a rank's own tokens",
        recipe="vaetki_7b_a1b",
        layout="dp2",
        plant=_expert_shares_of_own_tokens,
    ),
    "replicated": Mutation(
        what="gradients of MLA's replicated projections not summed over tp",
        recipe="vaetki_7b_a1b",
        layout="tp2",
        plant=_replicated_gradients_not_summed_over_tp,
    ),
    "heads": Mutation(
        what="latents projected up for the heads of another rank",
        recipe="vaetki_7b_a1b",
        layout="cp2xheads",
        plant=_values_of_the_next_rank_s_heads,
    ),
    "shards": Mutation(
        what="shards of a sequence dealt backwards",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=_shards_dealt_backwards,
    ),
    "document_halo": Mutation(
        what="documents forgotten where a halo is attended to",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=_documents_forgotten_at_a_halo,
        options=("--document-mask",),
    ),
    "document_mtp": Mutation(
        what="targets of multi-token prediction from the next document",
        recipe="k_exaone_236b_a23b",
        layout="cp2",
        plant=_targets_of_the_next_document,
        options=("--document-mask",),
    ),
    "document_shards": Mutation(
        what="documents that begin anew with each shard",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=_documents_that_begin_with_each_shard,
        options=("--document-mask",),
    ),
    "optimizer_state": Mutation(
        what="a rank's part of the optimizer's state stored one value further",
        recipe="vaetki_7b_a1b",
        layout="dp2",
        plant=_states_one_value_further,
    ),
    "copies": Mutation(
        what="norms drift on ranks that do not store them, after the last step",
        recipe="vaetki_7b_a1b",
        layout="tp2",
        plant=_norms_of_other_ranks_drift,
    ),
}


def _controls() -> dict[tuple[str, tuple[str, ...]], list[str]]:
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in MUTATIONS.values():
        layouts = found.setdefault((each.recipe, each.options), [])
        if each.layout not in layouts:
            layouts.append(each.layout)
    return found


CONTROLS = _controls()  # by recipe and options, the layouts of MUTATIONS: equal without a mistake


def main() -> int:
    """Plant one mistake, or all in turn."""
    if len(sys.argv) > 1:
        mutation = MUTATIONS[sys.argv[1]]
        with mutation.plant():
            layout = ("--layouts", mutation.layout)
            return command.main(["parity", mutation.recipe, *layout, *mutation.options])
    wrong = 0
    for recipe, options in CONTROLS:
        found = leave_as_it_is(recipe, options)
        wrong += found.returncode != 0
        layouts = " ".join((*CONTROLS[recipe, options], *options))
        outcome = "equal" if found.returncode == 0 else f"NOT EQUAL\n{found.stdout}{found.stderr}"
        _say(f"no mistake: {recipe} {layouts}\n  {outcome}")
    for name, mutation in MUTATIONS.items():
        text = plant(name)
        wrong += "DIFFERS" not in text
        where = next((line for line in text.splitlines() if " differs in " in line), "NOT NOTICED")
        _say(f"{name}: {mutation.what}\n  {where}")
    return 1 if wrong else 0


def plant(name: str) -> str:
    """Plant a mistake in a process of its own; return what `megamoe parity` prints."""
    done = _python("tests.mcore.mutations", name)
    return done.stdout + done.stderr


def leave_as_it_is(recipe: str, options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Compare the layouts of CONTROLS, with no mistake planted."""
    layouts = ",".join(CONTROLS[recipe, options])
    return _python("megamoe", "parity", recipe, "--layouts", layouts, *options)


def _python(*module: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", *module]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
