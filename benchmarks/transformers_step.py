"""The same step by plain transformers, for gpu_check.py: DeepSeek-V3's model in the recipe's sizes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.megamoe_step import Load
from benchmarks.timing import peak_memory, reset_peak, summary, time_steps
from megamoe.mcore.data import TrainingText
from megamoe.plan.flops import flops_per_token, visible_pairs
from megamoe.plan.plan import Plan
from megamoe.recipe import MLA, Model

DIFFERS = (
    "full attention in every layer: it has no windows",
    "Pre-LN with plain RMSNorm: no Peri-LN, no zero-centred weights, half the norms",
    "one RoPE base for all layers",
    "weights, gradients and Adam's moments in bfloat16: no float32 copy, no float32 sum",
    "no balancing losses; a bias that stays 0 in the choice of experts",
    "no clipping of the gradient",
)


def measure(
    model: Any,
    plan: Plan,
    text: TrainingText,
    load: Load,
    device: torch.device,
    peaks: dict[str, float | None],
) -> dict[str, Any]:
    """Return the figures of a transformers model's steps on the same text."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.segments[0].lr.peak, fused=device.type == "cuda"
    )
    losses: list[torch.Tensor] = []
    place = 0

    def step() -> None:
        nonlocal place
        total = torch.zeros((), device=device)
        batches = text.micro_batches(place, load.sequences, load.micro_batch)
        place += load.sequences
        for batch in batches:
            logits = model(batch["tokens"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch["labels"].flatten()
            )
            (loss * load.micro_batch / load.sequences).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * load.micro_batch / load.sequences
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)

    reset_peak(device)
    seconds = time_steps(step, device, warmup=load.warmup, count=load.count)
    seq_len = plan.segments[0].seq_len
    flops = flops_per_token(plan.model, seq_len, with_mtp=False, pairs=_without_windows).train
    figures = summary(seconds, load.sequences * seq_len, flops, peaks)
    return figures | {
        "peak_memory_bytes": peak_memory(device),
        "loss": {"first": float(losses[0]), "last": float(losses[-1])},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "experts_implementation": model.config._experts_implementation,
        "attention_implementation": model.config._attn_implementation,
        "differs": DIFFERS,
    }


def build(model: Model, seq_len: int, device: torch.device) -> Any:
    """Return a DeepSeek-V3 model of the recipe's width, heads, experts, layers and vocabulary."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    attention, experts = model.attention, model.experts
    assert isinstance(attention, MLA), attention
    fields = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_dim,
        "intermediate_size": model.dense_ffn_dim or experts.ffn_dim,
        "moe_intermediate_size": experts.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "n_shared_experts": experts.num_shared,
        "n_routed_experts": experts.num_routed,
        "routed_scaling_factor": experts.scaling_factor,
        "kv_lora_rank": attention.kv_lora_rank,
        "q_lora_rank": attention.q_lora_rank,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "n_group": experts.num_groups,
        "topk_group": experts.group_top_k,
        "num_experts_per_tok": experts.top_k,
        "first_k_dense_replace": model.num_dense_layers,
        "max_position_embeddings": seq_len,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "num_mtp_layers": 0,
    }
    known = inspect.signature(DeepseekV3Config.__init__).parameters
    config = DeepseekV3Config(**{name: x for name, x in fields.items() if name in known})
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    return built.to(device).train()


@contextmanager
def balanced(model: Any) -> Iterator[None]:
    """Have every router choose at random, which is even, until the end.

    Experts are chosen by score + bias. A bias of each token's own, with differences far above
    those of scores (0 to 1), leaves the choice to chance and the weights of the chosen as they are.
    """
    routers = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    assert routers, "a model without routers that have a bias"
    biases = [router.e_score_correction_bias for router in routers]

    def choose(router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        num_experts, hidden_dim = router.weight.shape
        num_tokens = inputs[0].numel() // hidden_dim
        router.e_score_correction_bias = 1_000 * torch.rand(
            num_tokens, num_experts, device=inputs[0].device
        )

    handles = [router.register_forward_pre_hook(choose) for router in routers]
    try:
        yield
    finally:
        for handle, router, bias in zip(handles, routers, biases, strict=True):
            handle.remove()
            router.e_score_correction_bias = bias


def _without_windows(seq_len: int, _: int | None) -> int:
    return visible_pairs(seq_len, None)
