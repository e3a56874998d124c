"""Runs whole models in float64, their sequences shared by cp ranks and not, for a test to compare.

Run as a program with FOLDER, and "every" for all cases: leaves in FOLDER/cpN.pt what each case of N
ranks gave, summed over them; of one rank also what sequences of several documents give, and what
their documents give one by one. Megatron-core is imported once; each rank is a fork.
"""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megamoe.mcore import double

if __name__ == "__main__":
    double.enable()  # before Megatron-core is imported

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Megatron-core, about itself
    import torch

    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import groups
    from megamoe.mcore.compat import take_mtp_losses
    from megamoe.mcore.data import make_batch
    from megamoe.mcore.engine import _forward_step
    from megamoe.mcore.init import initialize
    from megamoe.mcore.model import build_chunk

from megamoe.plan.plan import Plan
from megamoe.recipe import Model, Mtp, Router
from tests.mcore import tiny

SEQ_LEN = 48
SIZES = (1, 2, 3, 4, 8)
LENGTHS = {cp: SEQ_LEN // cp for cp in SIZES}  # of shards
# Of layers without a window: "auto" is "gather" for so small a model, and two heads go to two ranks.
SCHEMES = {1: "auto", 2: "heads", 3: "ring", 4: "gather", 8: "ring"}
END, PAD = 0, 1
# Where documents end: one of one token in front, two side by side, before, at and after the edges
# of shards (6, 8, 12, 16, 24 and their multiples); in the last none, so that it is longer.
ENDS = ((0, 6, 7, 8, 21, 22, 35), (4, 11, 12, 15, 23, 24, 31, 46, 47), ())
TIMEOUT = timedelta(seconds=120)  # of a collective whose other ranks have died
NO_BALANCING = Router(
    aux_loss=0.0, sequence_aux_loss=0.0, global_aux_loss=0.0, z_loss=0.0, bias_update_rate=0.0
)
SHORT = {"num_layers": 2, "window_pattern": "LG", "init_std": tiny.LATENT.hidden_dim**-0.5}
# Two depths: what the first may see of a document, the second sees one token less of.
MODELS = {
    "latent": replace(tiny.LATENT, **SHORT, mtp=Mtp(num_layers=2, ffn="moe")),
    "grouped": replace(tiny.GROUPED, **SHORT, mtp=Mtp(num_layers=2, ffn="dense")),
    "yarn": replace(tiny.DUAL, num_layers=2),
}
Results = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one text."""

    model: str
    window: int | None  # None: that of the model
    packed: bool  # documents are masked
    mtp: bool
    router: Router = tiny.ROUTER

    def __str__(self) -> str:
        packed, mtp = ("packed", "whole")[not self.packed], ("mtp", "no mtp")[not self.mtp]
        return f"{self.model}, window {self.window}, {packed}, {mtp}"


def windows(cp: int) -> tuple[int, ...]:
    """Return 1, and what is smaller than a shard, as large, larger, and larger than the sequence."""
    length = LENGTHS[cp]
    return (1, length // 2, length, length + 3, SEQ_LEN + 12)


def cases(cp: int, *, every: bool) -> list[Case]:
    """Return what is compared with one rank; for one rank, all that is."""
    if cp == 1:
        return list(dict.fromkeys(case for size in SIZES for case in _own(size, every=every)))
    return _own(cp, every=every)


def _own(cp: int, *, every: bool) -> list[Case]:
    found = [
        Case(model=model, window=window, packed=packed, mtp=mtp)
        for model in ("latent", "grouped")
        for window in windows(cp)
        for packed in (True, False)
        for mtp in (True, False)
    ]
    # A halo from one rank and from two; layers without a window do what SCHEMES says.
    few = {"latent": LENGTHS[cp], "grouped": LENGTHS[cp] + 3}
    return [
        case
        for case in found
        if every or (case.packed and case.mtp and few[case.model] == case.window)
    ]


def plan_of(folder: Path, cp: int) -> Plan:
    """Return a plan of so many ranks, to be given the models of cases."""
    layout = replace(tiny.LAYOUT, cp=cp, cp_scheme=SCHEMES[cp], micro_batch=len(ENDS))
    plan = tiny.tiny_plan(folder / f"text{cp}", world_size=cp, seq_len=SEQ_LEN, layout=layout)
    return replace(plan, deterministic=False)


def sequences() -> list[Results]:
    """Return whole sequences of documents."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for ends in ENDS:
        text = torch.randint(2, tiny.VOCAB, (SEQ_LEN + 1,), generator=generator)
        text[list(ends)] = END
        samples.append(_sample(text[:-1], text[1:], torch.ones(SEQ_LEN)))
    return samples


def documents() -> list[Results]:
    """Return each document of the sequences in a sequence of its own, padded."""
    found = []
    for sample, ends in zip(sequences(), ENDS, strict=True):
        stops = [end + 1 for end in ends]
        if not ends or stops[-1] != SEQ_LEN:
            stops.append(SEQ_LEN)
        for start, stop in zip((0, *stops), stops, strict=False):
            length = stop - start
            own, labels = (torch.full((SEQ_LEN,), PAD) for _ in range(2))
            own[:length] = sample["tokens"][start:stop]
            labels[:length] = sample["labels"][start:stop]
            # The last document of a sequence goes on in the next, with a token to be predicted.
            predicted = torch.arange(SEQ_LEN) < length - (stop - 1 in ends)
            found.append(_sample(own, labels, predicted.double()))
    return found


def _sample(tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> Results:
    positions = torch.arange(SEQ_LEN)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}


def run(plan: Plan, case: Case, samples: list[Results]) -> Results:
    """Return losses, numbers of tokens and gradients of one micro-batch, summed over the ranks."""
    model: Model = MODELS[case.model]
    model = replace(model, window=case.window or model.window, mtp=model.mtp if case.mtp else None)
    segment = replace(
        plan.segments[0],
        router=case.router,
        mtp_loss=0.3 if case.mtp else None,
        document_mask=case.packed,
    )
    plan = replace(plan, model=model, segments=(segment,))
    torch.manual_seed(plan.seed)
    module = build_chunk(plan, segment)
    initialize([module], std=model.init_std, seed=plan.seed)
    batch = make_batch(samples, END if case.packed else None)
    losses_BL, summed = _forward_step(iter([batch]), module)
    loss, num_tokens, measured = summed(losses_BL)
    loss.backward()
    results = {
        "loss": loss.detach(),
        "tokens": num_tokens.double(),
        "targets": measured["mtp_targets"].double(),
        **{name: weight.grad for name, weight in module.named_parameters()},
    }
    if (mtp_losses := take_mtp_losses()) is not None:
        results["mtp loss"] = mtp_losses
    cp = groups.context("tokens")
    whole_BS = torch.zeros(len(losses_BL), SEQ_LEN)
    masked_BL = losses_BL.detach() * batch["loss_mask"]
    whole_BS[:, cp.rank * masked_BL.shape[1] :][:, : masked_BL.shape[1]] = masked_BL
    results["loss of each token"] = whole_BS
    return {name: _summed(name, value) for name, value in results.items()}


def _summed(name: str, value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None, f"{name} has no gradient"
    value = value.contiguous()
    assert value.dtype == torch.float64, (name, value.dtype)
    torch.distributed.all_reduce(value)
    return value


def compare_alone(plan: Plan) -> dict[str, tuple[Results, Results]]:
    """Return what sequences give with masked documents, and their documents one by one, without."""
    results = {}
    for model in MODELS:
        for window in (3, 60) if MODELS[model].window else (None,):
            case = Case(model=model, window=window, packed=True, mtp=True, router=NO_BALANCING)
            alone = replace(case, packed=False)
            results[str(case)] = run(plan, case, sequences()), run(plan, alone, documents())
    return results


def _be_rank(rank: int, folder: Path, plan: Plan, results_of: Callable[[Plan], Any]) -> None:
    cp = plan.segments[0].layout.cp
    torch.set_num_threads(1)
    # Megatron-Core 0.16.1 jit.py compiles small functions: a third of the time of so short a run.
    torch.compiler.set_stance("force_eager")
    store = torch.distributed.FileStore(str(folder / f"store{cp}"), cp)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=cp, timeout=TIMEOUT
    )
    groups.form(plan, plan.segments[0])
    results = results_of(plan)
    if rank == 0:
        torch.save(results, folder / f"cp{cp}.pt")
    torch.distributed.barrier()


def _fork(rank: int, *arguments: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _be_rank(rank, *arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    folder, every = Path(sys.argv[1]), sys.argv[2:] == ["every"]
    gc.freeze()  # what imports have made is no garbage; looking for it takes a rank seconds

    def results_of(plan: Plan) -> Any:
        cp = plan.segments[0].layout.cp
        shared = {str(case): run(plan, case, sequences()) for case in cases(cp, every=every)}
        return (shared, compare_alone(plan)) if cp == 1 else shared

    for cp in SIZES:
        plan = plan_of(folder, cp)
        (folder / f"store{cp}").unlink(missing_ok=True)  # of an earlier run, whose ranks are gone
        children = [_fork(rank, folder, plan, results_of) for rank in range(cp)]
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            sys.exit(1)


if __name__ == "__main__":
    main()
