"""What windows save: MLA that sees everything in all layers, against 5 layers with a window to 1.

    python -m benchmarks.mla_windows -o benchmarks/results/mla_windows.json
    python -m benchmarks.mla_windows --device cpu --scale tiny     # no GPU: shows that it runs

VAETKI-100B's width and its longest sequence, one at a time, in bfloat16; forward and backward. Each
layer of a period is run by itself, so that only one layer's activations are in memory. Measured are
    attention  the norm before it and the attention module: projections, norms, scores
    layer      the whole layer with a dense MLP, as wide as the experts of a token together (8 routed
               and 1 shared of 2,048 are 18,432) but without routing
`vanilla` and `interleaved` take turns, and who goes first changes, so that neither has the machine's
better moments. `ratio` is vanilla over interleaved. VAETKI's report has 1.40 for the training of the
whole model (table 2, 48 layers), in which experts and their messages are the same for both.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Record, describe_machine, say
from benchmarks.timing import time_steps

RECIPE = "vaetki_100b_a10b"
PARTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": lambda layer, x: layer.self_attention(layer.input_layernorm(x), None)[0],
    "layer": lambda layer, x: layer(hidden_states=x, attention_mask=None)[0],
}
_WARM_UP = 3  # steps


def build_layers(plan: Any, device: torch.device) -> dict[str, list[Any]]:
    """Return one period of layers of each kind, from one layer with a window and one without."""
    from megatron.core.transformer.spec_utils import build_module

    from megamoe.mcore.config import transformer_config
    from megamoe.mcore.spec import layer_spec

    model, segment = plan.model, plan.segments[0]
    config = transformer_config(plan, segment)
    either = []
    for is_local in (False, True):
        spec = layer_spec(config, model, segment, is_local=is_local, is_dense=True)
        layer = build_module(spec, config=config, layer_number=1).to(device, torch.bfloat16)
        for matrix in (p for p in layer.parameters() if p.ndim > 1):
            torch.nn.init.normal_(matrix, std=model.init_std)
        either.append(layer)
    pattern = [model.is_local(index) for index in range(model.num_layers)]
    return {"vanilla": [either[0]] * len(pattern), "interleaved": [either[x] for x in pattern]}


def step(run: Callable[[Any, Tensor], Tensor], layers: Sequence[Any], x: Tensor) -> None:
    """Run each layer forward and backward."""
    for layer in layers:
        run(layer, x).backward(x.detach())  # type: ignore[no-untyped-call]


def in_turns(
    steps: Mapping[str, Callable[[], None]], device: torch.device, *, warmup: int, count: int
) -> dict[str, list[float]]:
    """Return the seconds of `count` steps of each kind, one after the other by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + count):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            took = time_steps(steps[name], device, warmup=0, count=1)
            seconds[name] += took if turn >= warmup else []
    return seconds


def summary(seconds: dict[str, list[float]], num_layers: int) -> dict[str, Any]:
    """Return the seconds of a layer of each kind, and how much longer vanilla takes."""
    found: dict[str, Any] = {}
    for kind, of_steps in seconds.items():
        each = [x / num_layers for x in of_steps]
        found[kind] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    ratio = found["vanilla"]["median"] / found["interleaved"]["median"]
    return {"seconds_per_layer": found, "ratio": ratio}


def measure(args: argparse.Namespace, device: torch.device) -> Record:
    """Build, time and write."""
    from megamoe.mcore import cpu

    cpu.enable()  # before anything imports Megatron-core
    from benchmarks.megamoe_step import Load, make_plan, world_of_one
    from megamoe.nn.attention import describe
    from megamoe.recipe import MLA
    from megamoe.recipe.load import load_recipe
    from megamoe.recipe.scale import scale_tiny

    loaded = load_recipe(RECIPE)
    recipe = (scale_tiny(loaded) if args.scale == "tiny" else loaded).recipe
    recipe = replace(recipe, stages=recipe.stages[-1:])  # of the longest sequences
    load = Load(sequences=1, micro_batch=1, warmup=_WARM_UP, count=args.steps)
    plan = make_plan(recipe, len(recipe.model.window_pattern), load, device)
    heads, seq_len = plan.model.attention, plan.segments[0].seq_len
    assert isinstance(heads, MLA), heads
    key_dim = heads.qk_nope_head_dim + heads.qk_rope_head_dim
    head = {"recipe": RECIPE, "scale": args.scale, "seq_len": seq_len, "steps": load.count}
    record = Record(args.output, describe_machine(device) | head)
    with world_of_one(plan, device):
        kinds = build_layers(plan, device)
        record.result["attention kernels"] = describe(device, key_dim, heads.v_head_dim)
        record.result["windows"] = {
            kind: [layer.self_attention.core_attention.window for layer in layers]
            for kind, layers in kinds.items()
        }
        x = torch.randn(seq_len, 1, plan.model.hidden_dim, device=device, dtype=torch.bfloat16)
        x.requires_grad_()
        for name, run in PARTS.items():
            steps = {kind: partial(step, run, layers, x) for kind, layers in kinds.items()}
            seconds = in_turns(steps, device, warmup=load.warmup, count=load.count)
            record.add(name, found := summary(seconds, plan.model.num_layers))
            say(f"{name}: vanilla takes {found['ratio']:.3g} times as long")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both kinds; 2 where there is no GPU and a CPU was not asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed, of each (20)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="result, as JSON")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "mla_windows: this machine has no CUDA device; give --device cpu --scale tiny\n"
        )
        return 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core's, about itself
        record = measure(args, torch.device(args.device))
    if record.path is None:
        sys.stdout.write(json.dumps(record.result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
