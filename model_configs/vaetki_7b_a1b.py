"""VAETKI-7B-A1B (NC-AI Consortium, 2026): MLA with 5 local layers to 1 global, Peri-LN, 64 experts.

Sources, as named on each line:
    report  VAETKI Technical Report, January 2026; its curriculum is told for the 100B model
    card    model card of VAETKI-7B-A1B
    config  config.json of the released weights
    weights tensor names and shapes of the released weights
    script  Megatron training script of the VAETKI family
    plugin  vllm_plugin of wbl-ncai/VAETKI, the authors' inference code
"""

from dataclasses import replace

from megamoe.recipe import (
    MLA,
    AdamW,
    Experts,
    Fp8Block,
    Fp8Delayed,
    Layout,
    LearningRate,
    Model,
    PeriNorm,
    Published,
    Recipe,
    Rope,
    Router,
    Stage,
    Tokenizer,
)

GENERAL = Stage(
    name="general",
    tokens=1_300_000_000_000,  # not published: 1.86T (report table 6) shared out as 3.6T : 1.5T : 20B (report 3.2)
    seq_len=4_096,  # report 3.2
    lr=LearningRate(
        peak=2e-4,  # report 3.2, card
        final=None,  # report 3.2: constant
        warmup_tokens=500 * 1_984 * 4_096,  # script: 500 steps
        decay_tokens=0,  # report 3.2: constant
        decay="linear",  # report 3.2: of the reasoning stage
    ),
    batch_ramp=(  # not published: where it steps, and that it doubles twice; 8.1M to 32.4M tokens (card), in 64s of sequences
        (0, 1_984),
        (100_000_000_000, 3_968),
        (300_000_000_000, 7_936),
    ),
    mixture=(  # not published: but about 20 % Korean (report 6), most of it English (report 2.2); code the rest, as the sample corpus has three sources
        ("korean", 0.2),
        ("english", 0.65),
        ("code", 0.15),
    ),
    fim_rate=0.0,  # report 3.2: begins in the reasoning stage
    document_mask=False,  # not published: what Megatron-LM does by default
    router=Router(
        aux_loss=1e-4,  # report 2.1
        sequence_aux_loss=0.0,  # report 2.1: two losses, neither per sequence
        global_aux_loss=1e-4,  # report 2.1
        z_loss=0.0,  # not published: none is mentioned
        bias_update_rate=0.0,  # weights: no expert bias
    ),
    mtp_loss=None,  # weights: no MTP
    rope_interpolation=1.0,  # report 3.2: only in the long-context stage; the plugin divides by 8 always, as released
    precision=Fp8Delayed(  # report 2.1: delayed scaling in the first stage
        gradient_format="e4m3",  # report 2.1: FP8 (E4M3)
        amax_history=1_024,  # script
        bf16_first_layers=1,  # script
        bf16_last_layers=1,  # script
    ),
    layout=Layout(  # not published: sizes of PP and EP (report 2.3); 4 divides the layers, 8 is a node, and 256 GPUs share out every batch
        tp=1,  # report 2.3: PP, EP and DP
        pp=4,
        vpp=1,  # not published: interleaving is told of fine-tuning only (report 4.2)
        pipeline="even",  # not published: the layers divide evenly
        cp=1,  # report 6.1: no context parallelism
        cp_scheme="auto",  # not published: without effect where cp is 1
        ep=8,
        etp=1,  # not published: TP is told of long context only (report 2.3)
        dispatcher="all_to_all",  # script
        micro_batch=1,  # script
        recompute=(),  # script: none
    ),
)

REASONING = replace(
    GENERAL,
    name="reasoning",
    tokens=550_000_000_000,  # not published: 1.86T (report table 6) shared out as 3.6T : 1.5T : 20B (report 3.2)
    lr=LearningRate(
        peak=2e-4,  # report 3.2: goes on from the general stage
        final=1e-4,  # report 3.2
        warmup_tokens=0,  # report 3.2: goes on from the general stage
        decay_tokens=550_000_000_000,  # report 3.2: over the whole stage
        decay="linear",  # report 3.2
    ),
    batch_ramp=((0, 7_936),),  # not published: stays at the 32.4M tokens of the card
    mixture=(  # not published: but more code, STEM and reasoning (report 3.2); in the place of English
        ("korean", 0.2),
        ("english", 0.45),
        ("code", 0.35),
    ),
    fim_rate=0.6,  # report 3.2
    precision=Fp8Block(  # report 2.1: blockwise scaling in the later stages
        bf16_first_layers=1,  # script
        bf16_last_layers=1,  # script
    ),
)

LONG_CONTEXT = replace(
    REASONING,
    name="long_context",
    tokens=10_000_000_000,  # not published: 1.86T (report table 6) shared out as 3.6T : 1.5T : 20B (report 3.2)
    seq_len=16_384,  # report table 1, card
    lr=LearningRate(
        peak=1e-4,  # not published: goes on from the reasoning stage
        final=1e-5,  # card: 2e-4 to 1e-5
        warmup_tokens=0,  # not published: goes on from the reasoning stage
        decay_tokens=10_000_000_000,  # not published: over the whole stage
        decay="linear",  # not published: as in the reasoning stage
    ),
    batch_ramp=((0, 1_984),),  # not published: stays at the 32.4M tokens of the card
    mixture=(  # not published: earlier data and long documents (report 3.2); between the stages before
        ("korean", 0.2),
        ("english", 0.55),
        ("code", 0.25),
    ),
    fim_rate=0.0,  # not published: told of the reasoning stage only
    rope_interpolation=8.0,  # report 3.2
    layout=replace(
        GENERAL.layout,
        tp=2,  # not published: the size of TP, which is added for long context (report 2.3); a rank has 8,192 tokens
    ),
)

RECIPE = Recipe(
    name="vaetki_7b_a1b",
    source="VAETKI Technical Report (NC-AI Consortium, January 2026), model card and weights",
    assumed=(
        "general.tokens",
        "general.batch_ramp",
        "general.mixture",
        "general.document_mask",
        "general.router.z_loss",
        "general.layout",
        "reasoning.tokens",
        "reasoning.batch_ramp",
        "reasoning.mixture",
        "long_context.tokens",
        "long_context.lr.peak",
        "long_context.lr.warmup_tokens",
        "long_context.lr.decay_tokens",
        "long_context.lr.decay",
        "long_context.batch_ramp",
        "long_context.mixture",
        "long_context.fim_rate",
        "long_context.layout.tp",
        "optimizer",
    ),
    published=Published(
        total_params=7_250_296_320,  # weights
        unreleased=(),  # weights: nothing is missing
        active_params=1.2e9,  # card
        tokens=1.86e12,  # report table 6
        gpus=256,  # card
        gpu="H100",  # card
    ),
    model=Model(
        num_layers=24,  # report table 1
        num_dense_layers=1,  # report table 1
        hidden_dim=1_536,  # config
        dense_ffn_dim=5_760,  # config
        vocab_size=137_216,  # config
        attention=MLA(  # report 2.1
            num_heads=12,  # report table 1
            q_lora_rank=768,  # config
            kv_lora_rank=512,  # config
            qk_nope_head_dim=128,  # config
            qk_rope_head_dim=64,  # config
            v_head_dim=128,  # config
        ),
        window_pattern="LLLLLG",  # report 2.1: 5 local to 1 global
        window=512,  # config, plugin: keys, the token's own included; if training masked distances above 512, it had 513
        local_rope=Rope(
            base=10_000.0,  # report 2.1
            interleaved=True,  # config
            yarn=None,  # config: rope_scaling null
        ),
        global_rope=Rope(
            base=1_000_000.0,  # report 2.1
            interleaved=True,  # config
            yarn=None,  # config: rope_scaling null
        ),
        norm=PeriNorm(  # report 2.1
            eps=1e-5,  # config; the script of VAETKI-VL-7B has 1e-6
            zero_centered=True,  # report 2.1
        ),
        experts=Experts(
            num_routed=64,  # report table 1
            num_shared=1,  # config
            top_k=5,  # report table 1
            ffn_dim=960,  # config
            score="sigmoid",  # report 2.1
            scaling_factor=1.0,  # config: of all three that were seen; the script of VAETKI-VL-7B has 2.5
            expert_bias=False,  # weights
            num_groups=1,  # report 2.1: no groups
            group_top_k=1,  # report 2.1: no groups
        ),
        mtp=None,  # weights: no MTP
        tied_embeddings=False,  # config
        init_std=0.0134,  # config
    ),
    tokenizer=Tokenizer(
        algorithm="sentencepiece-bpe",  # report 2.2
        vocab_size=135_168,  # report 2.2
    ),
    optimizer=AdamW(  # not published: usual values of models of this kind
        beta1=0.9,
        beta2=0.95,  # not published: usual of models of this kind; the 100B's script sets none, and Megatron-LM then has 0.999
        eps=1e-8,
        weight_decay=0.1,  # script
        grad_clip=1.0,  # script
        moments_dtype="float32",  # script: as Megatron-LM has it where nothing is said
    ),
    stages=(GENERAL, REASONING, LONG_CONTEXT),
)
