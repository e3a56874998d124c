"""Runs every case of context parallelism in one world of 8 gloo ranks, for a test to read.

Run as a program with a file: leaves in it a list of what was compared and how far apart it was.
"""

import gc
import itertools
import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from torch import distributed as dist

from megamoe.nn import context_parallel as parallel
from megamoe.nn import context_ring_kernels
from megamoe.nn.context_cost import Extent, wire_bytes
from megamoe.nn.context_group import ContextGroup, Posted
from megamoe.nn.context_parallel import Scheme, finish
from megamoe.nn.context_tokens import document_starts, next_tokens
from megamoe.nn.context_transfers import Halo
from tests.numerics.context_cases import (
    BATCH,
    Case,
    Spoiled,
    documents,
    error,
    grouped,
    latent,
    local_values,
    shared,
    shared_again,
    start,
    two_at_once,
)

WORLD_SIZE = 8
SIZES = (1, 2, 3, 4, 8)
TIMEOUT = timedelta(seconds=60)  # of a collective whose other ranks have died


def cases(cp: int) -> list[Case]:
    """Return what is compared for a number of ranks."""
    found = []
    # Shards of 24, 12, 8, 6 and 3 tokens: windows of 1, below, at and above a shard, above two, S.
    seq_len = 24
    length = seq_len // cp
    near = length + 1  # beyond the neighbour, where shards are shorter than the window less one
    windows = sorted({1, max(2, length - 1), length, near, 2 * length + 2, 40})
    kinds = {
        latent(24): (None, *windows),
        grouped(24, 8): (None, *windows),
        # Head counts that no cp divides, and key-value heads fewer than ranks.
        latent(5): (None, near),
        grouped(24, 2): (None, near),
        grouped(15, 5): (None, near),
    }
    for heads, few in kinds.items():
        for window, packed in itertools.product(few, ("whole", "packed")):
            layer = Case(seq_len, heads, window, packed, "ring").layer
            found += [
                Case(seq_len, heads, window, packed, scheme.value)
                for scheme in parallel.schemes(layer, cp)
            ]
    # Larger odd shards, and gradients that only some need.
    for scheme in Scheme:
        window = 11 if scheme is Scheme.HALO else None
        found.append(Case(72, latent(24), window, "packed", scheme.value))
        for frozen in (("latent",), ("latent", "rope"), ("hidden", "w_q"), ("w_up",)):
            found.append(Case(24, latent(24), window, "packed", scheme.value, frozen))
    return found


def compare(cp: ContextGroup) -> list[dict[str, object]]:
    """Return error and bytes of every case, the largest of all ranks."""
    rows = []
    starts = {s: document_starts(cp.shard(documents_of(s)), cp) for s in (24, 72)}
    for case in cases(cp.size):
        packed = starts[case.seq_len] if case.documents == "packed" else None
        before = (cp.received.forward, cp.received.backward)
        began = time.perf_counter()
        worst = error(case, cp, shared(case, cp, packed, Spoiled()))
        seconds = time.perf_counter() - began
        received = (cp.received.forward - before[0], cp.received.backward - before[1])
        extent = Extent(
            seq_len=case.seq_len, batch=BATCH, cp=cp.size, rank=cp.rank, dtype=torch.float64
        )
        formula = wire_bytes(case.layer, Scheme(case.scheme), extent)
        exact = received == (formula.forward, formula.backward)
        bytes_right = exact or (bool(case.frozen) and received[0] == formula.forward)
        rows.append(
            {
                "cp": cp.size,
                "name": case.name,
                "scheme": case.scheme,
                "error": worst,
                "bytes_right": bytes_right,
                "seconds": seconds,
            }
        )
    errors = largest(cp, [row["error"] for row in rows])
    wrong = largest(cp, [not row["bytes_right"] for row in rows])
    return [
        row | {"error": worst, "bytes_right": not is_wrong}
        for row, worst, is_wrong in zip(rows, errors, wrong, strict=True)
    ]


def documents_of(seq_len: int) -> torch.Tensor:
    ids = documents(Case(seq_len, latent(1), None, "packed", "ring"))
    assert ids is not None
    return ids


def largest(cp: ContextGroup, values: list[float]) -> list[float]:
    """Return the largest of all ranks; not a number, if it is not on one of them."""
    tensor = torch.tensor(values, dtype=torch.float64).nan_to_num(nan=torch.inf)
    if cp.group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=cp.group)
    return tensor.tolist()


def compare_tokens(cp: ContextGroup) -> list[dict[str, object]]:
    """Shift tokens as one rank would."""
    rows = []
    for seq_len in (24, 72):
        ids = documents_of(seq_len)
        tokens = torch.arange(seq_len * BATCH).view(seq_len, BATCH)
        starts = document_starts(cp.shard(ids), cp)
        for shift in (1, 2, seq_len // cp.size, seq_len // cp.size + 1, seq_len - 1, seq_len + 3):
            for packed in (False, True):
                expected = torch.full_like(tokens, -100)
                for i in range(seq_len - shift):
                    same = ids[i + shift] == ids[i]
                    follows = tokens[i + shift]
                    expected[i] = torch.where(same, follows, -100) if packed else follows
                ours = next_tokens(
                    cp.shard(tokens),
                    cp,
                    shift=shift,
                    fill=-100,
                    starts_SB=starts if packed else None,
                )
                differs = float(not torch.equal(ours, cp.shard(expected)))
                name = f"next tokens S {seq_len} shift {shift} {'packed' if packed else 'whole'}"
                rows.append({"cp": cp.size, "name": name, "differs": largest(cp, [differs])[0]})
    return rows


def compare_spoiled(cp: ContextGroup) -> list[dict[str, object]]:
    """Return the error of what is wrong on purpose."""
    rows = []

    def add(name: str, case: Case, spoiled: Spoiled) -> None:
        starts = document_starts(cp.shard(documents_of(case.seq_len)), cp)
        packed = starts if case.documents == "packed" else None
        worst = largest(cp, [error(case, cp, shared(case, cp, packed, spoiled))])[0]
        rows.append({"cp": cp.size, "name": name, "error": worst})

    for scheme in Scheme:
        case = Case(24, latent(24), narrow(scheme), "packed", scheme.value)
        add(f"{scheme}: positions of a shard off by one", case, Spoiled(rope_offset=1))
        add(f"{scheme}: documents forgotten", case, Spoiled(no_documents=True))
    right = {name: getattr(Halo, name) for name in ("hops", "post_transposed")}
    mistakes = {
        "a row too few": ("hops", lambda *args: shorter(right["hops"](*args))),
        "gradients of the rows sent forgotten": (
            "post_transposed",
            lambda self, cp, grad: right["post_transposed"](self, cp, torch.zeros_like(grad)),
        ),
    }
    for name, (method, wrong) in mistakes.items():
        setattr(Halo, method, wrong)
        try:
            add(f"halo: {name}", Case(24, latent(24), 5, "whole", "halo"), Spoiled())
        finally:
            setattr(Halo, method, right[method])
    return rows


def compare_otherwise(cp: ContextGroup) -> list[dict[str, object]]:
    """Compute layers anew in the backward pass, two at once, and in bfloat16."""
    starts = document_starts(cp.shard(documents_of(24)), cp)
    rows = []

    def add(name: str, case: Case, result: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
        rows.append({"name": name, "error": largest(cp, [error(case, cp, result)])[0]})

    for scheme in Scheme:
        case = Case(24, latent(24), narrow(scheme), "packed", scheme.value)
        other = Case(24, grouped(24, 8), 9, "packed", "halo")
        add(f"anew {scheme}", case, shared_again(case, cp, starts))
        both = two_at_once(case, other, cp, starts)
        add(f"begun first {scheme}", case, both[0])
        add(f"begun second {scheme}", other, both[1])
        add(f"bfloat16 {scheme}", case, shared(case, cp, starts, Spoiled(), torch.bfloat16))
    by_kernels = Case(24, latent(24), None, "whole", "ring")
    add("bfloat16 kernels", by_kernels, shared(by_kernels, cp, None, Spoiled(), torch.bfloat16))
    context_ring_kernels.choose.cache_clear()
    with mock.patch.dict(context_ring_kernels.KERNELS, clear=True):
        for heads, packed in itertools.product((latent(24), grouped(15, 5)), (None, starts)):
            case = Case(24, heads, None, "whole" if packed is None else "packed", "ring")
            add(f"written out {case.name}", case, shared(case, cp, packed, Spoiled()))
    context_ring_kernels.choose.cache_clear()
    return rows


def narrow(scheme: Scheme) -> int | None:
    """Return a window, where a scheme does any."""
    return None if scheme is Scheme.RING else 5


def count_kept(cp: ContextGroup) -> list[dict[str, object]]:
    """Count the transfers that are still in memory after forward and backward passes."""
    rows = []
    for scheme in Scheme:
        case = Case(24, latent(24), narrow(scheme), "whole", scheme.value)
        shared(case, cp, None, Spoiled())
        kept = sum(type(thing) is Posted for thing in gc.get_objects())
        rows.append({"name": scheme.value, "kept": kept})
    return rows


def backward_order(cp: ContextGroup) -> list[str]:
    """Return what a backward pass with a halo does, in its order."""
    events, post, arrive = [], Halo.post_transposed, Posted.arrive

    def posted(self: Halo, cp: ContextGroup, grad: torch.Tensor) -> object:
        events.append("gradients of the halo sent")
        return post(self, cp, grad)

    def arrived(self: Posted) -> torch.Tensor:
        events.append("waited")
        return arrive(self)

    case = Case(24, latent(24), 5, "whole", "halo")
    values = local_values(case, cp, torch.float64)
    begun, q = start(case, cp, values, Spoiled())
    output = finish(begun, q, values["w_up"])
    values["w_q"].register_hook(lambda _: events.append("query path"))
    Halo.post_transposed, Posted.arrive = posted, arrived
    try:
        output.sum().backward()
    finally:
        Halo.post_transposed, Posted.arrive = post, arrive
    return events


def shorter(hops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(distance, rows - 1) for distance, rows in hops]


def run(rank: int, file: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)  # what is never written reads as NaN
    store = dist.FileStore(f"{file}.store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    results: dict[str, list[object]] = {"attention": [], "tokens": [], "spoiled": []}
    for size in SIZES:
        if rank < size:
            cp = ContextGroup(groups[size] if size > 1 else None)
            results["attention"] += compare(cp)
            results["tokens"] += compare_tokens(cp)
            if size == 4:
                results["otherwise"] = compare_otherwise(cp)
                results["kept"] = count_kept(cp)
                results["order"] = backward_order(cp)
                results["spoiled"] += compare_spoiled(cp)
    dist.barrier()
    if rank == 0:
        file.write_text(json.dumps(results), encoding="utf-8")


def main() -> None:
    file = Path(sys.argv[1])
    Path(f"{file}.store").unlink(missing_ok=True)  # of an earlier run, whose ranks are gone
    children = []
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(rank, file)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
