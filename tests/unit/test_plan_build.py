"""A recipe, a cluster and data become a plan, or one line that says what would."""

import json
from dataclasses import replace

import pytest

from megamoe.errors import DataError
from megamoe.plan.build import Options, build_plan
from megamoe.plan.cluster import Cluster
from megamoe.recipe import (
    MLA,
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

CPU = Cluster(
    name="local",
    num_nodes=1,
    devices_per_node=2,
    device="cpu",
    device_name="CPU",
    peak_flops_per_s=None,
    memory_bytes=None,
    network_bytes_per_s=None,
)
GENERAL = Stage(
    name="general",
    tokens=100_000,
    seq_len=64,
    lr=LearningRate(peak=1e-3, final=None, warmup_tokens=1_000, decay_tokens=0, decay="linear"),
    batch_ramp=((0, 8), (50_000, 16)),
    mixture=(("korean", 3), ("code", 1)),
    fim_rate=0,
    document_mask=False,
    router=Router(
        aux_loss=1e-3, sequence_aux_loss=0, global_aux_loss=0, z_loss=0, bias_update_rate=0
    ),
    mtp_loss=None,
    rope_interpolation=1,
    precision=Bf16(),
    layout=Layout(
        tp=1,
        pp=1,
        vpp=1,
        pipeline="even",
        cp=1,
        cp_scheme="auto",
        ep=2,
        etp=1,
        dispatcher="all_to_all",
        micro_batch=2,
        recompute=(),
    ),
)
RECIPE = Recipe(
    name="small",
    source="a test",
    assumed=("general.tokens",),
    published=Published(
        total_params=None, unreleased=(), active_params=None, tokens=None, gpus=None, gpu=None
    ),
    model=Model(
        num_layers=4,
        num_dense_layers=1,
        hidden_dim=64,
        dense_ffn_dim=128,
        vocab_size=512,
        attention=MLA(
            num_heads=4,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
        ),
        window_pattern="LG",
        window=16,
        local_rope=Rope(base=10_000, interleaved=True),
        global_rope=Rope(base=10_000, interleaved=True),
        norm=PreNorm(eps=1e-5, zero_centered=False),
        experts=Experts(
            num_routed=8,
            num_shared=1,
            top_k=2,
            ffn_dim=32,
            score="softmax",
            scaling_factor=1,
            expert_bias=False,
            num_groups=1,
            group_top_k=1,
        ),
        mtp=None,
        tied_embeddings=False,
        init_std=0.02,
    ),
    tokenizer=Tokenizer(algorithm="byte-level-bpe", vocab_size=512),
    optimizer=AdamW(
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1, moments_dtype="float32"
    ),
    stages=(GENERAL, replace(GENERAL, name="reasoning", tokens=7_000, batch_ramp=((0, 4),))),
)


def shard(folder, prefix, tokens=1_000):
    for ending in (".bin", ".idx"):
        (folder / (prefix + ending)).write_bytes(b"")
    return {
        "prefix": prefix,
        "documents": 1,
        "tokens": tokens,
        "bytes_text": 9,
        "sha256_bin": "b" * 64,
        "sha256_idx": "1" * 64,
    }


def data_folder(folder, *, change=None):
    """A data folder of two sources; `change` edits the manifest before it is written."""
    manifest = {
        "format": 1,
        "tokenizer": {
            "algorithm": "byte-level-bpe",
            "vocab_size": 500,
            "eod_id": 0,
            "pad_id": 1,
            "sha256": "2" * 64,
            "file": "tokenizer/tokenizer.json",
        },
        "sources": {
            name: {
                "train": shard(folder, name, 4_000),
                "heldout": shard(folder, f"{name}.heldout"),
                "fim": shard(folder, f"{name}.fim"),
            }
            for name in ("korean", "code")
        },
    }
    if change is not None:
        change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def with_data(folder, recipe=RECIPE, *, change=None):
    return build_plan(recipe, CPU, Options(data=data_folder(folder, change=change)))


def test_segments_follow_each_other_without_a_gap():
    plan = build_plan(RECIPE, CPU, Options())
    first, second = plan.segments
    # 98 steps of 8 x 64 reach 50,176; the other 49,824 take 49 steps of 16 x 64
    assert (first.num_steps, first.tokens) == (98 + 49, 50_176 + 49 * 1_024)
    assert (first.tokens_start, first.steps_start) == (0, 0)
    assert (second.tokens_start, second.steps_start) == (first.tokens, first.num_steps)
    assert (second.num_steps, second.tokens) == (28, 28 * 4 * 64)
    assert [segment.index for segment in plan.segments] == [0, 1]


def test_the_ranks_that_are_left_are_data_parallel():
    segment = build_plan(RECIPE, CPU, Options()).segments[0]
    assert (segment.world_size, segment.dp) == (2, 2)


def test_a_fifth_of_a_segment_lies_between_checkpoints_and_between_evaluations():
    first, second = build_plan(RECIPE, CPU, Options()).segments
    assert (first.checkpoint_every, first.eval_every) == (29, 29)
    assert (second.checkpoint_every, second.eval_every) == (5, 5)
    asked = build_plan(RECIPE, CPU, Options(checkpoint_every=5, eval_every=7)).segments[0]
    assert (asked.checkpoint_every, asked.eval_every) == (5, 7)


def test_a_segment_of_few_steps_is_saved_at_each_and_a_long_one_every_thousand():
    short = replace(GENERAL, tokens=1_100, batch_ramp=((0, 8),))
    long = replace(GENERAL, tokens=10**9, batch_ramp=((0, 8),))
    for stage, every in ((short, 1), (long, 1_000)):
        plan = build_plan(replace(RECIPE, stages=(stage,)), CPU, Options())
        assert plan.segments[0].checkpoint_every == every


def test_evaluation_reads_as_much_as_the_largest_first_step():
    assert build_plan(RECIPE, CPU, Options()).eval_tokens == 8 * 64
    assert build_plan(RECIPE, CPU, Options(eval_tokens=99)).eval_tokens == 99


def test_without_data_there_are_no_sources():
    plan = build_plan(RECIPE, CPU, Options())
    assert plan.data is None
    assert {segment.sources for segment in plan.segments} == {()}


def test_weights_are_normalised_and_point_at_the_training_shards(tmp_path):
    plan = with_data(tmp_path)
    sources = plan.segments[0].sources
    assert [(s.name, s.weight, s.shard.prefix) for s in sources] == [
        ("korean", 0.75, "korean"),
        ("code", 0.25, "code"),
    ]
    assert sources[0].shard.tokens == 4_000


def test_fill_in_the_middle_takes_its_share_of_each_source(tmp_path):
    recipe = replace(RECIPE, stages=(replace(GENERAL, fim_rate=0.6),))
    sources = with_data(tmp_path, recipe).segments[0].sources
    assert [(s.name, s.shard.prefix) for s in sources] == [
        ("korean", "korean"),
        ("korean:fim", "korean.fim"),
        ("code", "code"),
        ("code:fim", "code.fim"),
    ]
    assert [s.weight for s in sources] == pytest.approx([0.3, 0.45, 0.1, 0.15], rel=1e-12)


def test_a_stage_of_nothing_but_fill_in_the_middle_has_no_plain_source(tmp_path):
    recipe = replace(RECIPE, stages=(replace(GENERAL, fim_rate=1),))
    sources = with_data(tmp_path, recipe).segments[0].sources
    assert [s.name for s in sources] == ["korean:fim", "code:fim"]


def test_every_source_of_any_stage_is_evaluated_once(tmp_path):
    later = replace(RECIPE.stages[1], mixture=(("code", 1),))
    data = with_data(tmp_path, replace(RECIPE, stages=(GENERAL, later))).data
    assert [(name, s.prefix) for name, s in data.heldout] == [
        ("code", "code.heldout"),
        ("korean", "korean.heldout"),
    ]
    assert (data.vocab_size, data.eod_id, data.pad_id) == (500, 0, 1)
    assert data.folder == str(tmp_path.resolve())


def drop_source(manifest):
    manifest["sources"]["koreans"] = manifest["sources"].pop("korean")


def drop_heldout(manifest):
    manifest["sources"]["code"]["heldout"] = None


def large_vocabulary(manifest):
    manifest["tokenizer"]["vocab_size"] = 513


def empty_shard(manifest):
    manifest["sources"]["code"]["train"]["tokens"] = 0


def missing_file(manifest):
    manifest["sources"]["code"]["train"]["prefix"] = "elsewhere"


def large_eod(manifest):
    manifest["tokenizer"]["eod_id"] = 500


def words_for_tokens(manifest):
    manifest["sources"]["code"]["train"]["tokens"] = "many"


def new_format(manifest):
    manifest["format"] = 2


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            drop_source,
            [
                "small/general: source 'korean' is not in",
                "did you mean 'koreans'?",
                "`megamoe data tokenize --source korean -o",
            ],
        ),
        (drop_heldout, ["small/general: source 'code' has no held-out text", "--heldout 0.03"]),
        (large_vocabulary, ["vocab_size 513 exceeds model.vocab_size 512", "tokenizer train"]),
        (empty_shard, ["sources.code.train", "holds 0 tokens"]),
        (missing_file, ["sources.code.train", "elsewhere.bin is missing"]),
        (large_eod, ["eod_id 500 is not below vocab_size 500"]),
        (words_for_tokens, ["sources.code.train: tokens is 'many', not of type int"]),
        (new_format, ["not a manifest of format 1"]),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(tmp_path, change, parts):
    with pytest.raises(DataError) as caught:
        with_data(tmp_path, change=change)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_missing_fill_in_the_middle_text_is_named_with_both_ways_out(tmp_path):
    def drop_fim(manifest):
        manifest["sources"]["code"]["fim"] = None

    recipe = replace(RECIPE, stages=(GENERAL, replace(GENERAL, name="later", fim_rate=0.5)))
    with pytest.raises(DataError, match="small/later: source 'code' has no fill-in") as caught:
        with_data(tmp_path, recipe, change=drop_fim)
    assert "--fim" in str(caught.value)
    assert "--set later.fim_rate=0" in str(caught.value)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: No such file.*megamoe data tokenize"):
        build_plan(RECIPE, CPU, Options(data=str(tmp_path)))


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        build_plan(RECIPE, CPU, Options(data=str(tmp_path)))
