"""`--scale tiny`: a small model and a short curriculum, derived from any recipe by rule.

Structure stays: kinds of layer and their order, attention, norms, routing, shared experts, MTP, tied
embeddings, every stage with its schedule's shape, its mixture and its losses. Sizes shrink so that
the whole curriculum runs in minutes on a processor. Each changed value says by which rule.
"""

import math
from dataclasses import replace
from fnmatch import fnmatch

from megamoe.recipe.layout import Layout, one_rank
from megamoe.recipe.load import LoadedRecipe
from megamoe.recipe.model import GQA, MLA, Experts, Model, Rope
from megamoe.recipe.origin import Origin, is_covered, leaves
from megamoe.recipe.precision import Fp32
from megamoe.recipe.recipe import Published, Recipe
from megamoe.recipe.stage import LearningRate, Stage

HIDDEN = 128  # wide enough for four heads of 32, small enough for a processor
HEADS = 4  # divisible by tensor parallel 2 and 4
GQA_HEAD = 32
KV_LORA = 32  # a quarter of HIDDEN: the latent still compresses
NOPE_HEAD = ROPE_HEAD = V_HEAD = 16
MAX_DENSE_RATIO = 4  # of the dense MLP to the hidden size
MAX_EXPERT_RATIO = 0.5  # of an expert to the hidden size: experts stay fine-grained
EXPERTS = 8  # divisible by expert parallel 2, 4 and 8
TOP_K = 2  # more would be a dense model with 8 experts
VOCAB = 4_096  # a tokenizer of this size trains in seconds
SEQ_LEN = 128  # of the first stage
MAX_SEQ_GROWTH = 4  # of a later stage over the first: attention stays affordable
MIN_WINDOW = 8  # keys; under that a local layer sees next to nothing
SAMPLE_SOURCES = ("korean", "english", "code")  # what `megamoe data sample` writes
TOKENS = 560_000  # of all stages: about three minutes on two cores
MIN_SHARE = 0.15  # of a stage: enough steps to see its schedule
MIN_WARMUP = (
    0.1  # of a stage's tokens, where there is a warm-up: a shorter one collapses the router
)
BATCH = 16  # sequences in the largest step of the first stage
MIN_BATCH = 8  # and every batch a multiple of it, for data parallel up to 8
MICRO_TOKENS = 1_024  # of a micro-batch: fills a processor's caches
MIN_MICRO_BATCHES = 2  # of the smallest step: two ranks can share it
MAX_PEAK = 5e-3  # learning rate; AdamW grows unstable above
MAX_INIT_STD = 0.05

# The first pattern that fits a value's path tells the rule by which it changed.
RULES = (
    ("published.*", "nothing is published of a scaled model"),
    ("model.num_layers", "the fewest layers, an even number, with every kind of layer"),
    ("model.hidden_dim", f"{HIDDEN} for every model"),
    ("model.dense_ffn_dim", f"ratio to hidden_dim kept, at most {MAX_DENSE_RATIO}"),
    ("*.vocab_size", f"at most {VOCAB:,}"),
    ("model.attention.num_heads", f"at most {HEADS}"),
    ("model.attention.num_kv_heads", "ratio to num_heads kept, at least 1"),
    ("model.attention.q_lora_rank", "half of hidden_dim"),
    ("model.attention.*", f"fits {HEADS} heads into a hidden_dim of {HIDDEN}"),
    ("model.window", f"in proportion to seq_len, at least {MIN_WINDOW}"),
    ("model.*.yarn.original_seq_len", "in proportion to seq_len"),
    ("model.experts.num_routed", f"at most {EXPERTS}"),
    ("model.experts.top_k", f"at most {TOP_K}"),
    ("model.experts.ffn_dim", f"ratio to hidden_dim kept, at most {MAX_EXPERT_RATIO}"),
    ("model.experts.*group*", "at most 2 groups"),
    ("*.mixture", "the sources of the sample corpus: code as before, Korean and English in halves"),
    ("model.init_std", f"times the root of the width ratio, at most {MAX_INIT_STD}"),
    ("*.seq_len", f"{SEQ_LEN} in the first stage, then in proportion, at most {MAX_SEQ_GROWTH}x"),
    (
        "*.tokens",
        f"{TOKENS:,} shared out by the root of the budgets, at least {MIN_SHARE:.0%} a stage",
    ),
    ("*.lr.*_tokens", f"in proportion to tokens; a warm-up at least {MIN_WARMUP:.0%}"),
    ("*.lr.*", f"inversely with hidden_dim, the peak at most {MAX_PEAK:g}"),
    (
        "*.batch_ramp",
        f"in proportion to tokens; {BATCH} sequences at most in the first stage, in {MIN_BATCH}s",
    ),
    ("*.precision*", "float32, for a processor"),
    ("optimizer.moments_dtype", "float32, for a processor"),
    ("*.layout.micro_batch", f"about {MICRO_TOKENS:,} tokens, {MIN_MICRO_BATCHES} or more a step"),
    ("*.layout.dispatcher", "needs no GPU"),
    ("*.layout.recompute", "nothing: a small model has room for its activations"),
    ("*.layout.pipeline", "even: a written pipeline has the published number of layers"),
    ("*.layout.*", "1: any number of ranks is data parallel"),
)


def scale_tiny(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return a recipe scaled down by rule; changed values have a 'scale rule' for origin."""
    recipe = loaded.recipe
    shares = _shares([stage.tokens for stage in recipe.stages])
    scaled = replace(
        recipe,
        published=Published(
            total_params=None,
            unreleased=(),
            active_params=None,
            tokens=None,
            gpus=None,
            gpu=None,
        ),
        model=_model(recipe.model, _seq_ratio(recipe)),
        tokenizer=replace(recipe.tokenizer, vocab_size=min(VOCAB, recipe.tokenizer.vocab_size)),
        optimizer=replace(recipe.optimizer, moments_dtype="float32"),
        stages=tuple(
            _stage(stage, round(TOKENS * share), recipe)
            for stage, share in zip(recipe.stages, shares, strict=True)
        ),
    )
    origins = _origins(loaded, scaled)
    scaled = replace(scaled, assumed=_still_assumed(recipe.assumed, origins))
    return LoadedRecipe(recipe=scaled, origins=origins, file=loaded.file, scale="tiny")


def _seq_ratio(recipe: Recipe) -> float:
    """Return the tiny length of the first stage over the published one."""
    first = recipe.stages[0].seq_len
    return min(SEQ_LEN, first) / first


def _width_ratio(recipe: Recipe) -> float:
    return max(recipe.model.hidden_dim / HIDDEN, 1.0)


def _model(model: Model, seq_ratio: float) -> Model:
    dense = model.dense_ffn_dim
    ratio = min((dense or 0) / model.hidden_dim, MAX_DENSE_RATIO)
    wider = max(model.hidden_dim / HIDDEN, 1.0)
    return replace(
        model,
        num_layers=_num_layers(model),
        hidden_dim=HIDDEN,
        dense_ffn_dim=None if dense is None else _multiple(HIDDEN * ratio, 32),
        vocab_size=min(VOCAB, model.vocab_size),
        attention=_attention(model.attention),
        window=None if model.window is None else max(round(model.window * seq_ratio), MIN_WINDOW),
        local_rope=_rope(model.local_rope, seq_ratio),
        global_rope=_rope(model.global_rope, seq_ratio),
        experts=_experts(model.experts, model.hidden_dim),
        init_std=_rounded(
            max(min(model.init_std * math.sqrt(wider), MAX_INIT_STD), model.init_std)
        ),
    )


def _num_layers(model: Model) -> int:
    kinds = {letter == "L" for letter in model.window_pattern}
    layers = max(len(model.window_pattern), model.num_dense_layers + 2, 4)
    while {model.is_local(layer) for layer in range(model.num_dense_layers, layers)} != kinds:
        layers += 1
    return layers + layers % 2


def _attention(attention: MLA | GQA) -> MLA | GQA:
    if isinstance(attention, MLA):
        return MLA(
            num_heads=HEADS,
            q_lora_rank=None if attention.q_lora_rank is None else HIDDEN // 2,
            kv_lora_rank=KV_LORA,
            qk_nope_head_dim=NOPE_HEAD,
            qk_rope_head_dim=ROPE_HEAD,
            v_head_dim=V_HEAD,
        )
    shared = HEADS * attention.num_kv_heads // attention.num_heads
    kv_heads = max(n for n in range(1, HEADS + 1) if HEADS % n == 0 and n <= max(shared, 1))
    return replace(attention, num_heads=HEADS, num_kv_heads=kv_heads, head_dim=GQA_HEAD)


def _rope(rope: Rope | None, seq_ratio: float) -> Rope | None:
    if rope is None or rope.yarn is None:
        return rope
    original = max(round(rope.yarn.original_seq_len * seq_ratio), 1)
    return replace(rope, yarn=replace(rope.yarn, original_seq_len=original))


def _experts(experts: Experts, hidden_dim: int) -> Experts:
    num_routed = min(EXPERTS, experts.num_routed)
    num_groups = 2 if experts.num_groups > 1 and num_routed % 2 == 0 else 1
    some_groups = experts.group_top_k < experts.num_groups
    return replace(
        experts,
        num_routed=num_routed,
        top_k=min(TOP_K, experts.top_k),
        ffn_dim=_multiple(HIDDEN * min(experts.ffn_dim / hidden_dim, MAX_EXPERT_RATIO), 16),
        num_groups=num_groups,
        group_top_k=1 if some_groups else num_groups,
    )


def _shares(budgets: list[int]) -> list[float]:
    """Return each stage's share of the tokens: by the root of its budget, at least MIN_SHARE."""
    floor = min(MIN_SHARE, 1 / len(budgets))
    roots = [math.sqrt(budget) for budget in budgets]
    raised: set[int] = set()
    while True:
        rest = 1 - floor * len(raised)
        total = sum(root for i, root in enumerate(roots) if i not in raised)
        shares = [floor if i in raised else rest * root / total for i, root in enumerate(roots)]
        short = {i for i, share in enumerate(shares) if share < floor}
        if not short:
            return shares
        raised |= short


def _stage(stage: Stage, tokens: int, recipe: Recipe) -> Stage:
    first = recipe.stages[0]
    growth = min(stage.seq_len / first.seq_len, MAX_SEQ_GROWTH)
    seq_len = _multiple(min(SEQ_LEN, first.seq_len) * growth, 8)
    largest = max(size for _, size in first.batch_ramp) * first.seq_len
    tokens_ratio = BATCH * min(SEQ_LEN, first.seq_len) / largest  # of the tokens of one step
    ramp = tuple(
        (
            round(start * tokens / stage.tokens),
            _multiple(size * stage.seq_len * tokens_ratio / seq_len, MIN_BATCH),
        )
        for start, size in stage.batch_ramp
    )
    return replace(
        stage,
        tokens=tokens,
        seq_len=seq_len,
        lr=_learning_rate(stage, tokens, recipe),
        batch_ramp=ramp,
        mixture=_mixture(stage.mixture),
        precision=Fp32(),
        layout=_layout(seq_len, math.gcd(*(size for _, size in ramp))),
    )


def _mixture(mixture: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    """Return a mixture of the sample corpus, whose tokenizer a tiny model has too."""
    if {source for source, _ in mixture} <= set(SAMPLE_SOURCES):
        return mixture
    code = dict(mixture).get("code", 0.0) / math.fsum(weight for _, weight in mixture)
    shares = {"korean": (1 - code) / 2, "english": (1 - code) / 2, "code": code}
    return tuple((source, _rounded(share)) for source, share in shares.items() if share > 0)


def _learning_rate(stage: Stage, tokens: int, recipe: Recipe) -> LearningRate:
    highest = max(each.lr.peak for each in recipe.stages)
    factor = max(min(_width_ratio(recipe), MAX_PEAK / highest), 1.0)
    lr = stage.lr
    warmup = round(lr.warmup_tokens * tokens / stage.tokens)
    if lr.warmup_tokens:
        warmup = max(warmup, round(MIN_WARMUP * tokens))
    decays_to_the_end = lr.warmup_tokens + lr.decay_tokens == stage.tokens
    decay = round(lr.decay_tokens * tokens / stage.tokens)
    return replace(
        lr,
        peak=_rounded(lr.peak * factor),
        final=None if lr.final is None else _rounded(lr.final * factor),
        warmup_tokens=warmup,
        decay_tokens=tokens - warmup if decays_to_the_end else min(decay, tokens - warmup),
    )


def _layout(seq_len: int, batch_divisor: int) -> Layout:
    """Return one rank's layout; `batch_divisor` divides every batch of the ramp."""
    micro_batch = 1
    while (
        2 * micro_batch * seq_len <= MICRO_TOKENS
        and batch_divisor % (2 * micro_batch * MIN_MICRO_BATCHES) == 0
    ):
        micro_batch *= 2
    return one_rank(micro_batch)


def _multiple(value: float, of: int) -> int:
    """Return the nearest multiple, at least one."""
    return max(of * round(value / of), of)


def _rounded(value: float) -> float:
    """Return three significant digits: a derived number claims no more."""
    return float(f"{value:.3g}")


def _origins(loaded: LoadedRecipe, scaled: Recipe) -> dict[str, Origin]:
    before = dict(leaves(loaded.recipe))
    origins = {}
    for path, value in leaves(scaled):
        if path in before and before[path] == value and not fnmatch(path, "*.layout.*"):
            origins[path] = loaded.origins[path]
        else:
            rules = [words for pattern, words in RULES if fnmatch(path, pattern)]
            assert rules, path
            origins[path] = Origin(kind="scale rule", text=rules[0])
    return origins


def _still_assumed(assumed: tuple[str, ...], origins: dict[str, Origin]) -> tuple[str, ...]:
    """Return the assumptions that still stand for a value of the scaled recipe."""
    return tuple(
        prefix
        for prefix in assumed
        if any(
            is_covered(path, (prefix,)) and origin.root().kind == "assumed"
            for path, origin in origins.items()
        )
    )
