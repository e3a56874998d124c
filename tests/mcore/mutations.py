"""Plants known mistakes of distributed training, one at a time, and shows that parity finds each.

    python -m tests.mcore.mutations            # without one, then each; 1 when one goes unnoticed
    python -m tests.mcore.mutations NAME       # one, with the table of `megamoe parity`

The mistakes themselves are in mistakes.py.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megamoe import __main__ as command
from tests.mcore import mistakes

Patch = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One mistake, and where it shows."""

    what: str
    recipe: str
    layout: str
    plant: Patch
    options: tuple[str, ...] = ()  # of `megamoe parity`


MUTATIONS = {
    "mtp_shift": Mutation(
        what="tokens of multi-token prediction shifted within a shard, not across its edge",
        recipe="k_exaone_236b_a23b",
        layout="cp2",
        plant=mistakes.shift_within_the_shard,
    ),
    "mtp_scale": Mutation(
        what="loss of multi-token prediction divided by cp",
        recipe="k_exaone_236b_a23b",
        layout="cp2",
        plant=mistakes.mtp_loss_divided_by_cp,
    ),
    "expert_divisor": Mutation(
        what="gradients of experts divided by ep",
        recipe="vaetki_7b_a1b",
        layout="ep2",
        plant=mistakes.expert_gradients_divided_by_ep,
    ),
    "expert_halves": Mutation(
        what="what halves of an expert give not summed over etp",
        recipe="k_exaone_236b_a23b",
        layout="tp2xetp2",
        plant=mistakes.halves_of_experts_not_summed_over_etp,
    ),
    "expert_rows": Mutation(
        what="rows of several ranks not sorted by expert, nor back",
        recipe="vaetki_7b_a1b",
        layout="ep2",
        plant=mistakes.rows_of_other_ranks_not_sorted_by_expert,
    ),
    "halo": Mutation(
        what="halo short of one row",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=mistakes.halo_short_of_a_row,
    ),
    "aux_loss": Mutation(
        what="balancing loss weighted with a rank's own tokens",
        recipe="vaetki_7b_a1b",
        layout="tp2",
        plant=mistakes.balancing_loss_of_own_tokens,
    ),
    "rope_offset": Mutation(
        what="positions that begin at 0 on each shard",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=mistakes.positions_from_zero_on_each_shard,
    ),
    "vpp_chunk": Mutation(
        what="layers of the two chunks of a pipeline rank swapped",
        recipe="keural_14b",
        layout="pp2xvpp2",
        plant=mistakes.chunks_of_a_pipeline_rank_swapped,
    ),
    "tied_table": Mutation(
        what="gradients of a table for both ends of the pipeline not summed over them",
        recipe="keural_14b",
        layout="pp2",
        plant=mistakes.table_of_both_ends_not_summed,
    ),
    "table_between": Mutation(
        what="gradients of the embedding summed over both ends, not where multi-token prediction is",
        recipe="k_exaone_236b_a23b",
        layout="pp3xEtt|ttm|L",
        plant=mistakes.table_of_the_ends_alone,
    ),
    "samples": Mutation(
        what="all data-parallel ranks read the samples of the first",
        recipe="vaetki_7b_a1b",
        layout="dp2",
        plant=mistakes.same_samples_on_all_ranks,
    ),
    "expert_shares": Mutation(
        what="global aux loss by the expert shares of a rank's own tokens",
        recipe="vaetki_7b_a1b",
        layout="dp2",
        plant=mistakes.expert_shares_of_own_tokens,
    ),
    "replicated": Mutation(
        what="gradients of MLA's replicated projections not summed over tp",
        recipe="vaetki_7b_a1b",
        layout="tp2",
        plant=mistakes.replicated_gradients_not_summed_over_tp,
    ),
    "heads": Mutation(
        what="latents projected up for the heads of another rank",
        recipe="vaetki_7b_a1b",
        layout="cp2xheads",
        plant=mistakes.values_of_the_next_rank_s_heads,
    ),
    "shards": Mutation(
        what="shards of a sequence dealt backwards",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=mistakes.shards_dealt_backwards,
    ),
    "document_halo": Mutation(
        what="documents forgotten where a halo is attended to",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=mistakes.documents_forgotten_at_a_halo,
        options=("--document-mask",),
    ),
    "document_mtp": Mutation(
        what="targets of multi-token prediction from the next document",
        recipe="k_exaone_236b_a23b",
        layout="cp2",
        plant=mistakes.targets_of_the_next_document,
        options=("--document-mask",),
    ),
    "document_shards": Mutation(
        what="documents that begin anew with each shard",
        recipe="vaetki_7b_a1b",
        layout="cp2",
        plant=mistakes.documents_that_begin_with_each_shard,
        options=("--document-mask",),
    ),
    "optimizer_state": Mutation(
        what="a rank's part of the optimizer's state stored one value further",
        recipe="vaetki_7b_a1b",
        layout="dp2",
        plant=mistakes.states_one_value_further,
    ),
    "copies": Mutation(
        what="norms drift on ranks that do not store them, after the last step",
        recipe="vaetki_7b_a1b",
        layout="tp2",
        plant=mistakes.norms_of_other_ranks_drift,
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
    hidden = "CUDA_VISIBLE_DEVICES="  # on a GPU ranks are no forks, and have not the mistake
    command = ["env", hidden, sys.executable, "-W", "ignore", "-m", *module]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
