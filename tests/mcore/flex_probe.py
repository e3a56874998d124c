"""Sends tokens to experts by each dispatcher, the libraries stood in for, on four ranks.

Run as a program; writes the answers to standard output. Each rank is a fork of this process.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch

    from tests.mcore import deep_ep_stand_in, tiny

    deep_ep_stand_in.install()
    from megamoe.mcore import cpu

    cpu.enable()
    from megamoe.mcore import groups
    from megamoe.mcore.dispatchers import missing, settle_dispatcher
    from megamoe.mcore.model import build_model
    from megamoe.mcore.sharing import Sharing, agreed

from megamoe.nn.context_cost import Extent, Machine
from megamoe.plan.plan import Plan

DISPATCHERS = ("all_to_all", "all_gather", "deepep", "hybridep")
WORLD = 4
MODEL = replace(tiny.GROUPED, num_layers=2, mtp=None)  # a layer without experts and one with
AXES = {"tp": 2, "ep": 2, "etp": 2}  # tokens, experts and their matrices are spread


def with_dispatcher(plan: Plan, dispatcher: str, **cluster: str) -> Plan:
    segment = plan.segments[0]
    layout = replace(segment.layout, dispatcher=dispatcher)
    return replace(
        plan,
        cluster=replace(plan.cluster, **cluster),
        segments=(replace(segment, layout=layout),),
    )


def gradients(plan: Plan, rank: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return the classes that move tokens, and loss and gradients of one micro-batch."""
    [chunk] = build_model(plan, plan.segments[0])
    chunk.zero_grad_buffer()
    generator = torch.Generator().manual_seed(rank // plan.segments[0].layout.tp)
    tokens_BS = torch.randint(2, tiny.VOCAB, (2, 16), generator=generator)
    positions_BS = torch.arange(16).expand(2, 16)
    losses_BS = chunk(tokens_BS, positions_BS, None, labels=tokens_BS.roll(-1, 1))
    losses_BS.sum().backward()
    found = {name: weight.main_grad.clone() for name, weight in chunk.named_parameters()}
    dispatchers = [m.token_dispatcher for m in chunk.modules() if hasattr(m, "token_dispatcher")]
    names = {type(getattr(each, "_comm_manager", each)).__name__ for each in dispatchers}
    return sorted(names), found | {"loss": losses_BS.detach().sum()}


def answers_of(plan: Plan, rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    expected: dict[str, torch.Tensor] = {}
    for dispatcher in DISPATCHERS:
        names, values = gradients(with_dispatcher(plan, dispatcher), rank)
        expected = expected or values
        answers[dispatcher] = {
            "names": names,
            "without a gradient": [name for name, value in values.items() if not value.any()],
            "difference": max(
                float((values[name] - value).abs().max() / value.abs().max())
                for name, value in expected.items()
            ),
        }
    on_gpus = with_dispatcher(plan, "deepep", device="cuda")
    _, answers["notes"] = settle_dispatcher(on_gpus, on_gpus.segments[0])
    if rank == 2:
        del sys.modules["deep_ep"].Buffer
    segment, answers["notes where rank 2 has none"] = settle_dispatcher(
        on_gpus, on_gpus.segments[0]
    )
    answers["dispatcher where rank 2 has none"] = segment.layout.dispatcher
    alike = Sharing(
        asked="auto",
        extent=Extent(seq_len=8, batch=1, cp=2, rank=0, dtype=torch.float32),
        machine=Machine(link_bytes_per_s=1.0, flops_per_s=1.0, message_s=1.0),
    )
    lacking = replace(alike, machine=replace(alike.machine, has_ring_kernel=rank != 2))
    answers["has ring kernel"], answers["has ring kernel where rank 2 has none"] = (
        agreed(mine, groups.saving()).machine.has_ring_kernel for mine in (alike, lacking)
    )
    return answers


def be_rank(plan: Plan, folder: Path, rank: int) -> None:
    torch.compiler.set_stance("force_eager")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    groups.form(plan, plan.segments[0])
    (folder / f"{rank}.json").write_text(json.dumps(answers_of(plan, rank)))


def fork(plan: Plan, folder: Path, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        be_rank(plan, folder, rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    assert missing("deepep") is missing("hybridep") is None
    layout = replace(tiny.LAYOUT, **AXES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = tiny.tiny_plan(
            folder / "data", MODEL, world_size=WORLD, dp=WORLD // layout.tp, layout=layout
        )
        children = [fork(plan, folder, rank) for rank in range(WORLD)]
        assert not any(os.waitpid(child, 0)[1] for child in children)
        texts = [(folder / f"{rank}.json").read_text() for rank in range(WORLD)]
    sys.stdout.write(f"[{','.join(texts)}]")


if __name__ == "__main__":
    main()
