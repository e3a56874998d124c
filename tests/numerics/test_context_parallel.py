"""Attention over a sequence that several ranks share is that of one rank, gradients included.

All cases run once, in one world of 8 processes (context_world.py).
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamoe.errors import MegamoeError
from megamoe.nn.attention import bounded_attention
from megamoe.nn.context_cost import Extent, Machine, choose, explain, wire_bytes
from megamoe.nn.context_group import ContextGroup, shard_len
from megamoe.nn.context_heads import AttentionLayer, GroupedHeads, LatentHeads
from megamoe.nn.context_parallel import Scheme, begin, finish, schemes
from megamoe.nn.context_ring_parts import parts
from megamoe.nn.context_tokens import document_starts, next_tokens, starts_of_lengths
from megamoe.nn.context_transfers import Halo
from tests.numerics.context_cases import grouped, latent
from tests.numerics.context_world import SIZES, cases

REPOSITORY = Path(__file__).parents[2]
# Outputs and gradients are below 100 and sums of at most 24 * 72 products; 1,728 roundings of
# float64, 2^-53 each, are 2e-13 in the worst case.
TOLERANCE = 1e-12
H200 = Machine(link_bytes_per_s=50e9, flops_per_s=500e12, message_s=20e-6)
VAETKI_100B = LatentHeads(num_heads=24, latent_dim=512, nope_dim=128, rope_dim=64, value_dim=128)
EXPANDED = GroupedHeads(num_heads=24, num_kv_heads=24, key_dim=192, value_dim=128)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("context") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.numerics.context_world", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("cp", SIZES)
def test_every_scheme_computes_what_one_rank_would(results, cp, scheme):
    found = {r["name"]: r["error"] for r in results["attention"] if r["cp"] == cp}
    expected = [case.name for case in cases(cp) if case.scheme == scheme.value]
    assert expected
    wrong = {name: found[name] for name in expected if not found[name] <= TOLERANCE}
    assert not wrong, wrong


@pytest.mark.slow
def test_the_bytes_received_are_those_of_the_formula(results):
    wrong = [(r["cp"], r["name"]) for r in results["attention"] if not r["bytes_right"]]
    assert not wrong


@pytest.mark.slow
def test_next_tokens_are_those_of_the_whole_sequence(results):
    assert {row["cp"] for row in results["tokens"]} == set(SIZES)
    assert not [(row["cp"], row["name"]) for row in results["tokens"] if row["differs"]]


@pytest.mark.slow
def test_layers_may_overlap_and_be_computed_anew_and_a_ring_without_a_kernel(results):
    errors = {r["name"]: r["error"] for r in results["otherwise"] if "bfloat16" not in r["name"]}
    assert len(errors) == 3 * len(Scheme) + 4
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.slow
def test_bfloat16_is_as_close_as_its_roundings(results):
    # Some 20 roundings of 2^-9 on the way from an input to a gradient, as in attention_gpu.py.
    errors = {r["name"]: r["error"] for r in results["otherwise"] if "bfloat16" in r["name"]}
    assert len(errors) == len(Scheme) + 1
    assert max(errors.values()) <= 20 * 2.0**-9, errors


@pytest.mark.slow
def test_nothing_of_a_transfer_is_kept_after_the_backward_pass(results):
    assert {row["name"]: row["kept"] for row in results["kept"]} == dict.fromkeys(Scheme, 0)


@pytest.mark.slow
def test_the_query_path_hides_the_gradients_of_a_halo(results):
    assert results["order"] == ["gradients of the halo sent", "query path", "waited"]


@pytest.mark.slow
def test_the_comparison_finds_what_is_wrong_on_purpose(results):
    assert len(results["spoiled"]) == 2 * len(Scheme) + 2
    passed = [row["name"] for row in results["spoiled"] if row["error"] < 1e-2]
    assert not passed


@pytest.mark.parametrize("window", [None, 7, 2_000])
@pytest.mark.parametrize("num_earlier", [0, 40])
def test_documents_are_a_mask_however_many_queries_there_are(window, num_earlier, generator):
    num_queries = 1_030  # more than a block
    q, k, v = (
        torch.randn(length, 2, heads, 3, generator=generator, dtype=torch.float64)
        for length, heads in ((num_queries, 2), *((num_queries + num_earlier, 1),) * 2)
    )
    queries = torch.arange(num_earlier, num_earlier + num_queries)
    begins = torch.rand(num_queries, 2, generator=generator) < 0.01
    begins[0] = False
    first_SB = (queries[:, None] * begins).cummax(dim=0).values
    first_SB -= 3 * (first_SB == 0)  # of the first documents below 0, before the keys
    distance = queries[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= (window or len(k)))
    hidden = hidden[None] | (torch.arange(len(k)) < first_SB.T[:, :, None])
    scores = torch.einsum("qbnd,kbd->bnqk", q, k[:, :, 0]).masked_fill(hidden[:, None], -torch.inf)
    expected = torch.einsum("bnqk,kbd->qbnd", scores.softmax(dim=-1), v[:, :, 0]).flatten(2)
    ours = bounded_attention(q, k, v, first_SB=first_SB, window=window, scale=1.0)
    # Values are below 5 and weights sum to 1; some 1,070 roundings of float64, 2^-53 each.
    assert (ours - expected).abs().max() <= 5 * 1_070 * 2.0**-53


@pytest.mark.parametrize("window", [None, 7])
def test_the_backward_pass_makes_masks_anew_and_keeps_none(window, generator):
    seq_len = 2_050  # three blocks
    inputs = [
        torch.randn(seq_len, 1, heads, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (2, 1, 1)
    ]
    q, k, v = inputs
    ends = torch.rand(seq_len, generator=generator) < 0.01
    starts_SB = document_starts((ends.cumsum(0) - ends.int())[:, None], ContextGroup(None))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ours = bounded_attention(q, k, v, first_SB=starts_SB, window=window, scale=1.0)
    assert max(kept, default=0) <= q.numel()
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    hidden = (distance < 0) | (distance >= (window or seq_len))
    hidden = hidden | (torch.arange(seq_len) < starts_SB)
    scores = torch.einsum("qbnd,kbd->bnqk", q, k[:, :, 0]).masked_fill(hidden, -torch.inf)
    expected = torch.einsum("bnqk,kbd->qbnd", scores.softmax(dim=-1), v[:, :, 0]).flatten(2)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for ours_grad, grad in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        # Sums of at most 2 heads of 2,050 terms, of scores that erred as much: 2^-53 each.
        assert (ours_grad - grad).abs().max() <= 4 * 4_100 * 2.0**-53 * grad.abs().max()


def test_documents_begin_where_ids_change():
    ids = torch.tensor([[3, 3, 3, 1, 1, 3], [0, 1, 1, 1, 2, 2]]).T
    expected = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 4, 4]]).T
    assert torch.equal(document_starts(ids, ContextGroup(None)), expected.to(torch.int32))


def test_documents_whose_ids_differ_beyond_32_bits_are_apart():
    ids = torch.tensor([[5, 5, 5 + 2**32, 5 + 2**32, 5]]).T
    assert document_starts(ids, ContextGroup(None)).flatten().tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("shape", [(12, 1), (6, 2), (12, 3), (12,)])
def test_beginnings_of_documents_that_are_not_of_each_whole_sequence_are_refused(shape):
    """Broadcast over a batch they were right on a CPU and wrong by kernels, which count documents."""
    cp = ContextGroup(None)
    cp.size = 2
    layer = AttentionLayer(heads=latent(4), window=1, scale=1.0)
    starts_SB = torch.zeros(shape, dtype=torch.int32)
    begun = begin(cp, layer, Scheme.HALO, (torch.zeros(6, 2, 7), torch.zeros(6, 2, 2)))
    advice = (
        f"starts_SB is {list(shape)}, and cp 2 with 6 tokens a rank of 2 sequences needs [12, 2]; "
        "give those of whole sequences, one by one"
    )
    with pytest.raises(MegamoeError, match=re.escape(advice)):
        finish(begun, torch.zeros(6, 2, 4, 5), torch.zeros(4 * 8, 7), starts_SB)
    with pytest.raises(MegamoeError, match=re.escape(advice)):
        next_tokens(torch.zeros(6, 2), cp, shift=1, fill=0, starts_SB=starts_SB)


class Answering(ContextGroup):
    """The first of several ranks, to which the others send what is given."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        """Take what comes from ranks 1, 2, ..., whole shards."""
        super().__init__(None)
        self.size, self.parts = len(parts) + 1, parts

    def exchange(self, sends, receives, direction):
        """Fill the end of a shard, as much as is wanted of it."""
        for rank, tensor in receives:
            tensor.copy_(self.parts[rank - 1][-len(tensor) :])
        return []


def test_gradients_of_a_halo_over_several_ranks_are_rounded_once(generator):
    parts = [torch.randn(3, 2, 40, generator=generator).bfloat16() for _ in range(7)]
    halo = Halo(num_rows=3 * 7, shard_len=3, side=-1)
    cp = Answering(parts)
    found = halo.post_transposed(cp, torch.empty(0, 2, 40, dtype=torch.bfloat16)).wait()
    expected = sum(part.double() for part in parts)
    assert found.dtype is torch.bfloat16
    # One rounding to 8 bits, 2^-8 of the value; before it seven sums in float32, of terms below 5.
    assert ((found - expected).abs() <= 2.0**-8 * expected.abs() + 7 * 35 * 2.0**-24).all()


def test_documents_begin_where_cumulative_lengths_say():
    starts = starts_of_lengths(torch.tensor([0, 3, 5, 6]), 6)
    assert starts.tolist() == [[0], [0], [0], [3], [3], [5]]
    empty = starts_of_lengths(torch.tensor([0, 0, 2]), 2)
    assert empty.tolist() == [[0], [0]]


def test_next_tokens_of_masks_keep_their_type():
    mask = torch.ones(4, 2, dtype=torch.float32)
    shifted = next_tokens(mask, ContextGroup(None), shift=1, fill=0.0)
    assert shifted.dtype is torch.float32
    assert shifted[:, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(("seq_len", "advice"), [(100, "use 96 or 104"), (5, "use 8")])
def test_a_sequence_that_ranks_cannot_share_is_refused(seq_len, advice):
    with pytest.raises(MegamoeError, match=f"{seq_len} tokens is not a multiple of cp 8; {advice}"):
        shard_len(seq_len, 8)


def test_queries_of_another_number_of_heads_are_refused():
    """A kernel of a CPU ended the process."""
    layer = AttentionLayer(heads=latent(4), window=None, scale=1.0)
    begun = begin(
        ContextGroup(None), layer, Scheme.RING, (torch.zeros(6, 2, 7), torch.zeros(6, 2, 2))
    )
    advice = "queries are [6, 2, 2, 5], and the layer has 4 heads of 5; give [L, B, 4, 5]"
    with pytest.raises(MegamoeError, match=re.escape(advice)):
        finish(begun, torch.zeros(6, 2, 2, 5), torch.zeros(4 * 8, 7))


def test_documents_that_are_written_over_are_those_of_the_next_call(generator):
    """A buffer that each batch is written to: what was counted of the last one is not kept."""
    layer = AttentionLayer(heads=grouped(2, 1), window=None, scale=1.0)
    k, v, q = (
        torch.randn(6, 1, heads, width, generator=generator)
        for heads, width in (
            (1, layer.heads.key_dim),
            (1, layer.heads.value_dim),
            (2, layer.heads.key_dim),
        )
    )
    starts_SB = torch.zeros(6, 1, dtype=torch.int32)

    def attended(starts_SB):
        return finish(
            begin(ContextGroup(None), layer, Scheme.GATHER, (k, v)), q, starts_SB=starts_SB
        )

    first = attended(starts_SB)
    starts_SB[3:] = 3
    assert torch.equal(attended(starts_SB), attended(starts_SB.clone()))
    assert not torch.equal(attended(starts_SB), first)
    chunk = range(6)
    assert [part.queries for part in parts((chunk, chunk), starts_SB)] == [slice(0, 3), slice(3, 6)]
    starts_SB[3:] = 0
    assert [part.queries for part in parts((chunk, chunk), starts_SB)] == [slice(0, 6)]


def test_a_scheme_that_cannot_do_a_layer_is_refused():
    cp, parts = ContextGroup(None), (torch.zeros(4, 1, 7), torch.zeros(4, 1, 2))
    layer = AttentionLayer(heads=latent(5), window=None, scale=1.0)
    with pytest.raises(MegamoeError, match="this one has none; use heads, ring, gather"):
        begin(cp, layer, Scheme.HALO, parts)
    layer = AttentionLayer(heads=latent(5), window=3, scale=1.0)
    with pytest.raises(MegamoeError, match="this one's is 3; use halo, heads, gather"):
        begin(cp, layer, Scheme.RING, parts)


@pytest.mark.parametrize(
    ("heads", "cp", "possible"),
    [
        (latent(24), 8, True),
        (latent(24), 32, False),
        (grouped(64, 8), 8, True),
        (grouped(64, 8), 32, True),  # four ranks share a key-value head
        (grouped(64, 8), 128, False),
        (grouped(24, 8), 3, False),
        (grouped(24, 8), 12, False),
    ],
)
def test_heads_are_shared_out_where_they_divide(heads, cp, possible):
    layer = AttentionLayer(heads=heads, window=None, scale=1.0)
    assert (Scheme.HEADS in schemes(layer, cp)) == possible


def extent(seq_len: int, cp: int, rank: int) -> Extent:
    return Extent(seq_len=seq_len, batch=1, cp=cp, rank=rank, dtype=torch.bfloat16)


def test_the_bytes_of_a_whole_vaetki_100b_at_32k_are_below_three_quarters_of_a_gigabyte():
    local = AttentionLayer(heads=VAETKI_100B, window=512, scale=1.0)
    whole = AttentionLayer(heads=VAETKI_100B, window=None, scale=1.0)
    for rank in range(8):
        place = extent(32_768, 8, rank)
        halo, heads = (
            wire_bytes(local, Scheme.HALO, place),
            wire_bytes(whole, Scheme.HEADS, place),
        )
        assert 40 * halo.forward + 8 * heads.forward <= 0.75e9
        assert 40 * halo.backward + 8 * heads.backward <= 0.75e9
    layer = AttentionLayer(heads=EXPANDED, window=None, scale=1.0)
    assert 48 * wire_bytes(layer, Scheme.GATHER, place).forward == pytest.approx(21.1e9, rel=0.01)
    assert 48 * wire_bytes(layer, Scheme.HEADS, place).forward == pytest.approx(5.3e9, rel=0.01)


def test_a_layer_with_a_window_is_cheapest_by_halo_and_one_without_by_heads():
    local = AttentionLayer(heads=VAETKI_100B, window=512, scale=1.0)
    whole = AttentionLayer(heads=VAETKI_100B, window=None, scale=1.0)
    assert choose(local, extent(32_768, 8, 0), H200)[0].scheme is Scheme.HALO
    costs = choose(whole, extent(32_768, 8, 0), H200)
    assert costs[0].scheme is Scheme.HEADS
    assert costs == choose(whole, extent(32_768, 8, 5), H200)
    assert choose(whole, extent(131_072, 32, 0), H200)[0].scheme is Scheme.RING
    said = explain(costs, costs[0].scheme)
    assert said.startswith("heads ")
    assert "fastest by estimate; else ring" in said
    assert "as asked for" in explain(costs, Scheme.RING)
