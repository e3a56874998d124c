"""The recipe that layouts are compared on: smaller than --scale tiny, with all of its structure.

Four layers, so that pp 2 x vpp 2 divides them, with a dense one first and both kinds of window where the
recipe has them; every balancing loss is on; the batch doubles between the two steps.
"""

import random
from dataclasses import replace
from pathlib import Path

from data_prep.shards import ShardWriter
from megamoe.errors import PlanError
from megamoe.parity.layouts import Grid
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cli import local_cluster
from megamoe.plan.plan import Data, Plan, Shard, Source
from megamoe.plan.trainable import check_trainable
from megamoe.recipe.check import FieldError
from megamoe.recipe.load import load_recipe
from megamoe.recipe.model import GQA, MLA, Model
from megamoe.recipe.optim import AdamW
from megamoe.recipe.recipe import Recipe
from megamoe.recipe.scale import scale_tiny
from megamoe.recipe.stage import LearningRate, Router, Stage

NUM_STEPS = 2
MICRO_BATCH = 2
SEQ_LEN = 32  # cp 4 has rows of 8, so that a window may reach over more than one
BATCHES = (8, 16)  # sequences of each step: 4 and 8 micro-batches on one process
LAYERS = 4
HIDDEN = 64
HEAD = 8
VOCAB = 128
EXPERTS = 16  # twice those of --scale tiny,
WORDS = 6  # and so few words in the text, that some experts get no token of a whole batch

# With beta1 0 exp_avg is the gradient: not clipped, or one that is wrong would change all others. Adam
# divides it by its size plus eps: with eps 1 an error of a gradient moves a weight by at most lr times
# that error; with the usual 1e-8 rounding alone can turn a step around, and what the second step
# measures is another model.
ADAM = AdamW(
    beta1=0.0, beta2=0.95, eps=1.0, weight_decay=0.1, grad_clip=1e6, moments_dtype="float32"
)
RATE = LearningRate(peak=0.1, final=None, warmup_tokens=0, decay_tokens=0, decay="linear")


def small_recipe(name: str, *, document_mask: bool = False) -> Recipe:
    """Return a recipe's model and first stage at the smallest scale that keeps their structure.

    Args:
        name: of the recipe, or its file.
        document_mask: whether documents are kept apart, whatever the recipe says.

    Raises:
        RecipeError: there is no such recipe, or it is wrong.
    """
    tiny = scale_tiny(load_recipe(name)).recipe
    stage = _stage(tiny.stages[0], tiny.model)
    return replace(
        tiny,
        model=_model(tiny.model),
        tokenizer=replace(tiny.tokenizer, vocab_size=VOCAB),
        optimizer=ADAM,
        stages=(replace(stage, document_mask=document_mask),),
    )


def plan_of(recipe: Recipe, grid: Grid, seed: int) -> Plan:
    """Return the plan of one layout, without data.

    Raises:
        PlanError: the model does not fit the layout; says what would.
    """
    try:
        stage = replace(recipe.stages[0], layout=grid.layout)
        placed = replace(recipe, stages=(stage,))
        cluster = local_cluster(grid.world_size, "cpu")
        plan = build_plan(placed, cluster, Options(seed=seed, keep_checkpoints=NUM_STEPS))
        check_trainable(plan)
    except (FieldError, PlanError) as error:
        raise PlanError(f"layout {grid.name}: {error}") from error
    return plan


def on_a_gpu(plan: Plan) -> Plan:
    """Return a plan for one GPU, which all its ranks share; all else is as on a processor."""
    return replace(plan, cluster=replace(plan.cluster, device="cuda"))


def with_text(plan: Plan, folder: Path, shards: tuple[Shard, ...]) -> Plan:
    """Return a plan that reads the shards of a folder."""
    weight = 1 / len(shards)
    sources = tuple(Source(name=each.prefix, weight=weight, shard=each) for each in shards)
    return replace(
        plan,
        data=Data(folder=str(folder), eod_id=0, pad_id=1, vocab_size=VOCAB, heldout=()),
        segments=(replace(plan.segments[0], sources=sources),),
    )


def write_text(folder: Path, name: str, seed: int) -> Shard:
    """Write documents of a few words, shorter and longer than a sequence."""
    import numpy as np

    generator = random.Random(seed)
    words = generator.sample(range(2, VOCAB), WORDS)
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder / name, VOCAB)
    for _ in range(60):
        length = generator.randrange(SEQ_LEN // 2, 2 * SEQ_LEN)
        writer.add(np.array([*generator.choices(words, k=length), 0]))
    files = writer.finish()
    return Shard(prefix=name, tokens=files.tokens, sha256_idx=files.sha256_idx)


def _model(model: Model) -> Model:
    kinds = "".join(dict.fromkeys(model.window_pattern))  # 'LLLLLG' becomes 'LG'
    dense = model.dense_ffn_dim
    return replace(
        model,
        num_layers=LAYERS,
        num_dense_layers=min(1, model.num_dense_layers),
        hidden_dim=HIDDEN,
        dense_ffn_dim=None if dense is None else 2 * HIDDEN,
        vocab_size=VOCAB,
        attention=_attention(model.attention),
        window_pattern=kinds,
        window=None if model.window is None else min(model.window, SEQ_LEN // 2),
        experts=replace(model.experts, num_routed=EXPERTS, ffn_dim=HIDDEN // 4),
        # A sum over the hidden dimension is as large as its terms: attention and routing are far from
        # even, and every weight matters.
        init_std=HIDDEN**-0.5,
    )


def _attention(attention: MLA | GQA) -> MLA | GQA:
    if isinstance(attention, GQA):
        # Two, so that tp 2 splits them, as the layouts of the recipes do, and tp 4 shares one.
        return replace(attention, num_kv_heads=2, head_dim=2 * HEAD)
    return replace(
        attention,
        q_lora_rank=None if attention.q_lora_rank is None else HIDDEN // 2,
        kv_lora_rank=HIDDEN // 4,
        qk_nope_head_dim=HEAD,
        qk_rope_head_dim=HEAD,
        v_head_dim=HEAD,
    )


def _stage(stage: Stage, model: Model) -> Stage:
    rope = model.global_rope
    return replace(
        stage,
        tokens=sum(BATCHES) * SEQ_LEN,
        seq_len=SEQ_LEN,
        lr=RATE,
        batch_ramp=((0, BATCHES[0]), (BATCHES[0] * SEQ_LEN, BATCHES[1])),
        fim_rate=0.0,
        # As in a stage of long context, where the model can have one.
        rope_interpolation=1.0 if rope is None or rope.yarn is not None else 2.0,
        router=Router(
            aux_loss=1e-2,
            sequence_aux_loss=1e-2,
            global_aux_loss=1e-2,
            z_loss=1e-3,
            bias_update_rate=1e-2 if model.experts.expert_bias else 0.0,
        ),
    )
