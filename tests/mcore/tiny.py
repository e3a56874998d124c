"""Small plans and text for tests that run the real engine."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy

from megamoe.plan.cluster import Cluster
from megamoe.plan.plan import Data, Plan, Segment, Shard, Source
from megamoe.recipe import (
    GQA,
    MLA,
    AdamW,
    DualNorm,
    Experts,
    Fp32,
    LearningRate,
    Model,
    Mtp,
    PeriNorm,
    PreNorm,
    Rope,
    Router,
    Yarn,
)
from megamoe.recipe.layout import one_rank

VOCAB = 96

LATENT = Model(
    num_layers=4,
    num_dense_layers=1,
    hidden_dim=32,
    dense_ffn_dim=48,
    vocab_size=VOCAB,
    attention=MLA(
        num_heads=2,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    window_pattern="LLLG",
    window=5,
    local_rope=Rope(base=10_000.0, interleaved=True),
    global_rope=Rope(base=1_000_000.0, interleaved=True),
    norm=PeriNorm(eps=1e-5, zero_centered=True),
    experts=Experts(
        num_routed=8,
        num_shared=1,
        top_k=2,
        ffn_dim=16,
        score="sigmoid",
        scaling_factor=1.0,
        expert_bias=False,
        num_groups=1,
        group_top_k=1,
    ),
    mtp=None,
    tied_embeddings=False,
    init_std=0.05,
)
GROUPED = replace(
    LATENT,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
    local_rope=Rope(base=1_000_000.0, interleaved=False),
    global_rope=None,
    norm=PreNorm(eps=1e-5, zero_centered=False),
    experts=replace(LATENT.experts, scaling_factor=2.5, expert_bias=True),
    mtp=Mtp(num_layers=1, ffn="dense"),
)
SOFTMAX = replace(
    LATENT,
    num_dense_layers=0,
    dense_ffn_dim=None,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=False),
    window_pattern="LG",
    local_rope=Rope(base=500_000.0, interleaved=False),
    global_rope=Rope(base=500_000.0, interleaved=False),
    norm=PreNorm(eps=1e-5, zero_centered=False),
    experts=replace(LATENT.experts, num_shared=0, score="softmax"),
    tied_embeddings=True,
)

# Of 8 pairs, 0 to 2 stay, 3 to 6 are blended and 7 is divided by the factor.
YARN = Yarn(
    factor=4.0,
    original_seq_len=256,
    beta_fast=8.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.0,
)
STRETCHED = Rope(base=100.0, interleaved=True, yarn=YARN)
GROUPS = replace(LATENT.experts, num_routed=16, num_groups=8, group_top_k=4, top_k=8)
# A.X K1: everything global, with YaRN; dual norm; groups of experts with a bias; prediction with experts.
DUAL = replace(
    LATENT,
    attention=replace(LATENT.attention, q_lora_rank=20, qk_rope_head_dim=16),
    window_pattern="G",
    window=None,
    local_rope=None,
    global_rope=STRETCHED,
    norm=DualNorm(eps=1e-6, zero_centered=False, after_dense_mlp=True),
    experts=replace(GROUPS, scaling_factor=2.5, expert_bias=True),
    mtp=Mtp(num_layers=1, ffn="moe"),
)

LAYOUT = one_rank(2)
ROUTER = Router(
    aux_loss=1e-2,
    sequence_aux_loss=1e-2,
    global_aux_loss=1e-2,
    z_loss=1e-3,
    bias_update_rate=0.0,
)


def write_text(folder: Path, name: str, *, seed: int, documents: int = 40) -> Shard:
    """Write a shard of learnable text: each token is likely its predecessor plus a step."""
    from data_prep.shards import ShardWriter

    generator = numpy.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    writer = ShardWriter(folder / name, VOCAB)
    for _ in range(documents):
        length = int(generator.integers(20, 90))
        steps = generator.choice([1, 1, 1, 1, 2, 7], size=length)
        tokens = numpy.append(2 + (numpy.cumsum(steps) + seed) % (VOCAB - 2), 0)
        writer.add(tokens)
        total += len(tokens)
    writer.finish()
    index = (folder / f"{name}.idx").read_bytes()
    return Shard(prefix=name, tokens=total, sha256_idx=hashlib.sha256(index).hexdigest())


def tiny_segment(shards: tuple[Shard, ...], **changes: object) -> Segment:
    """Return a segment of four steps of 8 sequences of 16 tokens on one process."""
    sources = tuple(
        Source(name=shard.prefix, weight=1 / len(shards), shard=shard) for shard in shards
    )
    segment = Segment(
        index=0,
        stage="general",
        tokens_start=0,
        tokens=512,
        num_steps=4,
        steps_start=0,
        seq_len=16,
        world_size=1,
        dp=1,
        layout=LAYOUT,
        precision=Fp32(),
        lr=LearningRate(peak=1e-2, final=None, warmup_tokens=0, decay_tokens=0, decay="linear"),
        batch_ramp=((0, 8),),
        sources=sources,
        router=ROUTER,
        document_mask=False,
        mtp_loss=None,
        rope_interpolation=1.0,
        checkpoint_every=2,
        eval_every=2,
    )
    return replace(segment, **changes)


def tiny_plan(folder: Path, model: Model = LATENT, **changes: object) -> Plan:
    """Return a plan of one segment over two sources of text, which it writes to `folder`."""
    shards = (write_text(folder, "one", seed=1), write_text(folder, "two", seed=2))
    heldout = write_text(folder, "one.heldout", seed=3, documents=5)
    if model.mtp is not None:
        changes = {"mtp_loss": 0.3, **changes}
    if model.experts.expert_bias:
        changes = {"router": replace(ROUTER, bias_update_rate=1e-2), **changes}
    segment = tiny_segment(shards, **changes)
    return Plan(
        format=1,
        megamoe="test",
        recipe="tiny",
        source="tests",
        scale=None,
        assumed=(),
        seed=1234,
        deterministic=True,
        model=model,
        optimizer=AdamW(
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            grad_clip=1.0,
            moments_dtype="float32",
        ),
        cluster=Cluster(
            name="test",
            num_nodes=1,
            devices_per_node=segment.world_size,
            device="cpu",
            device_name="cpu",
            peak_flops_per_s=None,
            memory_bytes=None,
            network_bytes_per_s=None,
        ),
        data=Data(
            folder=str(folder), eod_id=0, pad_id=1, vocab_size=VOCAB, heldout=(("one", heldout),)
        ),
        segments=(segment,),
        eval_tokens=200,
        keep_checkpoints=2,
    )
