"""What benchmarks/context_parallel.py counts is what the formula says, as is what it has written."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import context_parallel
from benchmarks.context_parallel import Planned
from megamoe.nn.context_cost import Extent, wire_bytes
from megamoe.nn.context_group import ContextGroup
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import Scheme
from tests.numerics.context_cases import latent

REPOSITORY = Path(__file__).parents[2]
WRITTEN = REPOSITORY / "benchmarks" / "results" / "context_parallel.json"
# Outputs and gradients are below 100 and sums of at most 4 * 21 products: 180 roundings of 2^-53.
TOLERANCE = 1e-12
HEADS = {
    "vaetki_100b_a10b": LatentHeads(
        num_heads=24, latent_dim=512, nope_dim=128, rope_dim=64, value_dim=128
    ),
    "k_exaone_236b_a23b": GroupedHeads(num_heads=64, num_kv_heads=8, key_dim=128, value_dim=128),
    "ax_k1_519b_a33b": LatentHeads(
        num_heads=64, latent_dim=512, nope_dim=128, rope_dim=64, value_dim=128
    ),
}
LAYERS = {  # part of the model, window
    "vaetki_100b_a10b": {("decoder", 512): 40, ("decoder", None): 8},
    "k_exaone_236b_a23b": {("decoder", 128): 36, ("decoder", None): 12, ("mtp", None): 1},
    "ax_k1_519b_a33b": {("decoder", None): 61, ("mtp", None): 1},
}
COUNT = """
import json
from benchmarks import context_parallel
from tests.numerics.watched_collectives import watch
watch()
context_parallel.EXTENTS = context_parallel.EXTENTS[:1]
print(json.dumps(context_parallel.count_rows(["vaetki_100b_a10b"])))
"""
COUNT_ONE_OF_EACH = """
import json
from collections import Counter
from benchmarks import context_parallel
from tests.numerics.watched_collectives import watch
watch()
context_parallel.EXTENTS = context_parallel.EXTENTS[1:]
layers_of = context_parallel.layers_of
context_parallel.layers_of = lambda model: Counter(set(layers_of(model)))
print(json.dumps(context_parallel.count_rows(context_parallel.MODELS)))
"""


@pytest.mark.slow
def test_one_layer_of_each_kind_is_counted_on_the_collectives_at_128k():
    rows = json.loads(python("-c", COUNT_ONE_OF_EACH))
    assert {(row["model"], row["cp"]) for row in rows} == {(name, 32) for name in HEADS}
    assert len(rows) == 3 * len(HEADS)
    for row in rows:
        check_row(row, dict.fromkeys(LAYERS[row["model"]], 1))


@pytest.mark.slow
def test_the_bytes_of_vaetki_100b_at_full_size_are_counted_on_the_collectives():
    rows = json.loads(python("-c", COUNT))
    assert {row["scheme"]: row["forward_bytes_per_rank"] for row in rows} == {
        "latent": 728_189_952,
        "kv_all_gather": 21_139_292_160,
        "all_to_all": 5_284_823_040,
    }
    for row in rows:
        check_row(row, LAYERS[row["model"]])


@pytest.mark.parity
def test_the_benchmark_writes_what_it_counted_at_every_extent(tmp_path):
    file = tmp_path / "counted.json"
    options = ["--model", "vaetki_100b_a10b", "--steps", "0", "-o", str(file)]
    python("-m", "benchmarks.context_parallel", *options)
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["cp"] for row in rows] == [8, 8, 8, 32, 32, 32]
    for row in rows:
        check_row(row, LAYERS[row["model"]])


def test_what_is_written_is_what_the_formula_says_today():
    rows = json.loads(WRITTEN.read_text(encoding="utf-8"))
    assert [(row["model"], row["seq_len"], row["cp"], row["scheme"]) for row in rows] == [
        (name, seq_len, cp, scheme)
        for name in HEADS
        for seq_len, cp in ((32_768, 8), (131_072, 32))
        for scheme in ("latent", "kv_all_gather", "all_to_all")
    ]
    for row in rows:
        decoder = (count for (part, _), count in LAYERS[row["model"]].items() if part == "decoder")
        assert row["num_layers"] == sum(decoder)
        assert row["counted_from"] == "collectives"
        assert row["machine"].keys() == {"system", "num_cpus"}
        assert {f"reduced_seconds_{size}_gloo_ranks" for size in (4, 8)} <= row.keys()
        check_row(row, LAYERS[row["model"]])


def python(*arguments):
    """Return what a process prints: tensors without memory need a group of their own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_row(row, layers):
    """What a model and each kind of its layers received is what the formula says."""
    if row["refused"]:
        assert (row["model"], row["cp"]) == ("vaetki_100b_a10b", 32)
        assert row["scheme"] == "all_to_all"
        return
    heads = HEADS[row["model"]]
    if row["scheme"] != "latent" and isinstance(heads, LatentHeads):
        heads = GroupedHeads(
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_heads,
            key_dim=heads.key_dim,
            value_dim=heads.value_dim,
        )
    place = Extent(
        seq_len=row["seq_len"], batch=1, cp=row["cp"], rank=row["rank"], dtype=torch.bfloat16
    )
    found = {(kind["part"], kind["window"]): kind["num_layers"] for kind in row["layers"]}
    assert found == layers
    forward = backward = 0
    for kind in row["layers"]:
        layer = AttentionLayer(heads=heads, window=kind["window"], scale=1.0)
        wire = wire_bytes(layer, Scheme(kind["scheme"]), place)
        counted = kind["forward_bytes_per_rank"], kind["backward_bytes_per_rank"]
        assert counted == (wire.forward, wire.backward)
        forward += kind["num_layers"] * wire.forward
        backward += kind["num_layers"] * wire.backward
    assert (row["forward_bytes_per_rank"], row["backward_bytes_per_rank"]) == (forward, backward)


@pytest.mark.parametrize("scheme", context_parallel.SCHEMES[1:])
def test_a_scheme_without_latents_on_the_wire_does_the_work_of_latents(scheme):
    torch.manual_seed(20_260_101)
    layer = AttentionLayer(heads=latent(4), window=5, scale=1.0)
    place = Extent(seq_len=21, batch=2, cp=1, rank=0, dtype=torch.float64)
    [planned] = context_parallel.plan(Counter([(layer, "decoder")]), scheme, place)
    inputs = context_parallel.make_inputs(planned, place)
    cp = ContextGroup(None)
    context_parallel.step(cp, planned, inputs)
    found = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    context_parallel.step(cp, Planned(layer.heads, layer, Scheme.HALO, 1, "decoder"), inputs)
    assert len(inputs) == 4, "queries, latents, positional keys, up-projection"
    for gradient, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(gradient, x.grad, rtol=TOLERANCE, atol=TOLERANCE)
