"""Which scheme of context parallelism is chosen, and by whose rates."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks import context_parallel
from megamoe.nn.context_cost import Cost, Extent, Machine, choose, explain, machine_of
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads
from megamoe.nn.context_parallel import Scheme
from megamoe.plan.cli import named_cluster
from megamoe.recipe.load import load_recipe

K_EXAONE = AttentionLayer(
    heads=GroupedHeads(num_heads=64, num_kv_heads=8, key_dim=128, value_dim=128),
    window=None,
    scale=1.0,
)
PLACE = Extent(seq_len=131_072, batch=1, cp=32, rank=0, dtype=torch.bfloat16)
RATES = Machine(link_bytes_per_s=50e9, flops_per_s=494.7e12, message_s=1e-5)


def test_heads_are_taken_before_a_ring_that_gains_less_than_a_tenth():
    costs = choose(K_EXAONE, PLACE, RATES)
    assert [cost.scheme for cost in costs] == [Scheme.HEADS, Scheme.RING, Scheme.GATHER]
    heads, ring, _ = (cost.seconds for cost in costs)
    assert 0.9 * heads < ring < heads
    said = explain(costs, Scheme.HEADS)
    assert said.startswith("heads ")
    assert "a ring gains too little by estimate; else ring" in said


def test_a_ring_that_gains_more_is_taken():
    """One key-value head goes around a ring for little, and 8 ranks would be sent it anyway."""
    layer = replace(K_EXAONE, heads=replace(K_EXAONE.heads, num_heads=8, num_kv_heads=1))
    rates = replace(RATES, flops_per_s=8e14, message_s=1e-6)
    costs = choose(layer, replace(PLACE, seq_len=32_768, cp=8), rates)
    assert [cost.scheme for cost in costs] == [Scheme.RING, Scheme.HEADS, Scheme.GATHER]
    assert costs[0].seconds < 0.9 * costs[1].seconds
    assert "fastest by estimate; else heads" in explain(costs, Scheme.RING)


def test_a_ring_without_a_kernel_writes_out_scores():
    costs = choose(K_EXAONE, PLACE, replace(RATES, has_ring_kernel=False))
    without, with_kernel = costs[-1], ring_of(choose(K_EXAONE, PLACE, RATES))
    assert without is ring_of(costs)
    assert without.writes_scores
    assert not with_kernel.writes_scores
    assert without.seconds > 10 * with_kernel.seconds
    assert "TFLOP, scores written out)" in explain(costs, costs[0].scheme)


def test_a_layer_with_a_window_takes_a_halo_whatever_it_costs():
    costs = choose(replace(K_EXAONE, window=100_000), PLACE, RATES)
    assert costs[0].scheme is Scheme.HEADS
    assert ", always with a window; else heads" in explain(costs, Scheme.HALO)


@pytest.mark.parametrize(
    ("cluster", "num_neighbours", "link"),
    [("h200-8x400g", 8, 300e9), ("h200-8x400g", 9, 50e9), ("h200-1", 2, 50e9)],
)
def test_ranks_of_a_node_are_linked_by_nvlink_and_nodes_by_their_network(
    cluster, num_neighbours, link
):
    expected = Machine(link_bytes_per_s=link, flops_per_s=494.7e12, message_s=2e-5)
    assert machine_of(named_cluster(cluster, 4), num_neighbours) == expected


def test_the_benchmark_chooses_by_the_rates_of_the_engine():
    assert not [
        name for name, value in vars(context_parallel).items() if isinstance(value, Machine)
    ]
    model = load_recipe("k_exaone_236b_a23b").recipe.model
    with mock.patch.object(context_parallel, "choose", wraps=choose) as chosen:
        context_parallel.plan(context_parallel.layers_of(model), "latent", PLACE)
    rates = machine_of(named_cluster("h200-8x400g", 4), PLACE.cp)
    assert {call.args[2] for call in chosen.call_args_list} == {rates}


def ring_of(costs: tuple[Cost, ...]) -> Cost:
    [ring] = [cost for cost in costs if cost.scheme is Scheme.RING]
    return ring
