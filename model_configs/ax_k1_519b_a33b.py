"""A.X-K1-519B-A33B (SK Telecom, 2026): MLA, dual norm, 192 experts in groups with a bias, MTP, YaRN.

Sources, as named on each line:
    report  A.X K1 Technical Report, arXiv 2601.09200; its formulas and their values did not survive in the text
            at hand: peak learning rate, betas, coefficient of the aux loss, update rate of the bias
    card    README of SKT-AI/A.X-K1
    weights tensor names of the released weights, and their parameter count
    code    class defaults of transformers' axk1 and vLLM's AXK1
    config  config.json, as read by serithemage/korea-ai-foundation-model-verification, which slips on two other values

A stage has one layout, and a plan one number of GPUs: that training went from 1,024 to 1,536 within the general
stage (report 3.4) is in its batch ramp alone.
"""

from dataclasses import replace

from megamoe.recipe import (
    MLA,
    AdamW,
    DualNorm,
    Experts,
    Fp8Delayed,
    Layout,
    LearningRate,
    Model,
    Mtp,
    Published,
    Recipe,
    Rope,
    Router,
    Stage,
    Tokenizer,
    Yarn,
)

WARMUP = 72_000_000 * 4_096  # report 3.3: 72 million samples

GENERAL = Stage(
    name="general",
    tokens=7_000_000_000_000,  # report 3.2
    seq_len=4_096,  # report 3.2
    lr=LearningRate(
        peak=2e-4,  # not published: value lost (report 3.3); near the 2.2e-4 of DeepSeek-V3
        final=None,  # report 3.2: constant
        warmup_tokens=WARMUP,  # report 3.3: the warm-up spans 72 million samples
        decay_tokens=0,  # report 3.2: constant
        decay="linear",  # not published: nothing decays here
    ),
    # The ramp is that of 1,024 GPUs, the last entry that of 1,536, and the report does not tell after how many tokens
    # one became the other. 1,024 GPUs can share out all of it and have a plan. 1,536 have none: dp 96 does not divide
    # 2,048; with --set 'general.batch_ramp=((0, 18_432),)' they have one.
    batch_ramp=(  # not published: when 18,432 begins, "after several days" (report 3.4): here four, at the 302 TFLOP/s of its table 2; the ramp is report 3.3
        (0, 2_048),
        (1 * WARMUP // 14, 3_072),
        (2 * WARMUP // 14, 4_096),
        (3 * WARMUP // 14, 5_120),
        (4 * WARMUP // 14, 6_144),
        (5 * WARMUP // 14, 7_168),
        (6 * WARMUP // 14, 8_192),
        (7 * WARMUP // 14, 9_216),
        (8 * WARMUP // 14, 10_240),
        (9 * WARMUP // 14, 11_264),
        (10 * WARMUP // 14, 12_288),
        (11 * WARMUP // 14, 13_312),
        (12 * WARMUP // 14, 14_336),
        (13 * WARMUP // 14, 15_360),
        (14 * WARMUP // 14, 16_384),
        (500_000_000_000, 18_432),
    ),
    mixture=(  # report table B.1: per cent, which add up to 100.01
        ("web", 53.41),
        ("code", 17.13),
        ("encyclopedia", 14.84),
        ("qa", 13.04),
        ("books", 0.77),
        ("academic", 0.66),
        ("others", 0.16),
    ),
    fim_rate=0.0,  # not published: none is mentioned
    document_mask=False,  # not published: what Megatron-LM does by default
    router=Router(
        aux_loss=0.0,  # not published: which loss; per sequence, as in DeepSeek-V3
        sequence_aux_loss=1e-4,  # not published: value lost, "a weak signal" (report 3.3); of DeepSeek-V3
        global_aux_loss=0.0,  # not published: which loss; per sequence, as in DeepSeek-V3
        z_loss=0.0,  # not published: none is mentioned
        bias_update_rate=1e-3,  # not published: value lost (report 3.3); of DeepSeek-V3
    ),
    mtp_loss=0.3,  # report 3.3
    rope_interpolation=1.0,  # not published: from which stage on there is YaRN (config), which scales positions; here in all, so that the weights are those of the released configuration
    precision=Fp8Delayed(  # not published: that the scale of each tensor (report 3.5) is delayed; Megatron-core's FP8 by default
        gradient_format="e5m2",  # report 3.5
        amax_history=1_024,  # not published: what Transformer Engine has by default
        bf16_first_layers=0,  # report 3.5: all eligible tensors
        bf16_last_layers=0,  # report 3.5: all eligible tensors
    ),
    layout=Layout(
        tp=1,  # report 3.4
        pp=16,  # report 3.4
        vpp=1,  # not published: 61 layers leave no even interleaving
        pipeline="even",  # not published: 15 ranks of 4 layers leave 1 for the last, beside the output layer
        cp=1,  # report 3.4: only for long context
        cp_scheme="auto",  # not published: by cost
        ep=8,  # report 3.4
        etp=1,  # report 3.4: no tensor parallelism
        dispatcher="deepep",  # report 3.4
        micro_batch=1,  # not published: one sequence needs the least memory
        recompute=(  # report 3.5: in all configurations; whether "MLP layers" are those of experts too, it does not say
            "mla_up_projection",
            "mlp",
        ),
    ),
)

REASONING = replace(
    GENERAL,
    name="reasoning",
    tokens=1_660_000_000_000,  # report 3.2
    seq_len=4_096,  # report 3.2: 4K until the long-context stage
    lr=LearningRate(
        peak=2e-4,  # not published: goes on from the general stage
        final=5e-5,  # not published: a quarter of the peak, so that 16K can decay further (report 3.2)
        warmup_tokens=0,  # report 3.2: goes on from the general stage
        decay_tokens=1_660_000_000_000,  # not published: over the whole stage, which begins with it (report 3.2)
        decay="linear",  # not published: the plainest decay of WSD (report 3.2)
    ),
    batch_ramp=((0, 18_432),),  # report 3.3: 75M tokens
    mixture=(  # report table B.1: per cent, which add up to 99.99
        ("web", 39.79),
        ("code", 29.42),
        ("encyclopedia", 0.64),
        ("qa", 8.95),
        ("books", 4.35),
        ("academic", 7.23),
        ("mathematics", 5.41),
        ("stem", 2.47),
        ("reasoning", 0.82),
        ("others", 0.91),
    ),
    mtp_loss=0.1,  # report 3.3: from stage 2
)

CONTEXT_16K = replace(
    REASONING,
    name="context_16k",
    tokens=300_000_000_000,  # not published: half of the 600B of both lengths (report 3.2)
    seq_len=16_384,  # report 3.2
    lr=LearningRate(
        peak=5e-5,  # not published: goes on from the reasoning stage
        final=2e-5,  # not published: a tenth of the first peak
        warmup_tokens=0,  # not published: goes on from the reasoning stage
        decay_tokens=300_000_000_000,  # report 3.2: decays during the 16K extension
        decay="linear",  # not published: the plainest decay of WSD (report 3.2)
    ),
    batch_ramp=((0, 4_608),),  # not published: stays at 75M tokens (report 3.3)
    mixture=(  # report table B.1: per cent, which add up to 99.99
        ("web", 33.32),
        ("code", 25.50),
        ("encyclopedia", 0.72),
        ("qa", 5.38),
        ("books", 3.70),
        ("academic", 3.87),
        ("mathematics", 9.24),
        ("stem", 9.07),
        ("reasoning", 8.32),
        ("others", 0.87),
    ),
    router=replace(
        GENERAL.router,
        bias_update_rate=0.0,  # report 3.3: reduced to zero in stage 3
    ),
    layout=replace(
        GENERAL.layout,
        cp=4,  # report 3.4
    ),
)

CONTEXT_32K = replace(
    CONTEXT_16K,
    name="context_32k",
    tokens=300_000_000_000,  # not published: half of the 600B of both lengths (report 3.2)
    seq_len=32_768,  # report 3.2
    lr=LearningRate(
        peak=2e-5,  # not published: goes on from 16K
        final=None,  # report 3.2: constant
        warmup_tokens=0,  # not published: goes on from 16K
        decay_tokens=0,  # report 3.2: constant
        decay="linear",  # not published: nothing decays here
    ),
    batch_ramp=((0, 2_304),),  # not published: stays at 75M tokens (report 3.3)
    layout=replace(
        GENERAL.layout,
        cp=8,  # report 3.4
    ),
)

RECIPE = Recipe(
    name="ax_k1_519b_a33b",
    source="A.X K1 Technical Report (SK Telecom, arXiv 2601.09200), card, weights and code",
    assumed=(
        "general.lr.peak",
        "general.lr.decay",
        "general.batch_ramp",
        "general.fim_rate",
        "general.document_mask",
        "general.router.aux_loss",
        "general.router.sequence_aux_loss",
        "general.router.global_aux_loss",
        "general.router.z_loss",
        "general.router.bias_update_rate",
        "general.rope_interpolation",
        "general.precision",
        "general.layout.vpp",
        "general.layout.pipeline",
        "general.layout.cp_scheme",
        "general.layout.micro_batch",
        "reasoning.lr.peak",
        "reasoning.lr.final",
        "reasoning.lr.decay_tokens",
        "reasoning.lr.decay",
        "context_16k.tokens",
        "context_16k.lr.peak",
        "context_16k.lr.final",
        "context_16k.lr.warmup_tokens",
        "context_16k.lr.decay",
        "context_16k.batch_ramp",
        "context_32k.tokens",
        "context_32k.lr.peak",
        "context_32k.lr.warmup_tokens",
        "context_32k.lr.decay",
        "context_32k.batch_ramp",
        "model.mtp.ffn",
        "optimizer.beta1",
        "optimizer.beta2",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.grad_clip",
    ),
    published=Published(
        total_params=518_983_059_456,  # weights; report: 519B
        unreleased=("mtp", "expert_bias"),  # weights: both were trained (report 3.3)
        active_params=33e9,  # report table 1
        tokens=9.26e12,  # report 3.2: 7T, 1.66T and 600B; elsewhere it says about 10T
        gpus=1_536,  # report 3.4: after some days on 1,024
        gpu="H200",  # report 3.4
    ),
    model=Model(
        num_layers=61,  # report table 1
        num_dense_layers=1,  # card
        hidden_dim=7_168,  # code, card
        dense_ffn_dim=18_432,  # code
        vocab_size=163_840,  # report 2.3
        attention=MLA(  # report 2.2
            num_heads=64,  # report table 1
            q_lora_rank=1_536,  # code
            kv_lora_rank=512,  # code
            qk_nope_head_dim=128,  # code
            qk_rope_head_dim=64,  # code
            v_head_dim=128,  # code
        ),
        window_pattern="G",  # report 2.2: windows were tried and dropped
        window=None,  # report 2.2
        local_rope=None,  # report 2.2: no local layers
        global_rope=Rope(
            base=10_000.0,  # config
            interleaved=True,  # code
            yarn=Yarn(  # config; from the first stage on: general.rope_interpolation
                factor=4.0,  # config
                original_seq_len=32_768,  # config
                beta_fast=32.0,  # config
                beta_slow=1.0,  # config
                mscale=1.0,  # config
                mscale_all_dim=0.0,  # config: the softmax is not scaled; DeepSeek-V3 has 1.0
            ),
        ),
        norm=DualNorm(  # report 2.2
            eps=1e-6,  # code
            zero_centered=False,  # code
            after_dense_mlp=True,  # report 2.2: of MLP and MoE layers, and weights: a norm in all 61; the code norms MoE layers only
        ),
        experts=Experts(
            num_routed=192,  # report table 1
            num_shared=1,  # report table 1
            top_k=8,  # report table 1
            ffn_dim=2_048,  # card; the 2,560 of config would be 646.5B parameters
            score="sigmoid",  # code; config says softmax, which has no bias, and the report has one (3.3)
            scaling_factor=2.5,  # report 3.3
            expert_bias=True,  # report 3.3
            num_groups=8,  # code
            group_top_k=4,  # code
        ),
        mtp=Mtp(
            num_layers=1,  # card: one token further
            ffn="moe",  # not published: as its last layer, which is what DeepSeek-V3 and Megatron-core do
        ),
        tied_embeddings=False,  # weights
        init_std=0.02,  # code
    ),
    tokenizer=Tokenizer(
        algorithm="byte-level-bpe",  # report 2.3
        vocab_size=163_840,  # report 2.3
    ),
    optimizer=AdamW(  # report 3.3
        beta1=0.9,  # not published: value lost (report 3.3); of DeepSeek-V3
        beta2=0.95,  # not published: value lost (report 3.3); of DeepSeek-V3
        eps=1e-8,  # not published: torch's default
        weight_decay=0.1,  # not published: of DeepSeek-V3
        grad_clip=1.0,  # not published: of DeepSeek-V3
        moments_dtype="bfloat16",  # report 3.5; parameters and gradients in float32
    ),
    stages=(GENERAL, REASONING, CONTEXT_16K, CONTEXT_32K),
)
