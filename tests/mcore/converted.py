"""Tiny models of each Hugging Face architecture, and what our engine makes of text with them."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megamoe.mcore.engine import Engine
from megamoe.mcore.model import unwrap
from megamoe.plan.json import write_plan
from megamoe.plan.plan import Plan
from megamoe.recipe import DualNorm, Model, Mtp, PreNorm, Rope, Yarn
from tests.mcore import tiny
from tests.mcore.test_model import randomize

TEXT = (
    "나랏말ᄊᆞ미 듕귁에 달아 문자와로 서르 ᄉᆞᄆᆞᆺ디 아니ᄒᆞᆯᄊᆡ",
    "We hold these truths to be self-evident, that all men are created equal.",
)
SEQ_LEN = 64  # the windows of the tiny models are 5

_LATENT = replace(
    tiny.LATENT,
    window_pattern="G",
    window=None,
    local_rope=None,
    global_rope=Rope(base=10_000.0, interleaved=True),
    norm=PreNorm(eps=1e-6, zero_centered=False),
    experts=replace(tiny.LATENT.experts, scaling_factor=2.5, num_groups=4, group_top_k=2, top_k=4),
)
# Of 8 pairs, the first stays, four are blended and three are divided by the factor. Text is four
# times as long as the original length.
_YARN = Yarn(
    factor=4.0,
    original_seq_len=16,
    beta_fast=2.0,
    beta_slow=0.25,
    mscale=1.0,
    mscale_all_dim=0.0,
)
_STRETCHED = Rope(base=100.0, interleaved=True, yarn=_YARN)
_ROTATED = replace(tiny.LATENT.attention, qk_rope_head_dim=16)
_DUAL = DualNorm(eps=1e-6, zero_centered=False, after_dense_mlp=False)
_SOFTMAX = replace(tiny.SOFTMAX, window_pattern="L", global_rope=None)
MODELS: dict[str, Model] = {
    "exaone_moe": tiny.GROUPED,
    # As published, three local layers to a global one; models that transformers make have no prediction.
    "exaone_moe, no prediction": replace(tiny.GROUPED, mtp=None),
    "exaone_moe, groups, two shared": replace(
        tiny.GROUPED,
        window_pattern="LG",
        mtp=None,
        num_dense_layers=2,
        experts=replace(tiny.GROUPED.experts, num_shared=2, num_groups=4, group_top_k=2, top_k=4),
    ),
    "mixtral, window": replace(_SOFTMAX, tied_embeddings=False),
    "mixtral, tied": replace(
        _SOFTMAX, window_pattern="G", window=None, local_rope=None, global_rope=_SOFTMAX.local_rope
    ),
    "deepseek_v3": replace(_LATENT, experts=replace(_LATENT.experts, expert_bias=True)),
    "deepseek_v3, whole queries": replace(
        _LATENT, attention=replace(_LATENT.attention, q_lora_rank=None)
    ),
    "deepseek_v3, yarn that scales all scores": replace(
        _LATENT,
        attention=_ROTATED,
        global_rope=replace(_STRETCHED, yarn=replace(_YARN, mscale=0.7, mscale_all_dim=1.0)),
    ),
    "deepseek_v3, yarn that scales rotated scores by half": replace(
        _LATENT,
        attention=_ROTATED,
        global_rope=replace(_STRETCHED, yarn=replace(_YARN, mscale=0.5, mscale_all_dim=0.0)),
    ),
    "deepseek_v3, prediction": replace(
        _LATENT,
        experts=replace(_LATENT.experts, expert_bias=True),
        mtp=Mtp(num_layers=1, ffn="moe"),
    ),
    "deepseek_v3, two predictions, tied": replace(
        _LATENT, tied_embeddings=True, mtp=Mtp(num_layers=2, ffn="dense")
    ),
    "axk1": replace(_LATENT, norm=_DUAL, num_dense_layers=0, dense_ffn_dim=None),
    "axk1, dense layer": replace(_LATENT, norm=_DUAL),
    "axk1, norm after a dense layer": replace(_LATENT, norm=replace(_DUAL, after_dense_mlp=True)),
    "axk1, yarn": replace(_LATENT, norm=_DUAL, attention=_ROTATED, global_rope=_STRETCHED),
    "axk1, yarn, norm after a dense layer": replace(
        _LATENT,
        norm=replace(_DUAL, after_dense_mlp=True),
        attention=_ROTATED,
        global_rope=_STRETCHED,
        experts=replace(_LATENT.experts, expert_bias=True),
    ),
    "axk1, prediction": replace(
        _LATENT,
        norm=replace(_DUAL, after_dense_mlp=True),
        experts=replace(_LATENT.experts, expert_bias=True),
        mtp=Mtp(num_layers=1, ffn="moe"),
    ),
    "vaetki": tiny.LATENT,
    "keural_moe": tiny.SOFTMAX,
}


def plan_of(folder: Path, name: str, **changes: object) -> Plan:
    """Return the plan of a run in `folder`, which holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = tiny.tiny_plan(folder / "data", MODELS[name], **changes)
    write_plan(folder / "plan.json", plan)
    return plan


def saved(plan: Plan, folder: Path) -> Engine:
    """Return an engine with weights that leave no part without effect, and their checkpoint."""
    engine = Engine(plan, plan.segments[0], folder)
    for chunk in engine.chunks:
        randomize(unwrap(chunk))
    engine.optimizer.reload_model_params()
    engine.save(wait=True)
    return engine


def tokens() -> Tensor:
    """Return real text, a byte a token, [B, S]."""
    rows = [list((text * 2).encode())[:SEQ_LEN] for text in TEXT]
    return torch.tensor(rows) % tiny.VOCAB


def logits(engine: Engine) -> Tensor:
    """Return our logits of the text, [B, S, V]."""
    return all_logits(engine)[0]


def all_logits(engine: Engine) -> list[Tensor]:
    """Return our logits of the next token of the text, then of the ones after it, [B, S, V] each."""
    [chunk] = engine.chunks
    text = tokens()
    found: list[Tensor] = []

    def keep(_: object, __: object, output: tuple[Tensor, None]) -> None:
        found.append(output[0].transpose(0, 1).clone())  # the loss overwrites it

    handle = unwrap(chunk).output_layer.register_forward_hook(keep)
    chunk.eval()
    with torch.no_grad():
        positions = torch.arange(SEQ_LEN).expand(len(text), -1)
        # Megatron-core predicts further tokens only where it has labels, and before the next one
        chunk(text, positions, None, labels=text, loss_mask=torch.ones_like(text))
    chunk.train()
    handle.remove()
    return [found[-1], *found[:-1]]
