"""Where gpu_check.py finds text: every way it can be found gives a plan that can be read."""

import json

import torch

from benchmarks import sample_text
from benchmarks.megamoe_step import Load, make_plan, write
from megamoe.mcore.data import TrainingText
from megamoe.recipe.load import load_recipe
from megamoe.recipe.scale import scale_tiny
from tests.mcore.world import world_of_one


def read(folder):
    """Return what a source is called and the first tokens of its text."""
    recipe = scale_tiny(load_recipe("vaetki_7b_a1b")).recipe
    load = Load(sequences=2, micro_batch=1, warmup=1, count=1)
    plan = make_plan(recipe, recipe.model.num_layers, load, torch.device("cpu"))
    plan, what = sample_text.sample_text(plan, folder / "text")
    with world_of_one(plan):
        text = TrainingText(plan, plan.segments[0], folder / "cache")
        [first, *_] = text.micro_batches(0, 2, 1)
    return what, first["tokens"]


def test_the_packaged_text_is_read_as_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_text, "TOKENISED", tmp_path / "absent")
    what, tokens = read(tmp_path)
    assert what == "packaged sample, bytes as tokens"
    assert tokens.max() < 256 + sample_text.FIRST_BYTE


def test_without_zstandard_the_repository_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_text, "TOKENISED", tmp_path / "absent")
    monkeypatch.setattr(sample_text, "find_spec", lambda _: None)
    what, tokens = read(tmp_path)
    assert "this repository's own code" in what
    assert tokens.max() < 256 + sample_text.FIRST_BYTE


def test_a_folder_of_shards_is_taken_as_it_is(tmp_path, monkeypatch):
    shard = write(tmp_path / "made", "one", sample_text._tokens([b"a word and another " * 300]), 99)
    entry = {"prefix": shard.prefix, "tokens": shard.tokens, "sha256_idx": shard.sha256_idx}
    manifest = {"tokenizer": {"vocab_size": 99}, "sources": {"one": {"train": entry}}}
    (tmp_path / "made" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sample_text, "TOKENISED", tmp_path / "made")
    what, _ = read(tmp_path)
    assert what == "data/sample, 99 tokens"
