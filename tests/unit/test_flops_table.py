"""FLOPs per token against worked figures and brute-force masks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.plan.flops import all_pairs, flops_per_token, visible_pairs
from tests.unit.test_params_table import (
    AX_K1,
    K_EXAONE,
    KEURAL,
    VAETKI_7B,
    VAETKI_20B,
    VAETKI_100B,
)


def mask_count(seq_len, window):
    return sum(
        1
        for query in range(seq_len)
        for key in range(seq_len)
        if key <= query and (window is None or query - key < window)
    )


@pytest.mark.parametrize("seq_len", [1, 2, 63, 100])
@pytest.mark.parametrize("window", [None, 1, 2, 62, 63, 64, 99, 100, 101])
def test_visible_pairs_are_those_of_the_mask(seq_len, window):
    assert visible_pairs(seq_len, window) == mask_count(seq_len, window)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 45)))
def test_visible_pairs_are_those_of_any_mask(seq_len, window):
    assert visible_pairs(seq_len, window) == mask_count(seq_len, window)


@pytest.mark.parametrize(
    ("model", "seq_len", "linear", "attention", "train"),
    [
        (KEURAL, 4096, 9.732e9, 4.973e8, 3.069e10),
        (VAETKI_7B, 4096, 2.073e9, 1.367e8, 6.629e9),
        (VAETKI_7B, 16_384, 2.073e9, 3.291e8, 7.206e9),
        (VAETKI_20B, 4096, 3.902e9, 1.822e8, 1.225e10),
        (VAETKI_20B, 16_384, 3.902e9, 4.388e8, 1.302e10),
        (VAETKI_100B, 4096, 1.970e10, 5.467e8, 6.073e10),
        (VAETKI_100B, 8192, 1.970e10, 8.081e8, 6.151e10),
        (VAETKI_100B, 16_384, 1.970e10, 1.316e9, 6.304e10),
        (VAETKI_100B, 32_768, 1.970e10, 2.325e9, 6.607e10),
        (K_EXAONE, 8192, 4.545e10, 1.761e9, 1.416e11),
        (K_EXAONE, 32_768, 4.545e10, 6.593e9, 1.561e11),
        (K_EXAONE, 262_144, 4.545e10, 5.169e10, 2.914e11),
        (AX_K1, 4096, 6.321e10, 5.118e9, 2.050e11),
        (AX_K1, 16_384, 6.321e10, 2.047e10, 2.510e11),
        (AX_K1, 32_768, 6.321e10, 4.094e10, 3.124e11),
    ],
)
def test_the_main_model_costs_what_was_worked_out(model, seq_len, linear, attention, train):
    count = flops_per_token(model, seq_len, with_mtp=False)
    four_digits = 5e-4  # the figures have four significant digits
    assert count.linear + count.lm_head == pytest.approx(linear, rel=four_digits)
    assert count.attention == pytest.approx(attention, rel=four_digits)
    assert count.train == pytest.approx(train, rel=four_digits)


@pytest.mark.parametrize(
    ("model", "seq_len", "train"),
    [
        (K_EXAONE, 8192, 1.509e11),
        (K_EXAONE, 32_768, 1.666e11),
        (K_EXAONE, 262_144, 3.131e11),
        (AX_K1, 4096, 2.159e11),
        (AX_K1, 16_384, 2.627e11),
        (AX_K1, 32_768, 3.251e11),
    ],
)
def test_multi_token_prediction_adds_its_layer_and_a_second_head(model, seq_len, train):
    assert flops_per_token(model, seq_len, with_mtp=True).train == pytest.approx(train, rel=5e-4)


def test_a_model_without_mtp_costs_the_same_with_it():
    counts = [flops_per_token(VAETKI_7B, 4096, with_mtp=with_mtp) for with_mtp in (False, True)]
    assert counts[0] == counts[1]


def test_a_kernel_that_skips_nothing_computes_the_square():
    count = flops_per_token(VAETKI_7B, 4096, with_mtp=False, pairs=all_pairs)
    per_pair = 2 * 12 * (192 + 128)
    assert count.attention == 24 * per_pair * 4096
    assert count.linear == flops_per_token(VAETKI_7B, 4096, with_mtp=False).linear
