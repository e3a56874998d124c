"""K-EXAONE-236B-A23B (LG AI Research, 2026): 3 local layers to 1 global without positions, MTP, Muon.

Sources, as named on each line:
    report  K-EXAONE Technical Report, arXiv 2601.01739
    config  config.json of the released weights
    weights tensor names and shapes of the released weights

The report tells the tokens of all stages together, no batch size and no layout.
"""

from dataclasses import replace

from megamoe.recipe import (
    GQA,
    Experts,
    Fp8Block,
    Layout,
    LearningRate,
    Model,
    Mtp,
    Muon,
    PreNorm,
    Published,
    Recipe,
    Rope,
    Router,
    Stage,
    Tokenizer,
)

FOUNDATION = Stage(
    name="foundation",
    tokens=8_000_000_000_000,  # not published: 11T in all (report table 2), most of it first
    seq_len=8_192,  # report 3.2
    lr=LearningRate(
        peak=3e-4,  # report 3.1
        final=None,  # report 3.1: stable after the warm-up
        warmup_tokens=33_554_432_000,  # not published: 2,000 steps, as DeepSeek-V3
        decay_tokens=0,  # report 3.1: stable after the warm-up
        decay="linear",  # not published: nothing decays here
    ),
    batch_ramp=(  # not published: 16.8M tokens; VAETKI-100B and A.X-K1 take 8M to 75M
        (0, 2_048),
    ),
    mixture=(  # not published: six languages, code and STEM (report 3.1); as VAETKI, of the sample corpus's three sources
        ("korean", 0.2),
        ("english", 0.65),
        ("code", 0.15),
    ),
    fim_rate=0.0,  # not published: none is mentioned
    document_mask=False,  # not published: what Megatron-LM does by default
    router=Router(
        aux_loss=0.0,  # report 3.1: the loss is per sequence
        sequence_aux_loss=1e-4,  # report 3.1
        global_aux_loss=0.0,  # report 3.1: the loss is per sequence
        z_loss=0.0,  # not published: none is mentioned
        bias_update_rate=1e-4,  # report 3.1
    ),
    mtp_loss=0.05,  # report 3.1
    rope_interpolation=1.0,  # report 2.1: global layers have no positions
    precision=Fp8Block(  # not published: how FP8 (report 3.1) is scaled; by blocks, as DeepSeek-V3's
        bf16_first_layers=1,  # not published: as VAETKI's script has it
        bf16_last_layers=1,  # not published: as VAETKI's script has it
    ),
    layout=Layout(  # not published: sizes for 512 GPUs, which share out every batch; pp x vpp divides 48 layers
        tp=2,
        pp=8,
        vpp=2,
        pipeline="even",
        cp=1,
        cp_scheme="auto",  # not published: by cost
        ep=32,
        etp=1,
        dispatcher="all_to_all",  # not published: needs no library
        micro_batch=1,  # not published: one sequence needs the least memory
        recompute=(),  # not published: none is mentioned
    ),
)

EXPERTISE = replace(
    FOUNDATION,
    name="expertise",
    tokens=2_000_000_000_000,  # not published: 11T in all (report table 2); a quarter of the first stage
    lr=replace(
        FOUNDATION.lr,
        warmup_tokens=0,  # not published: goes on from the first stage
    ),
    mixture=(  # not published: domain knowledge (report 3.1); more code, in the place of English
        ("korean", 0.2),
        ("english", 0.55),
        ("code", 0.25),
    ),
)

REASONING = replace(
    EXPERTISE,
    name="reasoning",
    tokens=800_000_000_000,  # not published: 11T in all (report table 2); what the other stages leave
    lr=LearningRate(
        peak=3e-4,  # report 3.1: stable until the decay
        final=3e-5,  # not published: a tenth of the peak
        warmup_tokens=0,  # not published: goes on from the stage before
        decay_tokens=800_000_000_000,  # not published: the decay of WSD (report 3.1) put here
        decay="linear",  # not published: the plainest decay of WSD (report 3.1)
    ),
    mixture=(  # not published: reasoning (report 3.1); still more code, in the place of English
        ("korean", 0.2),
        ("english", 0.45),
        ("code", 0.35),
    ),
)

CONTEXT_32K = replace(
    REASONING,
    name="context_32k",
    tokens=150_000_000_000,  # not published: until retrieval is near perfect (report 3.2); 200B for both, most at the first
    seq_len=32_768,  # report 3.2
    lr=LearningRate(
        peak=3e-5,  # not published: goes on from the stage before
        final=None,  # not published: constant, as the decay is over
        warmup_tokens=0,  # not published: goes on from the stage before
        decay_tokens=0,  # not published: constant, as the decay is over
        decay="linear",  # not published: nothing decays here
    ),
    batch_ramp=(  # not published: stays at 16.8M tokens
        (0, 512),
    ),
    mixture=(  # not published: rehearsal, reasoning, long documents (report 3.2); between the stages before
        ("korean", 0.2),
        ("english", 0.55),
        ("code", 0.25),
    ),
    layout=replace(
        FOUNDATION.layout,
        cp=2,  # not published: a rank has 16,384 tokens of each sequence
    ),
)

CONTEXT_256K = replace(
    CONTEXT_32K,
    name="context_256k",
    tokens=50_000_000_000,  # not published: until retrieval is near perfect (report 3.2); what 32K leaves of 200B
    seq_len=262_144,  # report 3.2
    batch_ramp=(  # not published: stays at 16.8M tokens
        (0, 64),
    ),
    layout=replace(
        FOUNDATION.layout,
        cp=16,  # not published: a rank has 16,384 tokens of each sequence
    ),
)

RECIPE = Recipe(
    name="k_exaone_236b_a23b",
    source="K-EXAONE Technical Report (LG AI Research, arXiv 2601.01739), config.json and weights",
    assumed=(
        "foundation.tokens",
        "foundation.lr.warmup_tokens",
        "foundation.lr.decay",
        "foundation.batch_ramp",
        "foundation.mixture",
        "foundation.fim_rate",
        "foundation.document_mask",
        "foundation.router.z_loss",
        "foundation.precision",
        "foundation.layout",
        "expertise.tokens",
        "expertise.lr.warmup_tokens",
        "expertise.mixture",
        "reasoning.tokens",
        "reasoning.lr.final",
        "reasoning.lr.warmup_tokens",
        "reasoning.lr.decay_tokens",
        "reasoning.lr.decay",
        "reasoning.mixture",
        "context_32k.tokens",
        "context_32k.lr",
        "context_32k.batch_ramp",
        "context_32k.mixture",
        "context_32k.layout.cp",
        "context_256k.tokens",
        "context_256k.batch_ramp",
        "context_256k.layout.cp",
        "optimizer.momentum",
        "optimizer.newton_schulz_steps",
        "optimizer.beta1",
        "optimizer.beta2",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.grad_clip",
        "optimizer.moments_dtype",
    ),
    published=Published(
        total_params=237_099_669_632,  # weights: with MTP and expert bias; report: 236B
        unreleased=(),  # weights: nothing is missing
        active_params=23e9,  # report table 1
        tokens=11e12,  # report table 2
        gpus=None,  # report: not told
        gpu=None,  # report: not told
    ),
    model=Model(
        num_layers=48,  # report table 1
        num_dense_layers=1,  # config
        hidden_dim=6_144,  # config
        dense_ffn_dim=18_432,  # config
        vocab_size=153_600,  # config
        attention=GQA(  # report table 1
            num_heads=64,  # report table 1
            num_kv_heads=8,  # report table 1
            head_dim=128,  # report table 1
            qk_norm=True,  # report 2.1
        ),
        window_pattern="LLLG",  # report table 1: 36 local, 12 global
        window=128,  # report 2.1
        local_rope=Rope(  # report 2.1: positions on local layers only
            base=1_000_000.0,  # config
            interleaved=False,  # config
            yarn=None,  # config
        ),
        global_rope=None,  # report 2.1: positions on local layers only
        norm=PreNorm(  # weights
            eps=1e-5,  # config
            zero_centered=False,  # weights
        ),
        experts=Experts(
            num_routed=128,  # report 2.1
            num_shared=1,  # report 2.1
            top_k=8,  # report 2.1
            ffn_dim=2_048,  # config
            score="sigmoid",  # config
            scaling_factor=2.5,  # config
            expert_bias=True,  # weights
            num_groups=1,  # config
            group_top_k=1,  # config
        ),
        mtp=Mtp(
            num_layers=1,  # report 2.1
            ffn="dense",  # report 2.1
        ),
        tied_embeddings=False,  # weights
        init_std=0.02,  # config
    ),
    tokenizer=Tokenizer(
        algorithm="byte-level-bpe",  # report 2.2: SuperBPE
        vocab_size=153_600,  # config; report 2.2: 150K
    ),
    optimizer=Muon(  # report 3.1
        momentum=0.95,  # not published: usual for Muon
        newton_schulz_steps=5,  # not published: usual for Muon
        beta1=0.9,  # not published: usual values of AdamW
        beta2=0.95,  # not published: usual values of AdamW
        eps=1e-8,  # not published: usual values of AdamW
        weight_decay=0.1,  # not published: usual values of AdamW
        grad_clip=1.0,  # not published: usual values of AdamW
        moments_dtype="float32",  # not published: what optimizers have where nothing is said
    ),
    stages=(FOUNDATION, EXPERTISE, REASONING, CONTEXT_32K, CONTEXT_256K),
)
