"""VAETKI-100B-A10B (NC-AI Consortium, 2026): MLA with 5 local layers to 1 global, Peri-LN, 128 experts.

Sources, as named on each line:
    report  VAETKI Technical Report, January 2026
    weights parameter count and tensor names of the released weights
    plugin  vllm_plugin of wbl-ncai/VAETKI, the authors' inference code
    script  Megatron training script of VAETKI-100B, August 2025
    card    model card of VAETKI-100B-A10B

The model card tells of 9.8T tokens of pretraining; the recipe follows the report, whose stages add up to 5.12T.
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
    tokens=3_600_000_000_000,  # report 3.2
    seq_len=4_096,  # report 3.2
    lr=LearningRate(
        peak=2e-4,  # report 3.2
        final=None,  # report 3.2: constant
        warmup_tokens=500 * 1_984 * 4_096,  # script: 500 steps
        decay_tokens=0,  # report 3.2: constant
        decay="linear",  # report 3.2: of the reasoning stage
    ),
    batch_ramp=(  # not published: where it steps; 8M, 16M, 32M tokens (report 3.2), in sequences that 992 GPUs share out
        (0, 1_984),
        (250_000_000_000, 3_968),
        (800_000_000_000, 7_936),
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
    # 1,016 GPUs are 8 x 127: there PP x EP is at most 8, and a GPU would hold an eighth of the model, 14B parameters,
    # which do not fit in 80 GB with their gradients. 992 of them, 124 of 127 nodes, have a plan.
    layout=Layout(  # not published: sizes of PP and EP (report 2.3); 32 ranks hold the model, and 992 GPUs share out every batch. The script's TP 4, PP 6, EP 2 is a test's
        tp=1,  # report 2.3: PP, EP and DP
        pp=8,
        vpp=1,  # not published: interleaving is told of fine-tuning only (report 4.2)
        pipeline="even",  # not published: the layers divide evenly
        cp=1,  # report 6.1: no context parallelism
        cp_scheme="auto",  # not published: without effect where cp is 1
        ep=4,
        etp=1,  # not published: TP is told of long context only (report 2.3)
        dispatcher="all_to_all",  # script
        micro_batch=1,  # script
        recompute=(),  # script: none
    ),
)

REASONING = replace(
    GENERAL,
    name="reasoning",
    tokens=1_500_000_000_000,  # report 3.2
    lr=LearningRate(
        peak=2e-4,  # report 3.2: goes on from the general stage
        final=1e-4,  # report 3.2
        warmup_tokens=0,  # report 3.2: goes on from the general stage
        decay_tokens=1_500_000_000_000,  # report 3.2: over the whole stage
        decay="linear",  # report 3.2
    ),
    batch_ramp=(  # report 3.2: 32M tokens, then 46M after about 500B, in sequences that 992 GPUs share out
        (0, 7_936),
        (500_000_000_000, 11_160),
    ),
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

CONTEXT_8K = replace(
    REASONING,
    name="context_8k",
    tokens=7_000_000_000,  # not published: 20B (report 3.2) shared out over three lengths
    seq_len=8_192,  # report 3.2
    lr=LearningRate(  # not published: falls as on the cards of the smaller models, from 1e-4 to 1e-5 over the three
        peak=1e-4,
        final=6.85e-5,
        warmup_tokens=0,
        decay_tokens=7_000_000_000,
        decay="linear",
    ),
    batch_ramp=((0, 5_580),),  # not published: stays at 46M tokens
    mixture=(  # not published: earlier data and long documents (report 3.2); between the stages before
        ("korean", 0.2),
        ("english", 0.55),
        ("code", 0.25),
    ),
    fim_rate=0.0,  # not published: told of the reasoning stage only
    rope_interpolation=8.0,  # report 3.2
    layout=replace(
        GENERAL.layout,
        tp=4,  # not published: the size of TP, which is added for long context (report 2.3); of the script
    ),
)

CONTEXT_16K = replace(
    CONTEXT_8K,
    name="context_16k",
    tokens=7_000_000_000,  # not published: 20B (report 3.2) shared out over three lengths
    seq_len=16_384,  # report 3.2
    lr=replace(  # not published: goes on from 8K
        CONTEXT_8K.lr,
        peak=6.85e-5,
        final=3.7e-5,
    ),
    batch_ramp=((0, 2_790),),  # not published: stays at 46M tokens
)

CONTEXT_32K = replace(
    CONTEXT_16K,
    name="context_32k",
    tokens=6_000_000_000,  # not published: 20B (report 3.2) shared out over three lengths
    seq_len=32_768,  # report 3.2
    lr=replace(  # not published: goes on from 16K
        CONTEXT_16K.lr,
        peak=3.7e-5,
        final=1e-5,
        decay_tokens=6_000_000_000,
    ),
    batch_ramp=((0, 1_395),),  # not published: stays at 46M tokens
)

RECIPE = Recipe(
    name="vaetki_100b_a10b",
    source="VAETKI Technical Report (NC-AI Consortium, January 2026), weights and training script",
    assumed=(
        "general.batch_ramp",
        "general.mixture",
        "general.document_mask",
        "general.router.z_loss",
        "general.layout",
        "reasoning.mixture",
        "context_8k.tokens",
        "context_8k.lr",
        "context_8k.batch_ramp",
        "context_8k.mixture",
        "context_8k.fim_rate",
        "context_8k.layout.tp",
        "context_16k.tokens",
        "context_16k.lr",
        "context_16k.batch_ramp",
        "context_32k.tokens",
        "context_32k.lr",
        "context_32k.batch_ramp",
        "model.norm.eps",
        "optimizer",
    ),
    published=Published(
        total_params=112_191_900_672,  # weights
        unreleased=(),  # weights: nothing is missing
        active_params=10.1e9,  # card; report: 10B
        tokens=5.12e12,  # report 3.2: 3.6T, 1.5T and 20B; card: 9.8T
        gpus=1_016,  # report 2.3: for training and evaluation
        gpu="H100",  # report 2.3: 80GB PCIe
    ),
    model=Model(
        num_layers=48,  # report table 1
        num_dense_layers=3,  # report table 1
        hidden_dim=3_072,  # report 2.1, script
        dense_ffn_dim=18_432,  # script
        vocab_size=137_216,  # weights; report 2.2: 135,168
        attention=MLA(  # report 2.1
            num_heads=24,  # report table 1
            q_lora_rank=1_536,  # report 2.1
            kv_lora_rank=512,  # report 2.1
            qk_nope_head_dim=128,  # script; with the next one 192, not the 196 of report 2.1, which the count rules out
            qk_rope_head_dim=64,  # script
            v_head_dim=128,  # report 2.1
        ),
        window_pattern="LLLLLG",  # report 2.1: 5 local to 1 global
        window=512,  # plugin: keys, the token's own included; it also gives the 83 % of report 2.1; if training masked distances above 512, it had 513
        local_rope=Rope(
            base=10_000.0,  # report 2.1
            interleaved=True,  # plugin
            yarn=None,  # plugin
        ),
        global_rope=Rope(
            base=1_000_000.0,  # report 2.1
            interleaved=True,  # plugin
            yarn=None,  # plugin
        ),
        norm=PeriNorm(  # report 2.1
            eps=1e-5,  # not published: Megatron-core's default, and of the 7B; the script sets none
            zero_centered=True,  # report 2.1
        ),
        experts=Experts(
            num_routed=128,  # report table 1
            num_shared=1,  # report 2.1
            top_k=8,  # report table 1
            ffn_dim=2_048,  # script
            score="sigmoid",  # report 2.1
            scaling_factor=2.5,  # script
            expert_bias=False,  # weights
            num_groups=1,  # report 2.1: no groups
            group_top_k=1,  # report 2.1: no groups
        ),
        mtp=None,  # weights: no MTP
        tied_embeddings=False,  # weights
        init_std=0.0134,  # script
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
    stages=(GENERAL, REASONING, CONTEXT_8K, CONTEXT_16K, CONTEXT_32K),
)
