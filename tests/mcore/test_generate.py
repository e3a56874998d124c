"""With a cache a model says what it says without, and the cache is as small as it should be.

Shapes: B batch, S sequence, V vocabulary.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.mcore.config import transformer_config
from megamoe.mcore.decode import make_cache
from megamoe.mcore.inference import all_logits, next_logits
from megamoe.mcore.init import initialize
from megamoe.mcore.model import build_chunk
from megamoe.nn.cache import Cache
from megamoe.recipe import GQA, MLA, DualNorm, Model
from megamoe.recipe.load import load_recipe, recipe_names
from megamoe.recipe.scale import scale_tiny
from tests.mcore import tiny
from tests.mcore.test_model import FLOAT32, randomize
from tests.mcore.world import world_of_one

ROOT = Path(__file__).parents[2]
LATENT, GROUPED, SOFTMAX = tiny.LATENT, tiny.GROUPED, tiny.SOFTMAX
TINY: dict[str, Model] = {
    "latent": LATENT,
    "latent, dual norm": replace(
        LATENT, norm=DualNorm(eps=1e-5, zero_centered=False, after_dense_mlp=False)
    ),
    "latent, whole queries": replace(LATENT, attention=replace(LATENT.attention, q_lora_rank=None)),
    "grouped": GROUPED,
    "softmax, tied": SOFTMAX,
}
RECIPES = {name: load_recipe(name) for name in recipe_names()}
MODELS = TINY | {name: scale_tiny(recipe).recipe.model for name, recipe in RECIPES.items()}
CASES = {name: (model, 1.0) for name, model in MODELS.items()} | {
    "latent, interpolated": (LATENT, 8.0),
    "grouped, interpolated": (GROUPED, 8.0),
}
FULL = {name: recipe.recipe.model for name, recipe in RECIPES.items()}


@contextmanager
def built(folder: Path, model: Model, interpolation: float = 1.0) -> Iterator:
    """Build a model with weights that leave no part without effect."""
    plan = tiny.tiny_plan(folder / "data", model, rope_interpolation=interpolation)
    with world_of_one(plan):
        module = build_chunk(plan, plan.segments[0])
        assert not transformer_config(plan, plan.segments[0]).bf16
        initialize([module], std=model.init_std, seed=1)
        randomize(module)
        yield module.eval()


def new_cache(model: Model, tokens: int, sequences: int = 1) -> Cache:
    return make_cache(model, size=(sequences, tokens), dtype=torch.float32, device="cpu")


def prompt_of(model: Model, length: int, sequences: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(model.vocab_size, (sequences, length), generator=generator)


def with_cache(module, model: Model, prompt_BS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return [B, S] the prompt and what follows, and [B, count, V] the logits on the way."""
    cache = new_cache(model, prompt_BS.shape[1] + count, len(prompt_BS))
    text_BS, new_BS, steps = prompt_BS, prompt_BS, []
    for _ in range(count):
        steps.append(next_logits(module, new_BS, cache))
        new_BS = steps[-1].argmax(dim=-1, keepdim=True)
        text_BS = torch.cat((text_BS, new_BS), dim=1)
    return text_BS, torch.stack(steps, dim=1)


def relative_error(logits_BSV: Tensor, expected_BSV: Tensor) -> float:
    return float((logits_BSV - expected_BSV).abs().max() / expected_BSV.abs().max())


def bound(model: Model, seq_len: int, rounding: float = FLOAT32) -> float:
    """Return how far apart two computations of the same logits may be, of the largest.

    The longest way from a table to a logit, in sums of so many terms: a layer norms, projects
    (through latents), scores keys and sums over them, projects back, norms again, and passes an
    MLP. All roundings in one direction, once in each of the two computations. They do cancel, which
    leaves room for what softmax and norms make of them.
    """
    attention, experts = model.attention, model.experts
    if isinstance(attention, MLA):
        latents = (attention.q_lora_rank or 0) + 2 * attention.kv_lora_rank
        key_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        heads = attention.num_heads * attention.v_head_dim
    else:
        latents, key_dim = 0, attention.head_dim
        heads = attention.num_heads * attention.head_dim
    ffn = 2 * max(model.dense_ffn_dim or 0, experts.ffn_dim * max(experts.num_shared, 1))
    layer = 5 * model.hidden_dim + latents + key_dim + 2 * seq_len + heads + ffn
    return 2 * rounding * (model.num_layers * layer + 2 * model.hidden_dim)


@pytest.fixture(scope="module")
def in_float64() -> dict[str, Any]:
    """Return what tests/mcore/generated.py found, by case; two processes share the cases."""
    names, found = list(CASES), {}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.mcore.generated", *names[half::2]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for half in range(2)
    ]
    for child in children:
        output, errors = child.communicate()
        assert child.returncode == 0, errors
        found |= json.loads(output)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_generated_tokens_are_those_without_a_cache(in_float64, name):
    found = in_float64[name]
    assert len(found["short"][0]) == 3 + 300
    assert found["short"] == found["without"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_after_a_prompt_longer_than_windows_are_the_likeliest(in_float64, name):
    found = in_float64[name]
    assert [len(tokens) for tokens in found["cached"]] == [300, 300]
    assert found["cached"] == found["likeliest"]
    assert found["error"] <= bound(CASES[name][0], 400, rounding=2.0**-53)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 11])
@pytest.mark.parametrize("name", TINY)
def test_prompts_around_the_window_of_five(tmp_path, name, length):
    model = MODELS[name]
    with built(tmp_path, model) as module:
        text_BS, logits_BSV = with_cache(module, model, prompt_of(model, length), 12)
        whole_BSV = all_logits(module, text_BS)[:, length - 1 : -1]
    assert relative_error(logits_BSV, whole_BSV) <= bound(model, length + 12)


@pytest.mark.parametrize("pieces", [[20], [7, 13], [1, 2, 3, 14], [1] * 20])
@pytest.mark.parametrize("name", TINY)
def test_a_prompt_may_come_in_pieces(tmp_path, name, pieces):
    model = MODELS[name]
    prompt_BS = prompt_of(model, 20)
    with built(tmp_path, model) as module:
        cache = new_cache(model, 20)
        for piece_BS in prompt_BS.split(pieces, dim=1):
            logits_BV = next_logits(module, piece_BS, cache)
        whole_BV = all_logits(module, prompt_BS)[:, -1]
    assert (logits_BV - whole_BV).abs().max() <= bound(model, 20) * whole_BV.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_the_most_likely_tokens_are_the_same_each_time(tmp_path, name):
    model = MODELS[name]
    with built(tmp_path, model) as module:
        first, logits = with_cache(module, model, prompt_of(model, 8), 40)
        second, again = with_cache(module, model, prompt_of(model, 8), 40)
    assert torch.equal(first, second)
    assert torch.equal(logits, again)


def test_a_wrong_cache_is_noticed(tmp_path):
    prompt_BS = prompt_of(LATENT, 17)
    with built(tmp_path, LATENT) as module:
        narrow = replace(LATENT, window=3)  # a query sees 4 before it
        text_BS, logits_BSV = with_cache(module, narrow, prompt_BS, 12)
        whole_BSV = all_logits(module, text_BS)[:, 16:-1]
    assert relative_error(logits_BSV, whole_BSV) > 100 * bound(LATENT, 29)


# Sizes, of tensors that have no values.


def sizes(model: Model, tokens: int) -> Cache:
    return make_cache(model, size=(1, tokens), dtype=torch.bfloat16, device="meta")


def token_bytes(model: Model) -> int:
    attention = model.attention
    if isinstance(attention, GQA):
        return 2 * attention.num_kv_heads * attention.head_dim * 2
    return (attention.kv_lora_rank + attention.qk_rope_head_dim) * 2


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("tokens", [1, 100, 131_072])
def test_a_local_layer_takes_its_window_and_a_global_layer_all(name, tokens):
    model = FULL[name]
    cache = sizes(model, tokens)
    for index, layer in enumerate(cache.layers):
        held = min(tokens, model.window or tokens) if model.is_local(index) else tokens
        assert layer.num_bytes == layer.bytes_at(tokens) == held * token_bytes(model)
    assert cache.num_bytes == cache.bytes_at(tokens)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keural_14b", 4_096),
        ("k_exaone_236b_a23b", 4_096),
        ("vaetki_7b_a1b", 1_152),
        ("vaetki_20b_a2b", 1_152),
        ("vaetki_100b_a10b", 1_152),
        ("ax_k1_519b_a33b", 1_152),
    ],
)
def test_bytes_of_a_token_in_a_layer(name, expected):
    assert {layer.bytes_per_token for layer in sizes(FULL[name], 9).layers} == {expected}


def test_k_exaone_takes_48_kib_a_token_and_18_mib_for_its_windows():
    cache = sizes(FULL["k_exaone_236b_a23b"], 262_144)
    assert cache.num_bytes == 48 * 2**10 * 262_144 + 18 * 2**20


def test_ax_k1_takes_61_layers_of_latents():
    assert sizes(FULL["ax_k1_519b_a33b"], 131_072).num_bytes == 61 * 1_152 * 131_072


@pytest.mark.parametrize(("tokens", "percent"), [(128_000, "83.00"), (131_072, "83.01")])
def test_windows_of_vaetki_100b_save_83_percent(tokens, percent):
    windows = FULL["vaetki_100b_a10b"]
    all_global = replace(windows, window_pattern="G", window=None, local_rope=None)
    share = 1 - sizes(windows, tokens).num_bytes / sizes(all_global, tokens).num_bytes
    assert f"{100 * share:.2f}" == percent
