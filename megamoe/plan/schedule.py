"""Schedules in closed form: learning rate and batch size by tokens, steps by token budget.

Everything counts the tokens of one segment. A ramp is a tuple of pairs (tokens seen, sequences per
step); an entry holds for every step that begins at or after its tokens.
"""

import math

from megamoe.recipe.stage import LearningRate

Ramp = tuple[tuple[int, int], ...]


def learning_rate_at(lr: LearningRate, stage_tokens: int, tokens: int) -> float:
    """Return the rate of the step that ends when `tokens` tokens of the stage have been seen.

    Warm-up, tokens <= warmup_tokens: peak * tokens / warmup_tokens.
    Decay, over the last decay_tokens, with f the share of them seen: final + (peak - final) * s(f),
    s = 1 - f (linear) or (1 + cos(pi f)) / 2 (cosine). Between them: peak. So the first step of a
    warm-up is above 0 and the last step of a decay is at `final`.
    """
    assert tokens > 0, tokens
    if tokens < lr.warmup_tokens:
        return lr.peak * tokens / lr.warmup_tokens
    since_decay = tokens - (stage_tokens - lr.decay_tokens)
    if lr.decay_tokens == 0 or since_decay <= 0:
        return lr.peak
    share = min(1.0, since_decay / lr.decay_tokens)
    left = 1 - share if lr.decay == "linear" else (1 + math.cos(math.pi * share)) / 2
    assert lr.final is not None, lr
    return lr.final + (lr.peak - lr.final) * left


def sequences_at(ramp: Ramp, tokens: int) -> int:
    """Return the sequences of the step that begins when `tokens` tokens have been seen."""
    assert tokens >= 0, tokens
    return next(size for start, size in reversed(ramp) if start <= tokens)


def steps(ramp: Ramp, seq_len: int, tokens: int) -> tuple[int, int]:
    """Return (steps, tokens) of the fewest whole steps that spend at least `tokens` tokens."""
    num_steps = spent = 0
    for (_, size), end in zip(ramp, _ends(ramp, tokens), strict=True):
        count = max(0, -(-(end - spent) // (size * seq_len)))
        num_steps += count
        spent += count * size * seq_len
    return num_steps, spent


def position_at_step(ramp: Ramp, seq_len: int, step: int) -> int:
    """Return the tokens seen after `step` steps of the segment."""
    assert step >= 0, step
    spent = 0
    for (_, size), end in zip(ramp[:-1], _ends(ramp, ramp[-1][0])[:-1], strict=True):
        count = min(step, max(0, -(-(end - spent) // (size * seq_len))))
        spent += count * size * seq_len
        step -= count
    return spent + step * ramp[-1][1] * seq_len


def _ends(ramp: Ramp, tokens: int) -> list[int]:
    """Return where each entry stops holding: at the next one's start, the last at `tokens`."""
    return [min(start, tokens) for start, _ in ramp[1:]] + [tokens]
