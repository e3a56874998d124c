"""Keural-MoE-14B (MKD Corp, 2026): GQA, every second layer local, 8 large experts, tied embeddings.

Sources, as named on each line:
    card      model card of Keural-MoE-14B
    script    training script of MKD-CORP/Keural-Model-Training, train_keural_v2.py
    readme    README of the same repository, as of commit 040fc19
    tokenizer repository MKD-CORP/keural-tokenizer-model
"""

from dataclasses import replace

from megamoe.recipe import (
    GQA,
    AdamW,
    Bf16,
    Experts,
    Layout,
    LearningRate,
    Model,
    PreNorm,
    Published,
    Recipe,
    Rope,
    Router,
    Stage,
    Tokenizer,
)

STAGE_1 = Stage(
    name="stage_1",
    tokens=50_000_000_000,  # card: about 50B
    seq_len=4_096,  # card; the script's sequences give 4,095 inputs, and label 0, its padding, no loss
    lr=LearningRate(
        peak=3e-4,  # script
        final=3e-5,  # script
        warmup_tokens=2_000 * 128 * 4_096,  # script: 2,000 steps
        decay_tokens=50_000_000_000 - 2_000 * 128 * 4_096,  # script: all that follows the warm-up
        decay="cosine",  # script
    ),
    batch_ramp=(  # not published: 50B tokens in 100,000 steps (card) are 122 sequences, the next power of two; the script's default is 64
        (0, 128),
    ),
    mixture=(  # readme: what it collects, in billions of tokens; the card has Korean and English only, in both stages
        ("korean", 13.0),
        ("english", 28.0),
        ("code", 8.0),
    ),
    fim_rate=0.0,  # script: none
    document_mask=False,  # not published: what Megatron-LM does by default
    router=Router(
        aux_loss=0.02 / 24,  # script: 0.02, on the mean over 24 layers
        sequence_aux_loss=0.0,  # script: none
        global_aux_loss=0.0,  # script: none
        z_loss=0.001 / 24,  # script: 0.001, on the mean over 24 layers
        bias_update_rate=0.0,  # script: none
    ),
    mtp_loss=None,  # script: no MTP
    rope_interpolation=1.0,  # script: none
    precision=Bf16(),  # card
    layout=Layout(  # not published: the authors shard with FSDP over 2 GPUs (card), which is not among the axes; ep 2 shards the experts, nine tenths of the parameters
        tp=1,
        pp=1,
        vpp=1,
        pipeline="even",
        cp=1,
        cp_scheme="auto",
        ep=2,
        etp=1,
        dispatcher="all_to_all",  # not published: needs no library
        micro_batch=1,  # not published: for these batches; the readme has 4 for a batch of 64
        recompute=(  # not published: of what (card: gradient checkpointing); whole layers, as is usual with FSDP
            "layer",
        ),
    ),
)

STAGE_2 = replace(
    STAGE_1,
    name="stage_2",
    tokens=19_000_000_000,  # card: about 19B
    lr=LearningRate(
        peak=3e-5,  # not published: goes on from stage 1
        final=None,  # not published: constant, as stage 1 ends decayed
        warmup_tokens=0,  # not published: goes on from stage 1
        decay_tokens=0,  # not published: constant, as stage 1 ends decayed
        decay="cosine",  # not published: as in stage 1
    ),
    batch_ramp=(  # not published: 19B tokens in 120,000 steps (card) are 39 sequences, the next multiple of 8
        (0, 40),
    ),
)

RECIPE = Recipe(
    name="keural_14b",
    source="model card of Keural-MoE-14B and MKD-CORP/Keural-Model-Training (MKD Corp, 2026)",
    assumed=(
        "stage_1.batch_ramp",
        "stage_1.document_mask",
        "stage_1.layout",
        "stage_2.lr",
        "stage_2.batch_ramp",
        "optimizer.eps",
    ),
    published=Published(
        total_params=14_832_046_080,  # script: of its ModelConfig; card: 14.83B
        unreleased=(),  # script: nothing is missing
        active_params=7.42e9,  # card; the architecture has 4.87e9
        tokens=69e9,  # card
        gpus=2,  # card
        gpu="H200",  # card
    ),
    model=Model(
        num_layers=24,  # card
        num_dense_layers=0,  # script
        hidden_dim=4_096,  # card
        dense_ffn_dim=None,  # script: no dense layer
        vocab_size=131_072,  # card: before the two chat tokens of fine-tuning
        attention=GQA(  # card
            num_heads=32,  # card
            num_kv_heads=8,  # card
            head_dim=128,  # card
            qk_norm=False,  # script
        ),
        window_pattern="LG",  # card: even layers are local
        window=513,  # script: masks distances above 512, so 513 keys with the token itself
        local_rope=Rope(
            base=500_000.0,  # card
            interleaved=False,  # script
            yarn=None,  # script
        ),
        global_rope=Rope(
            base=500_000.0,  # card
            interleaved=False,  # script
            yarn=None,  # script
        ),
        norm=PreNorm(  # script
            eps=1e-5,  # card
            zero_centered=False,  # script
        ),
        experts=Experts(
            num_routed=8,  # card
            num_shared=0,  # script
            top_k=2,  # card
            ffn_dim=5_632,  # card
            score="softmax",  # script
            scaling_factor=1.0,  # script: none
            expert_bias=False,  # script
            num_groups=1,  # script: no groups
            group_top_k=1,  # script: no groups
        ),
        mtp=None,  # script
        tied_embeddings=True,  # script
        init_std=0.02,  # script
    ),
    tokenizer=Tokenizer(
        algorithm="sentencepiece-unigram",  # tokenizer
        vocab_size=131_072,  # card
    ),
    optimizer=AdamW(  # script
        beta1=0.9,  # script
        beta2=0.95,  # script
        eps=1e-8,  # not published: of pretraining; fine-tuning has 1e-8
        weight_decay=0.1,  # script
        grad_clip=1.0,  # script
        moments_dtype="float32",  # readme
    ),
    stages=(STAGE_1, STAGE_2),
)
