"""Parameter counts against published totals, to the last parameter."""

from dataclasses import replace

import pytest

from megamoe.plan.params import count_params
from megamoe.recipe import GQA, MLA, DualNorm, Experts, Model, Mtp, PeriNorm, PreNorm, Rope

ROPE = Rope(base=10_000, interleaved=False)


def experts(num_routed, top_k, ffn_dim, num_shared=1):
    return Experts(
        num_routed=num_routed,
        num_shared=num_shared,
        top_k=top_k,
        ffn_dim=ffn_dim,
        score="sigmoid",
        scaling_factor=1,
        expert_bias=False,
        num_groups=1,
        group_top_k=1,
    )


def mla(num_heads, q_lora_rank):
    return MLA(
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )


VAETKI_7B = Model(
    num_layers=24,
    num_dense_layers=1,
    hidden_dim=1536,
    dense_ffn_dim=5760,
    vocab_size=137_216,
    attention=mla(12, 768),
    window_pattern="LLLLLG",
    window=512,
    local_rope=ROPE,
    global_rope=ROPE,
    norm=PeriNorm(eps=1e-5, zero_centered=True),
    experts=experts(64, 5, 960),
    mtp=None,
    tied_embeddings=False,
    init_std=0.02,
)
VAETKI_20B = replace(
    VAETKI_7B,
    hidden_dim=2048,
    dense_ffn_dim=9216,
    attention=mla(16, 1024),
    experts=experts(128, 8, 1024),
)
VAETKI_100B = replace(
    VAETKI_7B,
    num_layers=48,
    num_dense_layers=3,
    hidden_dim=3072,
    dense_ffn_dim=18_432,
    attention=mla(24, 1536),
    experts=experts(128, 8, 2048),
)
KEURAL = replace(
    VAETKI_7B,
    num_dense_layers=0,
    hidden_dim=4096,
    dense_ffn_dim=None,
    vocab_size=131_072,
    attention=GQA(num_heads=32, num_kv_heads=8, head_dim=128, qk_norm=False),
    window_pattern="LG",
    window=513,
    norm=PreNorm(eps=1e-5, zero_centered=False),
    experts=experts(8, 2, 5632, num_shared=0),
    tied_embeddings=True,
)
K_EXAONE = replace(
    VAETKI_7B,
    num_layers=48,
    hidden_dim=6144,
    dense_ffn_dim=18_432,
    vocab_size=153_600,
    attention=GQA(num_heads=64, num_kv_heads=8, head_dim=128, qk_norm=True),
    window_pattern="LLLG",
    window=128,
    global_rope=None,
    norm=PreNorm(eps=1e-5, zero_centered=False),
    experts=replace(experts(128, 8, 2048), expert_bias=True),
    mtp=Mtp(num_layers=1, ffn="dense"),
)
AX_K1 = replace(
    VAETKI_7B,
    num_layers=61,
    hidden_dim=7168,
    dense_ffn_dim=18_432,
    vocab_size=163_840,
    attention=mla(64, 1536),
    window_pattern="G",
    window=None,
    local_rope=None,
    norm=DualNorm(eps=1e-6, zero_centered=False, after_dense_mlp=True),
    experts=experts(192, 8, 2048),
    mtp=Mtp(num_layers=1, ffn="moe"),
)


@pytest.mark.parametrize(
    ("model", "main", "mtp", "bias"),
    [
        (KEURAL, 14_832_046_080, 0, 0),
        (VAETKI_7B, 7_250_296_320, 0, 0),
        (VAETKI_20B, 19_596_810_240, 0, 0),
        (VAETKI_100B, 112_191_900_672, 0, 0),
        (K_EXAONE, 236_571_150_336, 528_513_280, 6_016),
        (AX_K1, 518_983_059_456, 8_705_060_864, 0),
    ],
)
def test_the_count_is_exact(model, main, mtp, bias):
    count = count_params(model)
    assert (count.main, count.mtp, count.expert_bias) == (main, mtp, bias)
    assert count.total == main + mtp + bias


def test_k_exaone_in_all_is_its_released_index():
    assert count_params(K_EXAONE).total == 237_099_669_632


@pytest.mark.parametrize(
    ("model", "active", "without_input_table"),
    [
        (KEURAL, 4.866e9, 4.866e9),
        (VAETKI_7B, 1.247e9, 1.037e9),
        (VAETKI_20B, 2.232e9, 1.951e9),
        (VAETKI_100B, 10.270e9, 9.849e9),
        (K_EXAONE, 23.668e9, 22.725e9),
        (AX_K1, 32.779e9, 31.605e9),
    ],
)
def test_a_token_visits_the_active_parameters(model, active, without_input_table):
    count = count_params(model)
    half_a_digit = 0.0005e9  # the figures are rounded to 1e6
    assert count.active == pytest.approx(active, abs=half_a_digit)
    assert count.active_without_input_table == pytest.approx(without_input_table, abs=half_a_digit)


def test_the_parts_of_vaetki_7b():
    count = count_params(VAETKI_7B)
    assert count.input_table == count.output_table == 210_763_776
    assert count.attention == 186_384_384
    assert count.attention_norms == 30_720
    assert count.norms == 148_992
    assert count.dense_mlp == 26_542_080
    assert count.router == 2_260_992
    assert count.shared_experts == 101_744_640
    assert count.routed_experts == 6_511_656_960


def test_queries_without_a_latent_are_one_matrix():
    attention = mla(12, None)
    with_latent, direct = (
        count_params(VAETKI_7B),
        count_params(replace(VAETKI_7B, attention=attention)),
    )
    queries = 12 * (128 + 64)
    latent = 768 * (1536 + queries)
    assert with_latent.attention - direct.attention == 24 * (latent - 1536 * queries)
    assert with_latent.attention_norms - direct.attention_norms == 24 * 768


def test_a_moe_mtp_layer_has_an_expert_bias_of_its_own():
    plain = count_params(AX_K1)
    biased = count_params(replace(AX_K1, experts=replace(AX_K1.experts, expert_bias=True)))
    assert biased.expert_bias == 60 * 192
    assert biased.mtp == plain.mtp + 192


def test_a_dense_mlp_whose_output_is_not_normed_has_a_norm_less():
    dense = replace(AX_K1, mtp=Mtp(num_layers=1, ffn="dense"))
    of_experts = replace(dense.norm, after_dense_mlp=False)
    all_normed, some = count_params(dense), count_params(replace(dense, norm=of_experts))
    assert all_normed.norms - some.norms == 7168  # one dense layer
    assert all_normed.mtp - some.mtp == 7168


def test_what_is_not_released_is_left_out():
    biased = count_params(replace(AX_K1, experts=replace(AX_K1.experts, expert_bias=True)))
    assert biased.released(()) == biased.total
    assert biased.released(("mtp",)) == biased.main + 60 * 192
    assert biased.released(("mtp", "expert_bias")) == 518_983_059_456
