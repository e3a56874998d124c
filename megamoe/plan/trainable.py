"""What a plan may ask that no engine does yet. Such a plan can be made and read, but not run."""

from collections.abc import Iterator

from megamoe.errors import PlanError
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe.model import MLA, Model
from megamoe.recipe.optim import AdamW
from megamoe.recipe.precision import Bf16, Fp32

_ADAMW = (
    "AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0, "
    'moments_dtype="float32")'
)


def check_trainable(plan: Plan) -> None:
    """Raise PlanError, naming what to change, unless every part of the plan has an engine."""
    for problem in _problems(plan):
        raise PlanError(f"{plan.recipe}: {problem}")


def left_out(segment: Segment) -> tuple[str, ...]:
    """Return a line on what a segment asks that no engine does yet and that changes no number."""
    if not (parts := segment.layout.recompute):
        return ()
    return (
        f"{segment.stage}: layout.recompute {', '.join(parts)} has no engine yet: activations are "
        "kept, with the same result and more memory",
    )


def _problems(plan: Plan) -> Iterator[str]:
    if not isinstance(plan.optimizer, AdamW):
        name = type(plan.optimizer).__name__
        yield f"optimizer {name} has no engine yet; give --set 'optimizer={_ADAMW}'"
    elif plan.optimizer.moments_dtype != "float32":
        # Megatron-Core 0.16.1 optimizer/optimizer_config.py:423: float32 alone, but with Transformer
        # Engine's Adam (use_precision_aware_optimizer)
        yield (
            f"optimizer.moments_dtype {plan.optimizer.moments_dtype!r} has no engine yet; "
            "give --set \"optimizer.moments_dtype='float32'\""
        )
    yield from model_problems(plan.model)
    for segment in plan.segments:
        yield from _segment_problems(segment)


def model_problems(model: Model) -> Iterator[str]:
    """Yield what a model asks that no engine does yet, each with what to give instead."""
    if model.experts.score == "softmax" and model.experts.top_k == 1:
        # Megatron-Core 0.16.1 transformer/transformer_config.py:1634 raises a bare ValueError
        yield (
            "model.experts.top_k 1 with score 'softmax' has no engine yet: a softmax over one expert "
            "is always 1; give --set model.experts.top_k=2, or --set \"model.experts.score='sigmoid'\""
        )
    for name, rope in (("local_rope", model.local_rope), ("global_rope", model.global_rope)):
        if rope is None:
            if isinstance(model.attention, MLA) and name[0].upper() in model.window_pattern:
                yield f"model.{name} None has no engine yet with MLA; give a Rope(...)"
            continue
        wanted = isinstance(model.attention, MLA)
        if rope.interleaved != wanted:
            kind = type(model.attention).__name__
            yield (
                f"model.{name}.interleaved {rope.interleaved} has no engine yet with {kind}; "
                f"give --set model.{name}.interleaved={wanted}"
            )


def _segment_problems(segment: Segment) -> Iterator[str]:
    if not isinstance(segment.precision, (Bf16, Fp32)):
        name = type(segment.precision).__name__
        yield (
            f"{segment.stage}.precision {name} has no engine yet; "
            f"give --set '{segment.stage}.precision=Bf16()'"
        )
