"""A cache holds what it should; attention that goes on after earlier positions is that of the whole.

Shapes: S sequence, B batch, N query heads, M key-value heads, D head dimension.
"""

import pytest
import torch

from megamoe.nn.attention import causal_attention, continued_attention
from megamoe.nn.cache import LayerCache, make_layer_cache

CPU = torch.device("cpu")


def layer(*, window: int | None, capacity: int = 12) -> LayerCache:
    return make_layer_cache(
        ((3,), (2, 2)), window=window, size=(2, capacity), dtype=torch.float32, device=CPU
    )


def parts(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_tokens, 2, 3, generator=generator),
        torch.randn(num_tokens, 2, 2, 2, generator=generator),
    )


@pytest.mark.parametrize("steps", [[12], [1] * 12, [3, 1, 1, 7], [2, 4, 5, 1], [4, 4, 4]])
@pytest.mark.parametrize("window", [None, 1, 4, 5])
def test_a_cache_gives_back_all_that_a_query_may_see(steps, window):
    cache, whole, end = layer(window=window), parts(12), 0
    for count in steps:
        start, end = end, end + count
        seen = cache.extend(*(part[start:end] for part in whole))
        first = 0 if window is None else max(0, start - window + 1)
        for got, part in zip(seen, whole, strict=True):
            assert torch.equal(got[first - end :], part[first:end])
    assert cache.num_tokens == 12
    assert cache.num_held == (12 if window is None else window)


def test_a_window_larger_than_the_room_takes_no_more_than_the_room():
    cache = layer(window=100, capacity=6)
    assert cache.num_bytes == 6 * 2 * cache.bytes_per_token
    cache.extend(*parts(6))
    with pytest.raises(AssertionError):
        cache.extend(*parts(1))


def test_a_cache_without_a_window_refuses_more_than_there_is_room_for():
    cache = layer(window=None, capacity=6)
    with pytest.raises(AssertionError):
        cache.extend(*parts(7))


@pytest.mark.parametrize("window", [None, 4, 100])
def test_the_bytes_of_a_cache_are_those_of_its_tensors(window):
    cache = layer(window=window)
    assert cache.bytes_per_token == (3 + 4) * 4
    assert 2 * cache.bytes_at(12) == cache.num_bytes
    assert cache.num_bytes == sum(buffer.untyped_storage().nbytes() for buffer in cache.buffers)
    assert cache.bytes_at(3) == 3 * 28


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize("seq_len", [1, 2, 6, 19, 20])
def test_going_on_after_earlier_positions_is_the_end_of_the_whole(seq_len, window, heads):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(20, 3, count, 8, generator=generator, dtype=torch.float64)
        for count in (heads[0], heads[1], heads[1])
    )
    whole = causal_attention(q, k, v, window=window, scale=0.3)
    end = continued_attention(q[-seq_len:], k, v, window=window, scale=0.3)
    # Values are below 4 and weights sum to 1; some 50 roundings of float64, 2^-53 each.
    assert (end - whole[-seq_len:]).abs().max() <= 4 * 50 * 2.0**-53
