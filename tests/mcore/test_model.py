"""The model that trains equals one written from the papers, in losses and in every gradient.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megamoe.mcore import compat
from megamoe.mcore.model import build_model, unwrap
from megamoe.mcore.router import BalancedRouter
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe import DualNorm, Model, Mtp, PeriNorm, PreNorm, Rope
from tests.mcore import tiny
from tests.mcore.world import world_of_one
from tests.reference.model import Reference, balancing_loss, mtp_losses, token_losses

FLOAT32 = 2.0**-24  # the largest relative error of one rounding
BATCH, SEQ_LEN = 2, 21
MTP_WEIGHT = 0.3
LATENT, GROUPED, SOFTMAX = tiny.LATENT, tiny.GROUPED, tiny.SOFTMAX


def yarn(**changes: float) -> Rope:
    """Return the tiny positions with other values of YaRN."""
    return replace(tiny.STRETCHED, yarn=replace(tiny.YARN, **changes))


CASES: dict[str, tuple[Model, float]] = {
    "latent, peri-norm": (LATENT, 1.0),
    "latent, pre-norm": (replace(LATENT, norm=PreNorm(eps=1e-5, zero_centered=True)), 1.0),
    "latent, dual norm of MoE layers alone": (
        replace(LATENT, norm=DualNorm(eps=1e-5, zero_centered=False, after_dense_mlp=False)),
        1.0,
    ),
    "latent, interpolated": (LATENT, 8.0),
    "latent, whole queries": (
        replace(LATENT, attention=replace(LATENT.attention, q_lora_rank=None)),
        1.0,
    ),
    "latent, two shared experts": (
        replace(LATENT, experts=replace(LATENT.experts, num_shared=2)),
        1.0,
    ),
    "latent, prediction with experts": (replace(LATENT, mtp=Mtp(num_layers=1, ffn="moe")), 1.0),
    "grouped": (GROUPED, 1.0),
    "grouped, peri-norm": (replace(GROUPED, norm=PeriNorm(eps=1e-6, zero_centered=False)), 1.0),
    "grouped, two predictions": (replace(GROUPED, mtp=Mtp(num_layers=2, ffn="dense")), 1.0),
    "grouped, groups of experts": (
        replace(GROUPED, experts=replace(GROUPED.experts, num_groups=4, group_top_k=2, top_k=4)),
        1.0,
    ),
    "dual norm, groups, yarn, as A.X K1": (tiny.DUAL, 1.0),
    "latent, yarn of global layers": (
        replace(LATENT, attention=tiny.DUAL.attention, global_rope=tiny.STRETCHED),
        1.0,
    ),
    "latent, yarn that scales all scores": (
        replace(tiny.DUAL, global_rope=yarn(mscale=0.7, mscale_all_dim=1.0)),
        1.0,
    ),
    "latent, two global groups of 16 experts": (
        replace(LATENT, experts=replace(tiny.GROUPS, num_groups=2, group_top_k=1)),
        1.0,
    ),
    "softmax, yarn of global layers": (
        replace(
            SOFTMAX,
            attention=replace(SOFTMAX.attention, head_dim=16),
            global_rope=replace(tiny.STRETCHED, interleaved=False),
        ),
        1.0,
    ),
    "softmax, tied": (SOFTMAX, 1.0),
    "softmax, interpolated": (SOFTMAX, 8.0),
    "softmax, scaled": (
        replace(SOFTMAX, experts=replace(SOFTMAX.experts, top_k=3, scaling_factor=1.5)),
        1.0,
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one forward and backward pass gave."""

    losses: Tensor  # [B, S]
    gradients: dict[str, Tensor]


@contextmanager
def built(folder: Path, model: Model, interpolation: float, seq_len: int) -> Iterator:
    """Build the Megatron-core model of a plan, with weights that leave no part without effect."""
    changes = {"seq_len": seq_len, "rope_interpolation": interpolation}
    if model.mtp is not None:
        changes["mtp_loss"] = MTP_WEIGHT
    plan: Plan = tiny.tiny_plan(folder / "data", model, **changes)
    segment: Segment = plan.segments[0]
    with world_of_one(plan):
        [chunk] = build_model(plan, segment)
        randomize(chunk)
        yield chunk, segment


def randomize(chunk: torch.nn.Module) -> None:
    """Draw weights so large that attention is far from even and norms far from 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in chunk.parameters():
            std = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.add_(torch.randn(weight.shape, generator=generator) * std)
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                module.weight.mul_(2)
                shares_E = torch.rand(module.num_experts, generator=generator)
                module.previous_shares_E.copy_(shares_E / shares_E.sum())
                if module.expert_bias is not None:
                    module.expert_bias.normal_(std=0.1, generator=generator)


def batch(seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, labels and a mask with holes."""
    generator = torch.Generator().manual_seed(6)
    text = torch.randint(tiny.VOCAB, (BATCH, seq_len + 1), generator=generator)
    mask = (torch.rand(BATCH, seq_len, generator=generator) < 0.8).float()
    mask[:, 0] = 1
    return text[:, :-1].contiguous(), text[:, 1:].contiguous(), mask


def run_megatron(chunk: torch.nn.Module, seq_len: int) -> Run:
    tokens, labels, mask = batch(seq_len)
    position_ids = torch.arange(seq_len).expand(BATCH, -1)
    losses_BS = chunk(tokens, position_ids, None, labels=labels, loss_mask=mask)
    (losses_BS * mask).sum().backward()
    gradients = {
        reference_name(name): weight.main_grad.clone()
        for name, weight in unwrap(chunk).named_parameters()
    }
    return Run(losses_BS.detach(), gradients)


def reference_weights(chunk: torch.nn.Module) -> dict[str, Tensor]:
    state = unwrap(chunk).state_dict()
    weights = {
        reference_name(name): x.detach().double()
        for name, x in state.items()
        if isinstance(x, Tensor)
    }
    for name, _ in unwrap(chunk).named_parameters():
        weights[reference_name(name)].requires_grad_()
    return weights


def reference_name(name: str) -> str:
    """Return the reference's name of a weight: that of Megatron-core 0.16.1."""
    return name.replace(".mtp_model_layer.", ".transformer_layer.")


def run_reference(reference: Reference, segment: Segment, seq_len: int) -> Run:
    tokens, labels, mask = batch(seq_len)
    outputs = reference.run(tokens)
    losses_BS = token_losses(outputs.logits, labels)
    shares_E = {
        layer.name: reference.weights[f"{layer.name}.router.previous_shares_E"]
        for layer in outputs.routed
    }
    # The balancing losses are means over tokens; the sum that is divided by the number of tokens in
    # the end counts them once a token.
    total = (losses_BS * mask).sum() + BATCH * seq_len * balancing_loss(
        outputs, reference.model, segment.router, shares_E
    )
    further = mtp_losses(outputs, labels, mask)
    for losses in further:
        total = total + MTP_WEIGHT / len(further) * losses.sum()
    leaves = {name: x for name, x in reference.weights.items() if x.requires_grad}
    # An expert that no token visits has no part in the loss: its gradient is 0.
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return Run(losses_BS.detach(), dict(zip(leaves, gradients, strict=True)))


def roundings(model: Model, seq_len: int) -> int:
    """Return the additions on the longest way from a token to its loss.

    A sum of n products errs by at most n roundings of its size. A layer norms its input (D terms),
    projects it to heads, scores against the keys and sums over them, projects back, norms again
    where norms are around the branch, and sums through an MLP; the latent ones pass a third matrix.
    """
    hidden, attention = model.hidden_dim, model.attention
    latent = 2 * 16 if hasattr(attention, "kv_lora_rank") else 0
    heads = 4 * 8
    ffn = 2 * max(model.dense_ffn_dim or 0, model.experts.ffn_dim * model.experts.num_shared)
    layer = 4 * hidden + hidden + latent + 12 + 2 * seq_len + heads + hidden + ffn
    mtp = model.mtp.num_layers if model.mtp else 0
    return (model.num_layers + mtp) * layer + mtp * 2 * hidden + 2 * hidden + model.vocab_size


def compare(trained: Run, expected: Run, model: Model, seq_len: int) -> list[str]:
    """Return what differs by more than rounding: 'losses', or names of weights (gradients).

    The bound: all roundings on the longest way in the same direction, relative to the largest
    value. They do cancel, which leaves room for what softmax and norms make of them.
    """
    forward = roundings(model, seq_len) * FLOAT32
    # A gradient has passed through the model and back (each product twice), then sums over tokens.
    backward = 3 * forward + BATCH * seq_len * FLOAT32
    differing = []
    error = (trained.losses.double() - expected.losses).abs().max()
    if not error <= forward * expected.losses.abs().max():
        differing.append("losses")
    assert trained.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (trained.gradients[name].double() - gradient).abs().max()
        if not error <= backward * gradient.abs().max():
            differing.append(name)
    return differing


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_reference(tmp_path, case):
    model, interpolation = CASES[case]
    with built(tmp_path, model, interpolation, SEQ_LEN) as (chunk, segment):
        weights = reference_weights(chunk)
        trained = run_megatron(chunk, SEQ_LEN)
    expected = run_reference(Reference(model, weights, interpolation), segment, SEQ_LEN)
    assert compare(trained, expected, model, SEQ_LEN) == []


def test_the_model_is_of_the_class_that_megatron_core_does_not_deprecate(tmp_path):
    with built(tmp_path, LATENT, 1.0, SEQ_LEN) as (chunk, _):
        name = type(unwrap(chunk)).__name__
    assert name == ("GPTModel" if compat.MEGATRON_CORE < (0, 19) else "HybridModel")


@pytest.mark.parametrize("seq_len", [1, 4, 5, 6, 10, 11])
def test_sequences_around_the_window_of_five_are_those_of_the_reference(tmp_path, seq_len):
    with built(tmp_path, LATENT, 1.0, seq_len) as (chunk, segment):
        weights = reference_weights(chunk)
        trained = run_megatron(chunk, seq_len)
    expected = run_reference(Reference(LATENT, weights), segment, seq_len)
    assert compare(trained, expected, LATENT, seq_len) == []


@pytest.mark.parametrize("case", ["latent, peri-norm", "softmax, tied"])
def test_logits_are_those_of_the_reference(tmp_path, case):
    model, _ = CASES[case]
    tokens, _, _ = batch(SEQ_LEN)
    with built(tmp_path, model, 1.0, SEQ_LEN) as (chunk, _), torch.no_grad():
        weights = reference_weights(chunk)
        logits_BSV = chunk(tokens, torch.arange(SEQ_LEN).expand(BATCH, -1), None)
        expected = Reference(model, weights).run(tokens).logits
    bound = roundings(model, SEQ_LEN) * FLOAT32 * expected.abs().max()
    assert (logits_BSV.double() - expected).abs().max() <= bound


def other(model: Model, **changes: object) -> Model:
    """Return a model with other values in its parts: 'norm__eps' is the field of a field."""
    for path, value in changes.items():
        part, _, name = path.partition("__")
        new = replace(getattr(model, part), **{name: value}) if name else value
        model = replace(model, **{part: new})
    return model


@pytest.mark.parametrize(
    ("model", "wrong", "interpolation"),
    [
        (LATENT, other(LATENT, window=6), 1.0),
        (LATENT, other(LATENT, window=4), 1.0),
        (LATENT, other(LATENT, window_pattern="LLGL"), 1.0),
        (LATENT, other(LATENT, local_rope__base=20_000.0), 1.0),
        (LATENT, other(LATENT, global_rope__base=500_000.0), 1.0),
        (LATENT, other(LATENT, local_rope__interleaved=False), 1.0),
        (LATENT, LATENT, 2.0),
        (LATENT, other(LATENT, norm__eps=1e-3), 1.0),
        (LATENT, other(LATENT, experts__top_k=3), 1.0),
        (GROUPED, other(GROUPED, global_rope=GROUPED.local_rope), 1.0),
        (GROUPED, other(GROUPED, local_rope=None), 1.0),
        (GROUPED, other(GROUPED, attention__qk_norm=False), 1.0),
        (GROUPED, other(GROUPED, experts__scaling_factor=2.51), 1.0),
        (SOFTMAX, SOFTMAX, 1.25),
        (tiny.DUAL, other(tiny.DUAL, global_rope__yarn=None), 1.0),
        (tiny.DUAL, other(tiny.DUAL, global_rope=yarn(factor=4.1)), 1.0),
        (tiny.DUAL, other(tiny.DUAL, global_rope=yarn(original_seq_len=100)), 1.0),
        (tiny.DUAL, other(tiny.DUAL, global_rope=yarn(beta_fast=32.0)), 1.0),
        (tiny.DUAL, other(tiny.DUAL, global_rope=yarn(beta_slow=2.0)), 1.0),
        (tiny.DUAL, other(tiny.DUAL, global_rope=yarn(mscale=0.9)), 1.0),
        (tiny.DUAL, other(tiny.DUAL, global_rope=yarn(mscale_all_dim=0.1)), 1.0),
        (tiny.DUAL, other(tiny.DUAL, experts__group_top_k=2), 1.0),
        (tiny.DUAL, other(tiny.DUAL, norm=PreNorm(eps=1e-6, zero_centered=False)), 1.0),
    ],
)
def test_a_wrong_reference_is_noticed(tmp_path, model, wrong, interpolation):
    with built(tmp_path, model, 1.0, SEQ_LEN) as (chunk, segment):
        weights = reference_weights(chunk)
        trained = run_megatron(chunk, SEQ_LEN)
    expected = run_reference(Reference(wrong, weights, interpolation), segment, SEQ_LEN)
    assert "losses" in compare(trained, expected, model, SEQ_LEN)
