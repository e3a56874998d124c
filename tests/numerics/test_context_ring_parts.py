"""What steps of a ring leave to a kernel where documents are apart: every pair of query and key, once."""

import pytest
import torch

from megamoe.nn.context_ring_parts import parts
from megamoe.nn.context_transfers import Chunks

DOCUMENTS = {  # where they begin in a sequence of 24 tokens
    "one": [[0]],
    "at_edges_of_chunks": [[0, 6, 12]],
    "across_several_chunks": [[0, 2, 17]],
    "of_one_token": [[0, 1, 2, 3, 11, 12, 23]],
    "other_in_each_sequence": [[0, 5], [0, 13, 14], list(range(24))],
}


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("begins", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_key_that_a_query_sees_is_in_one_part(begins, cp):
    seq_len = 24
    positions = torch.arange(seq_len)
    starts = [
        [max(b for b in each if b <= position) for each in begins] for position in range(seq_len)
    ]
    starts_SB = torch.tensor(starts)
    counted = torch.zeros(len(begins), 1, seq_len, seq_len, dtype=torch.int)
    chunks = Chunks(cp=cp, shard_len=seq_len // cp)
    for i in range(2 * cp):
        for j in range(i + 1):
            queries, keys = chunks.rows(i), chunks.rows(j)
            here = counted[:, :, queries.start : queries.stop, keys.start : keys.stop]
            for part in parts((queries, keys), starts_SB):
                seen = here[part.batch, :, part.queries, part.keys]
                assert seen.numel()
                assert part.is_causal == (i == j)
                seen += torch.ones_like(seen).tril() if part.is_causal else 1
    sees = positions <= positions[:, None]
    expected = sees & (positions >= starts_SB.T[:, :, None])
    assert torch.equal(counted[:, 0], expected.int())


def test_views_are_of_the_part():
    starts_SB = torch.tensor([0, 0, 0, 3, 3, 3])[:, None]
    [part] = parts((range(2, 4), range(2)), starts_SB)
    x = torch.arange(2.0)[None, None, :, None]
    assert part.of_queries(x).flatten().tolist() == [0.0]
    assert part.of_keys(x).flatten().tolist() == [0.0, 1.0]


def test_without_documents_a_pair_is_one_part():
    [part] = parts((range(4, 8), range(4)), None)
    assert not part.is_causal
    x = torch.zeros(2, 3, 4, 5)
    assert part.of_queries(x).shape == part.of_keys(x).shape == x.shape
