"""The analytic operation count equals what torch counts in the real model, to the last operation."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamoe.mcore.engine import Engine
from megamoe.nn import grouped
from megamoe.plan.flops import flops_per_token
from tests.mcore import tiny
from tests.mcore.world import world_of_one

MODELS = {"latent": tiny.LATENT, "grouped": tiny.GROUPED, "softmax": tiny.SOFTMAX}


def kernel_pairs(seq_len: int, window: int | None) -> int:
    """Return the pairs that megamoe/nn/attention.py multiplies with torch's plain products.

    Without a window all of them, masked afterwards. With one, every block of `window` queries, the
    last one filled up, sees two blocks of keys.
    """
    if window is None or window >= seq_len:
        return seq_len * seq_len
    blocks = -(-seq_len // window)
    return blocks * window * 2 * window


@pytest.mark.parametrize("seq_len", [16, 63])
@pytest.mark.parametrize("name", MODELS)
def test_operations_of_a_step_are_those_of_the_formula(tmp_path, monkeypatch, name, seq_len):
    # torch counts plain products only, not those of a group.
    monkeypatch.setattr(grouped, "is_served", lambda *_: False)
    model = MODELS[name]
    sequences = 4
    plan = tiny.tiny_plan(
        tmp_path / "data",
        model,
        seq_len=seq_len,
        batch_ramp=((0, sequences),),
        tokens=sequences * seq_len,
        num_steps=1,
    )
    count = flops_per_token(model, seq_len, with_mtp=model.mtp is not None, pairs=kernel_pairs)
    tokens = sequences * seq_len
    # Plain products show every multiplication; fused kernels would be estimated by torch.
    with world_of_one(plan), sdpa_kernel(SDPBackend.MATH):
        engine = Engine(plan, plan.segments[0], tmp_path)
        batch = next(engine.text.micro_batches(0, 2, 2))
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            engine.chunks[0](
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
            )
        with FlopCounterMode(display=False) as train:
            engine.train_step()
    assert forward.get_total_flops() == round(count.forward * 2 * seq_len)
    assert train.get_total_flops() == round(count.train * tokens)
