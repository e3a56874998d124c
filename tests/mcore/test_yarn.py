"""YaRN of our layers is that of Megatron-core, which has it for a whole model, not for a layer."""

from dataclasses import replace

import pytest
import torch
from megatron.core.models.common.embeddings import YarnRotaryEmbedding

from megamoe.nn.rotary import yarn_frequencies, yarn_scale
from megamoe.recipe import Rope, Yarn
from tests.mcore import tiny
from tests.mcore.world import world_of_one

A_X_K1 = Rope(
    base=10_000.0,
    interleaved=True,
    yarn=Yarn(
        factor=4.0,
        original_seq_len=32_768,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=0.0,
    ),
)


def stretched(**changes: float) -> Rope:
    return replace(A_X_K1, yarn=replace(A_X_K1.yarn, **changes))


@pytest.mark.parametrize(
    ("dim", "rope"),
    [
        (64, A_X_K1),
        (64, stretched(factor=40.0, original_seq_len=4_096, mscale_all_dim=1.0)),  # DeepSeek-V3
        (64, stretched(mscale=0.707, mscale_all_dim=0.707)),
        (16, tiny.STRETCHED),
        (16, stretched(original_seq_len=128)),  # blended from the first pair on
        (16, stretched(original_seq_len=4)),  # beta_slow under the first pair: no ramp
        (16, stretched(beta_fast=2.0, beta_slow=2.0)),
        (16, stretched(factor=1.0)),
    ],
)
def test_frequencies_and_scale_are_those_of_megatron_core(tmp_path, dim, rope):
    yarn = rope.yarn
    with world_of_one(tiny.tiny_plan(tmp_path / "data")):
        theirs = YarnRotaryEmbedding(
            dim,
            rotary_base=rope.base,
            scaling_factor=yarn.factor,
            original_max_position_embeddings=yarn.original_seq_len,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            mscale=yarn.mscale,
            mscale_all_dim=yarn.mscale_all_dim,
        )
        angles, scale = theirs.get_emb(2)
    # Theirs are float32 throughout: a power, a quotient and a blend of two, each rounded.
    frequencies = yarn_frequencies(dim, rope)
    torch.testing.assert_close(angles[1, 0, 0, : dim // 2], frequencies, rtol=8 * 2.0**-24, atol=0)
    ours = yarn_scale(yarn, yarn.mscale) / yarn_scale(yarn, yarn.mscale_all_dim)
    assert ours == pytest.approx(scale, rel=1e-15)
