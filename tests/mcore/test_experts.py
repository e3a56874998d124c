"""Grouped experts are Megatron-core's SequentialMLP: outputs, gradients, initial weights, checkpoints.

Shapes: T tokens sorted by expert, E experts, D hidden, F ffn of one expert.
"""

import re
from dataclasses import replace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import silu

from megamoe.mcore import checkpoint, spec
from megamoe.mcore.config import transformer_config
from megamoe.mcore.engine import Engine
from megamoe.mcore.experts import GroupedExperts
from megamoe.mcore.model import unwrap
from megamoe.recipe import Bf16
from tests.mcore import tiny
from tests.mcore.world import adam_states, train, world_of_one

FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8  # the largest relative error of one rounding
NUM_EXPERTS = 4
COUNTS = {
    "uneven": [31, 2, 13, 17],
    "empty experts": [0, 63, 0, 37],
    "one row": [0, 0, 1, 0],
    "all to one": [0, 63, 0, 0],
    "no rows": [0, 0, 0, 0],
}
SIZES = [(32, 16), (63, 25)]  # hidden and ffn; grouped_mm takes the first


class MarkedSequentialMLP(SequentialMLP):
    """Megatron-core's own, with the marks that it sets with expert parallelism only."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for weight in self.parameters():
            weight.allreduce = False


EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.linear_fc(\d)\.weight")
SEQUENTIAL = ModuleSpec(module=MarkedSequentialMLP, submodules=spec._linears())


@pytest.fixture
def build(tmp_path):
    """A function that makes both kinds of experts with the same random weights."""

    def make(sizes, dtype):
        hidden_dim, ffn_dim = sizes
        experts = replace(tiny.LATENT.experts, ffn_dim=ffn_dim, num_routed=NUM_EXPERTS)
        model = replace(tiny.LATENT, hidden_dim=hidden_dim, experts=experts)
        changes = {"precision": Bf16()} if dtype is torch.bfloat16 else {}
        plan = tiny.tiny_plan(tmp_path / "data", model, **changes)
        with world_of_one(plan):
            config = transformer_config(plan, plan.segments[0])
            groups = ProcessGroupCollection.use_mpu_process_groups()
            grouped = GroupedExperts(NUM_EXPERTS, config, groups)
            sequential = SequentialMLP(NUM_EXPERTS, config, spec._linears(), groups)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in grouped.parameters():
                std = weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            for index, expert in enumerate(sequential.local_experts):
                expert.linear_fc1.weight.copy_(grouped.weight1[index])
                expert.linear_fc2.weight.copy_(grouped.weight2[index])
        return grouped, sequential

    return make


def run(experts, x, counts, probs, upstream) -> tuple[Tensor, ...]:
    """Return output, gradients of tokens and probabilities, and of both weights of all experts."""
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    output, bias = experts(x, torch.tensor(counts), probs)
    assert bias is None
    output.backward(upstream)
    if isinstance(experts, GroupedExperts):
        weights = (experts.weight1.grad, experts.weight2.grad)
    else:
        linears = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in experts.local_experts]
        weights = tuple(
            torch.stack([w.grad if w.grad is not None else torch.zeros_like(w) for w in pair])
            for pair in zip(*linears, strict=True)
        )
    return output.detach(), x.grad, probs.grad, *weights


def reference(experts, x, counts, probs, upstream, *, sizes: bool) -> tuple[Tensor, ...]:
    """Return the same in float64, written out; or the sums of the sizes of all terms.

        h = x w1', g and u its halves; y = (p silu(g) u) w2'
    A size bounds a value and, times the roundings on its way, its error: |silu(g)| <= |g|,
    |silu'| <= 1.1, |silu''| <= 0.5.
    """
    w1, w2 = experts.weight1.detach().double(), experts.weight2.detach().double()
    x, p, dy = x.double(), probs.double()[:, None], upstream.double()
    if sizes:
        w1, w2, x, dy = (tensor.abs() for tensor in (w1, w2, x, dy))
    parts = []
    for expert, rows in enumerate(torch.arange(len(x)).split(counts)):
        g, u = (x[rows] @ w1[expert].T).chunk(2, dim=-1)
        sigmoid = g.sigmoid()
        act = g if sizes else silu(g)
        slope = 1.1 + 0.5 * g if sizes else sigmoid * (1 + g * (1 - sigmoid))
        dh = dy[rows] @ w2[expert]
        dact = torch.cat((dh * p[rows] * u * slope, dh * p[rows] * act), dim=-1)
        parts.append(
            (
                (p[rows] * act * u) @ w2[expert].T,
                dact @ w1[expert],
                (dh * act * u).sum(dim=-1),
                dact.T @ x[rows],
                dy[rows].T @ (p[rows] * act * u),
            )
        )
    y, dx, dp, dw1, dw2 = zip(*parts, strict=True)
    return torch.cat(y), torch.cat(dx), torch.cat(dp), torch.stack(dw1), torch.stack(dw2)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("sizes", SIZES, ids=["whole rows", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_float64_as_are_megatrons(build, dtype, sizes, counts):
    grouped, sequential = build(sizes, dtype)
    (hidden_dim, ffn_dim), num_tokens = sizes, sum(counts)
    generator = torch.Generator().manual_seed(4)
    x, upstream = (
        torch.randn(num_tokens, hidden_dim, generator=generator).to(dtype) for _ in range(2)
    )
    probs = torch.rand(num_tokens, generator=generator)
    inputs = (x, counts, probs, upstream)
    values = reference(grouped, *inputs, sizes=False)
    bounds = reference(grouped, *inputs, sizes=True)
    # The longest way, to a gradient of the first weight: g and u (D terms each), dh (D), the sum
    # over tokens, over F or 2F for the others, and a dozen products. In bfloat16 each of at most
    # twelve results on that way is stored rounded.
    roundings = (3 * hidden_dim + 2 * ffn_dim + num_tokens + 12) * FLOAT32
    roundings += 12 * BFLOAT16 if dtype is torch.bfloat16 else 0
    for experts in (grouped, sequential):
        for ours, value, size in zip(run(experts, *inputs), values, bounds, strict=True):
            assert ours.shape == value.shape
            assert ((ours.double() - value).abs() <= roundings * size).all()


def test_an_expert_without_tokens_has_a_zero_gradient(build):
    grouped, _ = build(SIZES[0], torch.float32)
    x, probs = torch.randn(9, 32), torch.rand(9)
    grads = run(grouped, x, [4, 0, 5, 0], probs, torch.randn(9, 32))[3:]
    for gradient in grads:
        assert (gradient[[1, 3]] == 0).all()
        assert (gradient[[0, 2]] != 0).any(dim=-1).any()


def test_every_weight_says_that_it_belongs_to_an_expert(build):
    grouped, _ = build(SIZES[0], torch.float32)
    assert [weight.allreduce for weight in grouped.parameters()] == [False, False]
    assert [weight.partition_dim for weight in grouped.parameters()] == [1, 2]


# Checkpoints.


def engine(plan, folder, kind, monkeypatch, num_steps=0) -> Engine:
    monkeypatch.setattr(spec, "GroupedExperts", kind)
    return train(plan, folder, num_steps)


def adam(engine: Engine) -> dict[str, Tensor]:
    """Return weights and Adam's states by name, those of experts as GroupedExperts has them."""
    values: dict[str, list[Tensor]] = {}
    for name, state in adam_states(engine).items():
        grouped = EXPERT.sub(r".experts.weight\1", name)  # experts come in order
        for key, value in state.items():
            flat = value.detach().flatten().clone()
            if key != "step" or f"{grouped}.step" not in values:
                values.setdefault(f"{grouped}.{key}", []).append(flat)
    return {name: torch.cat(parts) for name, parts in values.items()}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("kinds", [(SEQUENTIAL, GroupedExperts), (GroupedExperts, SEQUENTIAL)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_checkpoint_of_either_kind_is_loaded_bit_for_bit_by_the_other(
    tmp_path, monkeypatch, kinds, precision
):
    changes = {"precision": Bf16()} if precision == "bfloat16" else {}
    plan = tiny.tiny_plan(tmp_path / "data", **changes)
    with world_of_one(plan):
        saved = engine(plan, tmp_path / "saved", kinds[0], monkeypatch, num_steps=2)
        folder = saved.save(wait=True)
        loaded = engine(plan, tmp_path / "loaded", kinds[1], monkeypatch)
        checkpoint.load(folder, loaded.chunks, loaded.optimizer, same_layout=True)
    ours, theirs = adam(loaded), adam(saved)
    assert differing(ours, theirs) == []
    assert (
        differing(
            dict(unwrap(loaded.chunks[0]).named_buffers()),
            dict(unwrap(saved.chunks[0]).named_buffers()),
        )
        == []
    )


def test_initial_weights_are_those_of_megatrons_experts(tmp_path, monkeypatch):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        ours = adam(engine(plan, tmp_path / "ours", GroupedExperts, monkeypatch))
        theirs = adam(engine(plan, tmp_path / "theirs", SEQUENTIAL, monkeypatch))
    assert differing(ours, theirs) == []
