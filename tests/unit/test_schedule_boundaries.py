"""Schedules one token or step before, at and after every boundary."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.plan.schedule import learning_rate_at, position_at_step, sequences_at, steps
from megamoe.recipe import LearningRate

LR = LearningRate(peak=4e-4, final=4e-5, warmup_tokens=1_000, decay_tokens=2_000, decay="linear")
STAGE_TOKENS = 10_000


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (1, 4e-7),
        (500, 2e-4),
        (999, 4e-4 * 0.999),
        (1_000, 4e-4),
        (1_001, 4e-4),
        (7_999, 4e-4),
        (8_000, 4e-4),
        (8_001, 4e-4 - 3.6e-4 / 2_000),
        (9_000, 2.2e-4),
        (9_999, 4e-5 + 3.6e-4 / 2_000),
        (10_000, 4e-5),
        (10_001, 4e-5),
    ],
)
def test_warm_up_stable_decay(tokens, rate):
    assert learning_rate_at(LR, STAGE_TOKENS, tokens) == pytest.approx(rate, rel=1e-12)


def test_the_last_step_is_at_the_final_rate_exactly():
    for decay in ("linear", "cosine"):
        assert learning_rate_at(replace(LR, decay=decay), STAGE_TOKENS, STAGE_TOKENS) == LR.final


def test_a_cosine_is_halfway_down_in_the_middle_and_flat_at_both_ends():
    lr = replace(LR, decay="cosine")
    assert learning_rate_at(lr, STAGE_TOKENS, 9_000) == pytest.approx(2.2e-4, rel=1e-12)
    first, last = (learning_rate_at(lr, STAGE_TOKENS, tokens) for tokens in (8_001, 9_999))
    assert LR.peak - first < 1e-9
    assert last - LR.final < 1e-9


def test_a_constant_rate_never_moves():
    lr = LearningRate(peak=1e-4, final=None, warmup_tokens=0, decay_tokens=0, decay="linear")
    assert {learning_rate_at(lr, 100, tokens) for tokens in (1, 50, 99, 100, 101)} == {1e-4}


def test_a_decay_after_warm_up_leaves_no_plateau():
    lr = replace(LR, decay_tokens=9_000, decay="cosine")
    rates = [learning_rate_at(lr, STAGE_TOKENS, tokens) for tokens in (999, 1_000, 1_001)]
    assert rates[0] < rates[1] > rates[2]


@settings(deadline=None)  # the machine may be busy
@given(
    st.integers(0, 10**12),
    st.integers(0, 10**12),
    st.integers(1, 10**12),
    st.sampled_from(["linear", "cosine"]),
)
def test_the_rate_rises_then_falls_between_its_bounds(warmup, decay_tokens, plateau, decay):
    final = 1e-5 if decay_tokens else None
    lr = LearningRate(
        peak=3e-4, final=final, warmup_tokens=warmup, decay_tokens=decay_tokens, decay=decay
    )
    total = warmup + decay_tokens + plateau
    points = sorted({max(1, total * i // 50) for i in range(1, 51)})
    rates = [learning_rate_at(lr, total, tokens) for tokens in points]
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == (final or 3e-4)


RAMP = ((0, 2), (100, 4), (205, 8))


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(0, 2), (99, 2), (100, 4), (101, 4), (204, 4), (205, 8), (206, 8), (10**15, 8)],
)
def test_a_ramp_entry_holds_from_its_tokens_on(tokens, size):
    assert sequences_at(RAMP, tokens) == size


@pytest.mark.parametrize(
    ("asked", "settled"),
    [
        (1, (1, 20)),
        (19, (1, 20)),
        (20, (1, 20)),
        (21, (2, 40)),
        (100, (5, 100)),  # five steps of 20; the next one would begin at 100, with 4 sequences
        (101, (6, 140)),
        (205, (8, 220)),
        (220, (8, 220)),
        (221, (9, 300)),
    ],
)
def test_whole_steps_spend_at_least_what_is_asked(asked, settled):
    assert steps(RAMP, 10, asked) == settled


def test_an_entry_that_a_large_step_jumps_over_is_never_used():
    ramp = ((0, 10), (5, 3), (90, 1))
    assert steps(ramp, 10, 102) == (2, 110)  # 100 tokens at once, then steps of 10
    assert [position_at_step(ramp, 10, step) for step in range(4)] == [0, 100, 110, 120]


def test_a_stage_of_a_trillion_tokens_is_settled_at_once():
    ramp = ((0, 1_024), (10**11, 2_048), (5 * 10**11, 4_096))
    num_steps, tokens = steps(ramp, 8_192, 10**12)
    assert 0 <= tokens - 10**12 < 4_096 * 8_192
    assert position_at_step(ramp, 8_192, num_steps) == tokens


ramps = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9)), min_size=1, max_size=5).map(
    lambda pairs: tuple(
        (sum(gap for gap, _ in pairs[:i]), size) for i, (_, size) in enumerate(pairs)
    )
)


def walk(ramp, seq_len, tokens):
    """The slow way: one step after another."""
    positions = [0]
    while positions[-1] < tokens:
        positions.append(positions[-1] + sequences_at(ramp, positions[-1]) * seq_len)
    return positions


@settings(deadline=None)  # the machine may be busy
@given(ramps, st.integers(1, 12), st.integers(1, 2_000))
def test_steps_and_positions_equal_a_walk(ramp, seq_len, tokens):
    positions = walk(ramp, seq_len, tokens)
    assert steps(ramp, seq_len, tokens) == (len(positions) - 1, positions[-1])
    for step, position in enumerate(positions):
        assert position_at_step(ramp, seq_len, step) == position


@settings(deadline=None)  # the machine may be busy
@given(ramps, st.integers(1, 12), st.integers(1, 2_000))
def test_the_steps_of_a_segment_add_up_to_its_tokens(ramp, seq_len, tokens):
    num_steps, settled = steps(ramp, seq_len, tokens)
    positions = [position_at_step(ramp, seq_len, step) for step in range(num_steps + 1)]
    sizes = [sequences_at(ramp, position) * seq_len for position in positions[:-1]]
    assert sum(sizes) == settled
    assert positions[-2] < tokens <= settled
