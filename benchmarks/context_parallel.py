"""What context parallelism sends: latents to where they are needed, against whole keys and values.

    OMP_NUM_THREADS=1 python -m benchmarks.context_parallel -o benchmarks/results/context_parallel.json

Schemes, all through megamoe/nn/context_parallel.py, and each right (tests/numerics):
    latent         a halo of latents, or of keys and values, for layers with a window; for the others
                   what the cost model chooses of heads, ring and gather.
    kv_all_gather  every layer gathers the keys and values of all heads, as Transformer Engine's
                   `all_gather` does, window or not.
    all_to_all     every layer changes heads for tokens, as DeepSpeed-Ulysses does: queries, keys,
                   values, outputs. Key-value heads fewer than ranks are sent to each that shares them.
Of MLA all begin with a rank's own latents and the up-projection of keys and values. Without latents
on the wire a rank expands its own, and its gradients go back through that.

Bytes are counted by the module from the tensors of the collectives that ran, all layers forward and
backward, those of multi-token prediction too, at the full size of the model in bfloat16, on tensors without memory and a process group without
peers; the rank is one in the middle, which has neighbours on both sides. Times are of one period of
layers at reduced width, in float32, on gloo processes of this machine: not of a GPU or a network.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.record import say
from megamoe.commit import running_commit
from megamoe.doctor.machine import this_machine
from megamoe.nn.context_cost import Extent, choose, explain, machine_of
from megamoe.nn.context_group import ContextGroup, WireBytes
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads, can_share_heads
from megamoe.nn.context_parallel import Scheme, begin, finish
from megamoe.plan.cli import named_cluster
from megamoe.recipe import MLA, Model
from megamoe.recipe.load import load_recipe

MODELS = ("vaetki_100b_a10b", "k_exaone_236b_a23b", "ax_k1_519b_a33b")
EXTENTS = ((32_768, 8), (131_072, 32))
SCHEMES = ("latent", "kv_all_gather", "all_to_all")
CLUSTER = "h200-8x400g"  # by whose rates the cost model chooses, as the engine does there
TIMED_WORLDS = (4, 8)
TIMED_SEQ_LEN, TIMED_WINDOW = 1_024, 64


Part = Literal["decoder", "mtp"]
Layers = Counter[tuple[AttentionLayer, Part]]  # how many are alike


@dataclass(frozen=True, slots=True)
class Planned:
    """Layers that are alike, and how they are computed."""

    heads: LatentHeads | GroupedHeads  # of the model: what a rank has of its own tokens
    layer: AttentionLayer  # what is sent and attended to
    scheme: Scheme
    num_layers: int
    part: Part


def layers_of(model: Model) -> Layers:
    """Return which attention layers a model has; those that predict further see everything."""
    kind = model.attention
    heads: LatentHeads | GroupedHeads
    if isinstance(kind, MLA):
        heads = LatentHeads(
            num_heads=kind.num_heads,
            latent_dim=kind.kv_lora_rank,
            nope_dim=kind.qk_nope_head_dim,
            rope_dim=kind.qk_rope_head_dim,
            value_dim=kind.v_head_dim,
        )
    else:
        heads = GroupedHeads(
            num_heads=kind.num_heads,
            num_kv_heads=kind.num_kv_heads,
            key_dim=kind.head_dim,
            value_dim=kind.head_dim,
        )
    windows = [model.window if model.is_local(i) else None for i in range(model.num_layers)]
    whole = AttentionLayer(heads=heads, window=None, scale=heads.key_dim**-0.5)
    layers: Layers = Counter((replace(whole, window=w), "decoder") for w in windows)
    if model.mtp is not None:
        layers[whole, "mtp"] = model.mtp.num_layers
    return layers


def plan(layers: Layers, scheme: str, extent: Extent) -> list[Planned] | None:
    """Return how a scheme computes a model; None where it cannot."""
    planned = []
    for (layer, part), count in layers.items():
        if scheme == "latent":
            costs = choose(layer, extent, machine_of(named_cluster(CLUSTER, 1), extent.cp))
            said = explain(costs, costs[0].scheme)
            say(f"  {count} layers ({part}), window {layer.window}: {said}")
            planned.append(Planned(layer.heads, layer, costs[0].scheme, count, part))
            continue
        whole = replace(layer, heads=expanded(layer.heads))
        chosen = Scheme.GATHER if scheme == "kv_all_gather" else Scheme.HEADS
        if chosen is Scheme.HEADS and not can_share_heads(whole.heads, extent.cp):
            return None
        planned.append(Planned(layer.heads, whole, chosen, count, part))
    return planned


def expanded(heads: LatentHeads | GroupedHeads) -> GroupedHeads:
    """Return the heads as they are without latents: a key and a value each."""
    if isinstance(heads, GroupedHeads):
        return heads
    return GroupedHeads(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_heads,
        key_dim=heads.key_dim,
        value_dim=heads.value_dim,
    )


def step(cp: ContextGroup, planned: Planned, inputs: Sequence[Tensor]) -> None:
    """Run one layer forward and backward."""
    q, one, other, *weight = inputs
    up_weight = weight[0] if weight else None
    if planned.heads != planned.layer.heads:
        one, other = planned.heads.expand(planned.heads.pack(one, other), up_weight)
        up_weight = None
    begun = begin(cp, planned.layer, planned.scheme, (one, other))
    finish(begun, q, up_weight).sum().backward()  # type: ignore[no-untyped-call]


def make_inputs(planned: Planned, extent: Extent) -> list[Tensor]:
    """Return queries, what keys and values are made of, and the up-projection if there is one."""
    heads, tokens = planned.heads, (extent.shard_len, extent.batch)
    shapes: list[tuple[int, ...]] = [(*tokens, heads.num_heads, heads.key_dim)]
    if isinstance(heads, LatentHeads):
        up = heads.num_heads * (heads.nope_dim + heads.value_dim)
        shapes += [(*tokens, heads.latent_dim), (*tokens, heads.rope_dim), (up, heads.latent_dim)]
    else:
        shapes += [(*tokens, heads.num_kv_heads, d) for d in (heads.key_dim, heads.value_dim)]
    return [torch.randn(shape, dtype=extent.dtype, requires_grad=True) for shape in shapes]


def count_bytes(planned: Sequence[Planned], extent: Extent) -> tuple[WireBytes, list[WireBytes]]:
    """Run every layer of a model; return what it received, and one layer of each kind."""
    each = []
    with group_without_peers(extent), FakeTensorMode():
        cp = ContextGroup(dist.group.WORLD)
        for part in planned:
            inputs = make_inputs(part, extent)
            layers = [received_by(cp, part, inputs) for _ in range(part.num_layers)]
            assert layers.count(layers[0]) == len(layers), layers
            each.append(layers[0])
    return cp.received, each


def received_by(cp: ContextGroup, planned: Planned, inputs: Sequence[Tensor]) -> WireBytes:
    """Run one layer and return what it received."""
    before = replace(cp.received)
    step(cp, planned, inputs)
    return WireBytes(
        forward=cp.received.forward - before.forward,
        backward=cp.received.backward - before.backward,
    )


@contextmanager
def group_without_peers(extent: Extent) -> Iterator[None]:
    """Be one rank of a world whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=extent.rank, world_size=extent.cp)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_rows(models: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each model, extent and scheme."""
    rows = []
    for name in models:
        model = load_recipe(name).recipe.model
        for seq_len, cp in EXTENTS:
            extent = Extent(seq_len=seq_len, batch=1, cp=cp, rank=cp // 2, dtype=torch.bfloat16)
            for scheme in SCHEMES:
                say(f"{name}, {seq_len} tokens, cp {cp}: {scheme}")
                planned = plan(layers_of(model), scheme, extent)
                rows.append(describe(name, scheme, extent, planned, model.num_layers))
    return rows


def describe(
    name: str, scheme: str, extent: Extent, planned: list[Planned] | None, num_layers: int
) -> dict[str, Any]:
    """Return one row; without bytes where the scheme cannot compute the model."""
    row: dict[str, Any] = {
        "model": name,
        "scheme": scheme,
        "seq_len": extent.seq_len,
        "cp": extent.cp,
        "num_layers": num_layers,
        "rank": extent.rank,
        "dtype": "bfloat16",
        "forward_bytes_per_rank": None,
        "backward_bytes_per_rank": None,
        "counted_from": "collectives",
        "layers": [],
        "refused": None,
    }
    if planned is None:
        return row | {"refused": f"heads cannot be shared out over cp {extent.cp}"}
    total, each = count_bytes(planned, extent)
    layers = [
        {
            "part": part.part,
            "num_layers": part.num_layers,
            "window": part.layer.window,
            "scheme": part.scheme.value,
            "forward_bytes_per_rank": wire.forward,
            "backward_bytes_per_rank": wire.backward,
        }
        for part, wire in zip(planned, each, strict=True)
    ]
    return row | {
        "forward_bytes_per_rank": total.forward,
        "backward_bytes_per_rank": total.backward,
        "layers": layers,
    }


def reduced(layers: Layers) -> Layers:
    """Return one period of a decoder's layers with an eighth of each dimension and at most 24 heads."""
    small: Layers = Counter()
    decoder = {kind: count for kind, count in layers.items() if kind[1] == "decoder"}
    fewest = min(decoder.values())
    for (layer, part), count in decoder.items():
        heads = layer.heads
        num_heads = min(24, heads.num_heads)
        narrow: LatentHeads | GroupedHeads
        if isinstance(heads, LatentHeads):
            narrow = LatentHeads(
                num_heads=num_heads,
                latent_dim=heads.latent_dim // 8,
                nope_dim=heads.nope_dim // 8,
                rope_dim=heads.rope_dim // 8,
                value_dim=heads.value_dim // 8,
            )
        else:
            narrow = replace(
                heads,
                num_heads=num_heads,
                key_dim=heads.key_dim // 8,
                value_dim=heads.value_dim // 8,
            )
        window = None if layer.window is None else TIMED_WINDOW
        small[replace(layer, heads=narrow, window=window), part] = round(count / fewest)
    return small


def time_world(world_size: int, models: Sequence[str], num_steps: int) -> dict[str, float]:
    """Return the median seconds of one period of layers, by model and scheme, on gloo ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        children = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    _time_rank(rank, world_size, (models, num_steps), file)
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
        assert not failed, "a rank failed; its error is above"
        times: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return times


def _time_rank(rank: int, size: int, what: tuple[Sequence[str], int], file: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{file}.store"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    cp = ContextGroup(dist.group.WORLD)
    extent = Extent(seq_len=TIMED_SEQ_LEN, batch=1, cp=size, rank=rank, dtype=torch.float32)
    models, num_steps = what
    times = {}
    for name in models:
        layers = reduced(layers_of(load_recipe(name).recipe.model))
        for scheme in SCHEMES:
            planned = _plan_quietly(layers, scheme, extent)
            inputs = [make_inputs(part, extent) for part in planned]
            seconds = []
            for _ in range(num_steps + 1):  # the first one connects the ranks
                dist.barrier()
                begun = time.perf_counter()
                for part, tensors in zip(planned, inputs, strict=True):
                    for _ in range(part.num_layers):
                        step(cp, part, tensors)
                dist.barrier()
                seconds.append(time.perf_counter() - begun)
            times[f"{name} {scheme}"] = statistics.median(seconds[1:])
    if rank == 0:
        file.write_text(json.dumps(times), encoding="utf-8")


def _plan_quietly(layers: Layers, scheme: str, extent: Extent) -> list[Planned]:
    """Plan as the full size would be: by halo and heads."""
    if scheme != "latent":
        planned = plan(layers, scheme, extent)
        assert planned is not None
        return planned
    planned = []
    for (layer, part), count in layers.items():
        chosen = Scheme.HEADS if layer.window is None else Scheme.HALO
        planned.append(Planned(layer.heads, layer, chosen, count, part))
    return planned


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the bytes of a forward pass by model and scheme."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(EXTENTS), figsize=(11, 4), sharey=True)
    for panel, (seq_len, cp) in zip(panels, EXTENTS, strict=True):
        for index, scheme in enumerate(SCHEMES):
            chosen = [
                row
                for row in rows
                if (row["seq_len"], row["cp"], row["scheme"]) == (seq_len, cp, scheme)
            ]
            places = [place + (index - 1) * 0.27 for place in range(len(chosen))]
            heights = [(row["forward_bytes_per_rank"] or 0) / 1e9 for row in chosen]
            bars = panel.bar(places, heights, width=0.25, label=scheme)
            panel.bar_label(bars, labels=[f"{h:.3g}" if h else "" for h in heights], fontsize=7)
            for place, row in zip(places, chosen, strict=True):
                if row["refused"]:
                    at = panel.get_xaxis_transform()
                    panel.text(
                        place, 0.02, "cannot", transform=at, rotation=90, ha="center", size=8
                    )
        models = [row["model"] for row in chosen]
        panel.set_xticks(range(len(models)), models, fontsize=8)
        panel.set_title(f"{seq_len // 1024}K tokens, cp {cp}")
    panels[0].set_yscale("log")
    panels[0].set_ylabel("GB received per rank, forward")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, time, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON; a plot goes beside it")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one")
    parser.add_argument("--steps", type=int, default=5, help="timed; 0: count only")
    args = parser.parse_args(arguments)
    models = args.model or MODELS
    rows = count_rows(models)
    machine = this_machine()
    where = {
        "machine": {"system": machine.system, "num_cpus": machine.num_cpus},
        "commit": running_commit(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    times = {size: time_world(size, models, args.steps) for size in TIMED_WORLDS if args.steps}
    for row in rows:
        row.update(where)
        kind = f"{row['model']} {row['scheme']}"
        for size in TIMED_WORLDS:
            is_timed = size in times and row["cp"] in TIMED_WORLDS
            row[f"reduced_seconds_{size}_gloo_ranks"] = times[size][kind] if is_timed else None
    if args.output is None:
        say(json.dumps(rows, indent=1))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
