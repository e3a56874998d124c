"""From a run's checkpoint to text and to what text costs, as a person asks for it."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from data_prep.shards import read_document
from data_prep.tokenizer import Tokenizer, load_tokenizer
from data_prep.tokenizer_import import import_tokenizer
from data_prep.tokenizer_train import train_tokenizer
from megamoe.checkpoints import folder as files
from megamoe.convert.from_hf import from_hf
from megamoe.convert.to_hf import to_hf
from megamoe.errors import CheckpointError, DataError
from megamoe.generate.inputs import find_texts
from megamoe.generate.perplexity import Cost, Text, cost_of, read_text, sum_of
from megamoe.mcore.inference import TrainedModel, all_logits
from megamoe.mcore.model import unwrap
from megamoe.plan.json import write_plan
from megamoe.plan.plan import Plan
from megamoe.recipe import Bf16, Fp32
from tests.mcore import tiny
from tests.mcore.test_model import FLOAT32, reference_weights, roundings
from tests.mcore.world import train, with_segment, world_of_one
from tests.reference.model import Reference, token_losses
from tests.unit.test_data_tokenizer_import import CONFIG, byte_level, sentencepiece

ROOT = Path(__file__).parents[2]
TEXT = "a line of text, 글 한 줄, and so on\n"


def plan_of(folder: Path, model=tiny.LATENT, precision=None) -> Plan:
    """Return a plan whose data folder has a tokenizer; its shards are no text, but of its ids."""
    model = replace(model, vocab_size=280)
    plan = tiny.tiny_plan(folder / "data", model, precision=precision or Fp32())
    train_tokenizer("byte-level-bpe", 280, [TEXT] * 9, folder / "data" / "tokenizer")
    data = replace(plan.data, eod_id=2, pad_id=0, vocab_size=280)
    return replace(plan, data=data)


def trained(folder: Path, plan: Plan):
    """Return the engine after two steps, its checkpoint written."""
    (folder / "run").mkdir()
    write_plan(folder / "run" / "plan.json", plan)
    engine = train(plan, folder / "run", 2)
    engine.save(wait=True)
    return engine


def opened(folder: Path, plan: Plan) -> TrainedModel:
    checkpoint = files.latest(folder / "run" / "checkpoints")
    return TrainedModel(plan, plan.segments[0], checkpoint)


def tokenizer_of(plan: Plan) -> Tokenizer:
    return load_tokenizer(Path(plan.data.folder) / "tokenizer")


def read(file: Path, tokenizer: Tokenizer) -> Text:
    return read_text(file, tokenizer, text_key="text", max_tokens=10_000)


def tokens_of(text: Text) -> list[int]:
    return [token for document in text.documents for token in document.tolist()]


@pytest.mark.parametrize("precision", [Fp32(), Bf16()])
@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED, tiny.SOFTMAX])
def test_the_weights_are_those_that_were_trained(tmp_path, model, precision):
    plan = plan_of(tmp_path, model, precision)
    with world_of_one(plan):
        expected = unwrap(trained(tmp_path, plan).chunks[0]).state_dict()
        actual = opened(tmp_path, plan).module.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert actual[name].dtype == value.dtype, name
            assert torch.equal(actual[name], value), name


def test_a_damaged_checkpoint_is_refused(tmp_path):
    plan = plan_of(tmp_path)
    with world_of_one(plan):
        trained(tmp_path, plan)
        [shard] = (tmp_path / "run" / "checkpoints").glob("0*/__0_0.distcp")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged, its SHA-256 is another"):
            opened(tmp_path, plan)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("model", [tiny.LATENT, tiny.GROUPED, tiny.SOFTMAX])
def test_heldout_text_costs_what_it_did_in_training(tmp_path, model, document_mask):
    plan = with_segment(plan_of(tmp_path, model), document_mask=document_mask)
    with world_of_one(plan):
        [expected] = trained(tmp_path, plan).evaluate()
        shard = Path(plan.data.folder) / "one.heldout.bin"
        tokenizer = tokenizer_of(plan)
        text = read_text(shard, tokenizer, text_key="text", max_tokens=plan.eval_tokens)
        cost = cost_of(text, opened(tmp_path, plan), tokenizer)
    assert cost.tokens == expected.tokens
    assert (cost.tokens < plan.eval_tokens) == document_mask
    # The model's roundings, and those of training's float32 sum over the tokens.
    error = abs(cost.loss - expected.loss) / expected.loss
    assert error <= (2 * roundings(plan.model, 16) + plan.eval_tokens) * FLOAT32


def test_a_text_of_ends_alone_is_refused_where_documents_are_masked(tmp_path):
    plan = with_segment(plan_of(tmp_path), document_mask=True)
    with world_of_one(plan):
        trained(tmp_path, plan)
        text = Text(name="empty.bin", documents=[numpy.array([2, 2]), numpy.array([2])])
        with pytest.raises(DataError) as caught:
            cost_of(text, opened(tmp_path, plan), tokenizer_of(plan))
    assert str(caught.value) == (
        "empty.bin: holds no document of 2 tokens; they are needed to predict one"
    )


def test_a_text_costs_what_the_reference_says(tmp_path):
    plan = plan_of(tmp_path)
    file = tmp_path / "some.txt"
    file.write_text(TEXT * 3)
    tokenizer = tokenizer_of(plan)
    with world_of_one(plan):
        trained(tmp_path, plan)
        model = opened(tmp_path, plan)
        cost = cost_of(read(file, tokenizer), model, tokenizer)
        reference = Reference(plan.model, reference_weights(model.module))
    ids = [*tokenizer.encode(TEXT * 3), 2]
    assert tokens_of(read(file, tokenizer)) == ids
    expected = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[start : start + 17]])
        losses = token_losses(reference.run(window[:, :-1]).logits, window[:, 1:])
        expected += float(losses.detach().sum())
    assert cost.tokens == len(ids) - 1
    assert cost.nats == pytest.approx(expected, rel=roundings(plan.model, 16) * FLOAT32)
    assert cost.num_bytes == len((TEXT * 3).encode()) - len(tokenizer.decode(ids[:1]).encode())


def test_loss_perplexity_and_bits_a_byte():
    cost = Cost(tokens=10, nats=20 * math.log(2), num_bytes=40)
    assert cost.loss == pytest.approx(2 * math.log(2))
    assert cost.perplexity == pytest.approx(4)
    assert cost.bits_per_byte == pytest.approx(0.5)
    both = sum_of([cost, Cost(tokens=30, nats=0.0, num_bytes=0)])
    assert (both.tokens, both.nats, both.num_bytes) == (40, cost.nats, 40)
    assert Cost(tokens=1, nats=1.0, num_bytes=0).bits_per_byte == math.inf  # end tokens alone


def test_documents_of_json_lines_each_end(tmp_path):
    tokenizer = tokenizer_of(plan_of(tmp_path))
    file = tmp_path / "some.jsonl"
    file.write_text('{"body": "ab"}\n{"body": ""}\n{"body": "c"}\n')
    ids = [*tokenizer.encode("ab"), 2, *tokenizer.encode("c"), 2]
    text = read_text(file, tokenizer, text_key="body", max_tokens=100)
    assert [document.tolist() for document in text.documents] == [ids[:-2], ids[-2:]]
    assert tokens_of(read_text(file, tokenizer, text_key="body", max_tokens=2)) == ids[:3]


def test_a_shard_is_read_by_either_file_and_by_its_prefix(tmp_path):
    plan = plan_of(tmp_path)
    prefix = Path(plan.data.folder) / "one.heldout"
    names = [f"{prefix}.bin", f"{prefix}.idx", str(prefix)]
    expected = [token for number in range(5) for token in read_document(prefix, number)]
    for file in find_texts(names):
        assert tokens_of(read(file, tokenizer_of(plan))) == expected


def test_a_text_that_predicts_nothing_is_refused(tmp_path):
    plan = plan_of(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with world_of_one(plan):
        trained(tmp_path, plan)
        model = opened(tmp_path, plan)
        with pytest.raises(DataError, match=r"empty.txt: holds 0 tokens; 2 are needed"):
            cost_of(read(tmp_path / "empty.txt", tokenizer_of(plan)), model, tokenizer_of(plan))


def test_a_shard_of_another_tokenizer_is_refused(tmp_path):
    plan = plan_of(tmp_path)
    train_tokenizer("byte-level-bpe", 270, [TEXT] * 9, tmp_path / "small")
    small = load_tokenizer(tmp_path / "small")
    small = replace(small, meta=replace(small.meta, vocab_size=50))
    shard = Path(plan.data.folder) / "one.bin"
    with world_of_one(plan):
        trained(tmp_path, plan)
        model = opened(tmp_path, plan)
        with pytest.raises(DataError, match=r"one\.bin: holds token \d+, the tokenizer has 50"):
            cost_of(read(shard, small), model, small)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_text_costs_the_same_however_its_documents_come(tmp_path, document_mask):
    plan = with_segment(plan_of(tmp_path), document_mask=document_mask)
    tokenizer = tokenizer_of(plan)
    documents = [[*tokenizer.encode(TEXT[:size]), 2] for size in (1, 30, 36, 2)] * 60
    documents.append(tokenizer.encode(TEXT * 90))  # longer than what is computed at once
    whole = [token for document in documents for token in document]
    with world_of_one(plan):
        trained(tmp_path, plan)
        model = opened(tmp_path, plan)
        apart, together = (
            cost_of(Text(name="x", documents=map(numpy.array, parts)), model, tokenizer)
            for parts in (documents, [whole])
        )
    assert apart.nats == together.nats  # the same windows in the same order
    assert apart == together
    predicted = len(whole) - (len(documents) if document_mask else 1)
    assert apart.tokens == predicted > 2 * 2_048


@pytest.mark.parametrize("document_mask", [False, True])
def test_bytes_are_those_of_the_text_where_a_codec_drops_the_first_space(tmp_path, document_mask):
    plan = with_segment(plan_of(tmp_path), document_mask=document_mask)
    plan = replace(plan, model=replace(plan.model, vocab_size=320))
    imported = sentencepiece(tmp_path / "hf", {})
    import_tokenizer(imported, tmp_path / "tok", end_token=None, pad_token=None)
    tokenizer = load_tokenizer(tmp_path / "tok")
    lines = ["a line of text", "글 한 줄", "and so on"]
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    firsts = [len(tokenizer.decode(tokenizer.encode(line)[:1]).encode()) for line in lines]
    with world_of_one(plan):
        trained(tmp_path, plan)
        model = opened(tmp_path, plan)
        cost = cost_of(read(tmp_path / "some.jsonl", tokenizer), model, tokenizer)
    unpredicted = sum(firsts) if document_mask else firsts[0]
    assert cost.num_bytes == sum(len(line.encode()) for line in lines) - unpredicted


def test_a_text_is_not_held_as_a_whole(tmp_path):
    """The first window is computed before the third document is read."""
    plan = plan_of(tmp_path)
    tokenizer = tokenizer_of(plan)
    read_at: list[int] = []
    computed: list[int] = []

    def documents():
        for number in range(6):
            read_at.append(len(computed))
            yield numpy.full(1_500, 9 + number, dtype=numpy.int32)

    with world_of_one(plan):
        trained(tmp_path, plan)
        model = opened(tmp_path, plan)
        model.module.decoder.register_forward_hook(lambda *_: computed.append(1))
        cost_of(Text(name="x", documents=documents()), model, tokenizer)
    assert read_at == [0, 0, 1, 2, 2, 3]


def megamoe(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamoe", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines on standard error, but for one of torch built for CUDA where there is none."""
    return [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]


@pytest.mark.slow
def test_the_commands_speak_and_measure(tmp_path):
    plan = plan_of(tmp_path)
    with world_of_one(plan):
        [expected] = trained(tmp_path, plan).evaluate()
    run = tmp_path / "run"
    words = ("generate", run, "--prompt", "a line 글", "--max-tokens", "12", "--temperature", "0.9")
    first, second = megamoe(*words), megamoe(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("a line 글")
    [line] = said(first)  # no warning of any library
    assert "000000000000256: " in line
    shard = f"{plan.data.folder}/one.heldout.bin"
    files = (f"a={shard}", "b=" + shard.replace("one.heldout", "two"), shard, f"a={shard}")
    done = megamoe("eval", "perplexity", run, *files, "--max-tokens", plan.eval_tokens)
    assert (done.returncode, said(done)) == (0, [])
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    names = [shard, shard, "all of a", shard.replace("one.heldout", "two"), "all of b", shard]
    assert [" ".join(row[:-4]) for row in rows] == names
    assert rows[0][1:] == rows[1][1:] == rows[-1][1:]
    assert rows[0][1:3] == ["200", f"{expected.loss:.4f}"]
    assert rows[2][-4:] == ["400", *rows[0][-3:]]
    assert rows[3][-4:] == rows[4][-4:] != rows[0][-4:]


@pytest.mark.slow
def test_rows_of_the_model_that_are_no_token_are_not_drawn(tmp_path):
    plan = plan_of(tmp_path, tiny.GROUPED)
    plan = replace(
        plan, model=replace(plan.model, vocab_size=330), data=replace(plan.data, vocab_size=300)
    )
    train_tokenizer("sentencepiece-bpe", 300, [TEXT] * 9, tmp_path / "tok")
    with world_of_one(plan):
        engine = trained(tmp_path, plan)
        rows = unwrap(engine.chunks[0]).output_layer.weight.detach()[300:]
        rows.normal_(std=100.0, generator=torch.Generator().manual_seed(1))
        engine.optimizer.reload_model_params()
        engine.save(wait=True)
    words = ("generate", tmp_path / "run", "--prompt", "a", "--tokenizer", tmp_path / "tok")
    for drawing in ((), ("--temperature", "2", "--seed", "3")):
        done = megamoe(*words, "--max-tokens", "9", *drawing)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("a")
        [line] = said(done)
        assert ": 9 tokens in " in line


@pytest.mark.slow
def test_a_published_model_speaks_with_its_own_tokenizer(tmp_path):
    plan = plan_of(tmp_path, tiny.GROUPED)
    folder = byte_level(tmp_path / "published", {"tokenizer_config.json": CONFIG})
    with world_of_one(plan):
        trained(tmp_path, plan)
    to_hf(tmp_path / "run", tmp_path / "hf", dtype=None, shard_bytes=1 << 30, say=lambda _: None)
    for file in folder.iterdir():
        file.rename(tmp_path / "hf" / file.name)
    (tmp_path / "again").mkdir()
    write_plan(tmp_path / "again" / "plan.json", replace(plan, data=None))
    lines: list[str] = []
    from_hf(tmp_path / "hf", tmp_path / "again", tokens_seen=0, say=lines.append)
    command = f"megamoe data tokenizer import {tmp_path}/hf -o {tmp_path}/tok"
    assert any(command.replace(f"{tmp_path}/tok", "OUT") in line for line in lines)
    assert megamoe(*command.split()[1:]).returncode == 0
    tokenizer = load_tokenizer(tmp_path / "tok")
    expected, text = [], [270, *tokenizer.encode("a line")]
    with world_of_one(plan):
        model = opened(tmp_path, plan)
        for _ in range(5):
            logits_BSV = all_logits(model.module, torch.tensor([text + expected]))
            expected.append(int(logits_BSV[0, -1, : tokenizer.meta.vocab_size].argmax()))
    given = ("--tokenizer", tmp_path / "tok")
    done = megamoe(
        "generate", tmp_path / "again", "--prompt", "a line", "--max-tokens", "5", *given
    )
    spelt = tokenizer.decode([*tokenizer.encode("a line"), *expected])
    assert (done.returncode, done.stdout) == (0, spelt + "\n"), done.stderr
    (tmp_path / "some.txt").write_text(TEXT)
    done = megamoe("eval", "perplexity", tmp_path / "again", f"en={tmp_path}/some.txt", *given)
    assert done.returncode == 0, done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[:4] == ["all", "of", "en", str(len(tokenizer.encode(TEXT)))]


@pytest.mark.slow
def test_a_model_that_came_in_without_data_speaks_with_a_tokenizer_that_is_given(tmp_path):
    plan = plan_of(tmp_path, tiny.GROUPED)
    with world_of_one(plan):
        trained(tmp_path, plan)
    to_hf(tmp_path / "run", tmp_path / "out", dtype=None, shard_bytes=1 << 30, say=lambda _: None)
    (tmp_path / "again").mkdir()
    write_plan(tmp_path / "again" / "plan.json", replace(plan, data=None))
    from_hf(tmp_path / "out", tmp_path / "again", tokens_seen=0, say=lambda _: None)
    words = ("generate", tmp_path / "again", "--prompt", "a line", "--max-tokens", "3")
    done = megamoe(*words)
    [line] = said(done)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the run's plan has no data, so no tokenizer either; give --tokenizer DIR" in line
    tokenizer = Path(plan.data.folder) / "tokenizer"
    of_run = megamoe("generate", tmp_path / "run", *words[2:])
    given = megamoe(*words, "--tokenizer", tokenizer)
    assert of_run.stdout.startswith("a line")
    assert (given.returncode, given.stdout) == (0, of_run.stdout)
