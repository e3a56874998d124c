"""Published tokenizers become tokenizer folders: their own ids, and what they do with text."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.tokenize import Job
from data_prep.tokenizer import SPECIAL_TOKENS, FimIds, load_tokenizer, read_meta
from data_prep.tokenizer_import import Imported, import_tokenizer
from data_prep.tokenizer_train import train_tokenizer
from megamoe.errors import DataError
from tests.unit.test_data_cli import data
from tests.unit.test_data_tokenize import decoded, run

TEXTS = ["a line of text, 글 한 줄, and so on\n", "def f(x):\n    return x"] * 9
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<pad>")
FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")  # not marked special, as Qwen's are not
CONFIG = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<pad>", "special": True}}


def byte_level(folder: Path, beside: dict[str, object], added: tuple[str, ...] = FIM) -> Path:
    """Writes a folder whose special tokens are its last, as published ones are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.TemplateProcessing(  # nor is this ours to do
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 271)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return written(folder, "tokenizer.json", tokenizer.to_str().encode(), beside)


def sentencepiece(folder: Path, beside: dict[str, object], **options: object) -> Path:
    """Writes a folder as Llama's: `<s>` 1, `</s>` 2, a space before the text, no padding."""
    import sentencepiece

    model = io.BytesIO()
    chosen = {"byte_fallback": True, "minloglevel": 2, "num_threads": 1, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        **chosen,
    )
    return written(folder, "tokenizer.model", model.getvalue(), beside)


def written(folder: Path, name: str, model: bytes, beside: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(model)
    for other, fields in beside.items():
        (folder / other).write_text(json.dumps(fields))
    return folder


def imported(folder: Path, *, end: str | None = None, pad: str | None = None) -> Imported:
    return import_tokenizer(folder, folder.with_name("tok"), end_token=end, pad_token=pad)


def test_a_byte_level_tokenizer_keeps_its_ids(tmp_path):
    folder = byte_level(tmp_path / "hf", {"tokenizer_config.json": CONFIG})
    meta = imported(folder).meta
    assert meta == read_meta(tmp_path / "tok")
    assert (meta.format, meta.algorithm, meta.vocab_size) == (2, "huggingface", 276)
    assert (meta.eod_id, meta.pad_id, meta.bos_id) == (270, 272, None)
    assert meta.fim == FimIds(prefix=273, middle=274, suffix=275, eod=None)
    assert meta.special_tokens == dict(enumerate((*SPECIAL, *FIM), 270))
    assert (tmp_path / "tok/tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_its_text_comes_back_and_special_tokens_are_not_read_from_it(tmp_path):
    imported(byte_level(tmp_path / "hf", {"tokenizer_config.json": CONFIG}, (*FIM, "<think>")))
    tokenizer = load_tokenizer(tmp_path / "tok")
    for text in (*TEXTS[:2], "".join((*SPECIAL, *FIM, *SPECIAL_TOKENS)), "long " * 99):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.meta.special_tokens)
    assert tokenizer.encode("<think>") == [276]  # an ordinary token that was added
    # Ids below 8 are bytes here, and no special token of ours.
    assert (
        tokenizer.decode([0, 270, *tokenizer.encode("가"), 275]) == "!<|endoftext|>가<fim_suffix>"
    )


@pytest.mark.parametrize("name", ["tokenizer.model", ""])
def test_a_sentencepiece_tokenizer_keeps_its_ids(tmp_path, name):
    added = {"320": {"content": "<|im_start|>", "special": True}}
    beside = {
        "tokenizer_config.json": {"added_tokens_decoder": added},
        "added_tokens.json": {"<|im_end|>": 323},
        "config.json": {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": -1},
        "generation_config.json": {"eos_token_id": [323, 2]},
    }
    folder = sentencepiece(tmp_path / "hf", beside)
    made = import_tokenizer(folder / name, tmp_path / "tok", end_token=None, pad_token=None)
    meta = made.meta
    assert (meta.algorithm, meta.vocab_size, meta.fim) == ("sentencepiece", 324, None)
    assert (meta.eod_id, meta.pad_id, meta.bos_id) == (2, 1, 1)
    assert [(end.token, end.where) for end in made.ends] == [
        (2, "config.json"),
        (323, "generation_config.json"),
    ]
    named = {0: "<unk>", 1: "<s>", 2: "</s>", 320: "<|im_start|>", 323: "<|im_end|>"}
    assert meta.special_tokens == named
    tokenizer = load_tokenizer(tmp_path / "tok")
    for text in ("a line of text", " two  spaces", "글 😀 줄</s><|im_end|>"):
        assert not set(tokenizer.encode(text)) & set(named)
    assert tokenizer.decode([*tokenizer.encode("글 줄"), 2, 322, 323]) == "글 줄</s><|im_end|>"
    first, *others = tokenizer.encode("a line of text")
    assert tokenizer.decode_after([first], others) == "a line of text".removeprefix(
        tokenizer.decode([first])
    )


def test_its_own_end_is_taken_where_no_file_names_one(tmp_path):
    made = imported(sentencepiece(tmp_path / "hf", {}, pad_id=3))
    assert [(end.word, end.where) for end in made.ends] == [("</s>", "tokenizer.model")]
    assert made.meta.pad_id == 3


def test_tokens_that_are_given_come_first(tmp_path):
    folder = byte_level(tmp_path / "hf", {"tokenizer_config.json": CONFIG})
    meta = imported(folder, end="<|im_end|>", pad="<|endoftext|>").meta
    assert (meta.eod_id, meta.pad_id) == (271, 270)


def test_our_own_tokenizer_is_the_same_after_an_import(tmp_path):
    train_tokenizer("byte-level-bpe", 280, TEXTS, tmp_path / "own")
    (tmp_path / "own/config.json").write_text('{"eos_token_id": 2, "pad_token_id": 0}')
    own = load_tokenizer(tmp_path / "own")
    import_tokenizer(tmp_path / "own", tmp_path / "tok", end_token=None, pad_token=None)
    new = load_tokenizer(tmp_path / "tok")
    names = ("vocab_size", "eod_id", "pad_id", "fim", "sha256", "file", "special_tokens")
    assert all(getattr(new.meta, name) == getattr(own.meta, name) for name in names)
    assert new.encode(TEXTS[0]) == own.encode(TEXTS[0])


def test_text_that_could_be_a_special_token_is_refused(tmp_path):
    folder = sentencepiece(tmp_path / "hf", {}, user_defined_symbols=["<end>", *FIM])
    with pytest.raises(DataError) as caught:
        imported(folder, end="<end>")
    assert str(caught.value) == (
        f"{folder}/tokenizer.model: text can become <end> (--end-token), which documents may not "
        "hold; give another token, or a folder with tokenizer.json"
    )
    for word in ("a", "\u2581text"):
        with pytest.raises(DataError, match=rf"text can become {word} \(--pad-token\), which"):
            imported(folder, pad=word)
    assert imported(folder).meta.fim is None  # a document that spells them would be cut by them


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({}, "hf/tokenizer.json: no file says what ends a document; give --end-token TOKEN"),
        ({"config.json": []}, "hf/config.json: holds no JSON object"),
        ({"added_tokens.json": {"a": "b"}}, "hf: its added tokens have no words and ids: Value"),
    ],
)
def test_a_folder_that_says_too_little_is_refused(tmp_path, beside, message):
    folder = byte_level(tmp_path / "hf", beside)
    with pytest.raises(DataError) as caught:
        imported(folder)
    assert message in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model; give"
    ):
        imported(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"tokenizer\.model: SentencePiece cannot read it: "):
        imported(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"tokenizer\.json: `tokenizers` cannot read it: Model miss"
    ):
        imported(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not JSON: Expecting"):
        imported(tmp_path)
    with pytest.raises(DataError, match=r"make one of it with 'megamoe data tokenizer import /.*'"):
        read_meta(tmp_path)


def test_a_token_that_is_not_there_is_refused(tmp_path):
    folder = byte_level(tmp_path / "hf", {"tokenizer_config.json": CONFIG})
    with pytest.raises(
        DataError, match=r"--end-token '<x>' is no token of .*tokenizer\.json; give"
    ):
        imported(folder, end="<x>")


def job_of(folder: Path, fim: str | None) -> Job:
    return Job(
        tokenizer=folder.with_name("tok"),
        source="korean",
        out=folder.with_name("data"),
        heldout=None,
        fim=fim,
        seed=1,
        workers=1,
        replaces=False,
    )


def test_documents_end_with_its_own_token_and_are_cut_by_its_own(tmp_path):
    folder = byte_level(tmp_path / "hf", {"tokenizer_config.json": CONFIG})
    imported(folder)
    job = job_of(folder, "text")
    shards = run(job, TEXTS[:2]).shards
    assert decoded(job.out, shards.train) == [f"{text}<|endoftext|>" for text in TEXTS[:2]]
    for text in decoded(job.out, shards.fim):
        assert text.startswith("<fim_prefix><fim_suffix>")
        assert text.endswith("<|endoftext|>")
    entry = json.loads((job.out / "manifest.json").read_text())["tokenizer"]
    assert (entry["algorithm"], entry["eod_id"], entry["pad_id"]) == ("huggingface", 270, 272)
    imported(folder, end="<|im_end|>")
    with pytest.raises(
        DataError, match="made with 270 at the end of a document, 272 as padding and"
    ):
        run(replace(job, source="more"), TEXTS)


def test_infilling_without_its_tokens_is_refused(tmp_path):
    folder = sentencepiece(tmp_path / "hf", {})
    imported(folder)
    with pytest.raises(
        DataError, match="tok: has no tokens for fill-in-the-middle; leave --fim out"
    ):
        run(job_of(folder, "code"), TEXTS)


def test_padding_that_ends_documents_is_refused_for_data(tmp_path):
    folder = byte_level(tmp_path / "hf", {"tokenizer_config.json": {"eos_token": "<pad>"}})
    assert imported(folder).meta.pad_id == imported(folder).meta.eod_id
    with pytest.raises(DataError, match=r"pads with the token that ends documents, .* --pad-token"):
        run(job_of(folder, None), TEXTS)


def test_the_command_says_what_it_found(tmp_path, capsys):
    beside = {"tokenizer_config.json": CONFIG, "config.json": {"eos_token_id": 271}}
    folder = byte_level(tmp_path / "hf", beside)
    assert data("tokenizer", "import", folder, "-o", tmp_path / "tok") == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/tok: huggingface, 276 ids, sha256 ")
    assert others == [
        "end of a document: <|endoftext|> 270 (tokenizer_config.json)",
        "not <|im_end|> 271, which config.json names; --end-token takes it",
        "padding: <pad> 272",
        "fill-in-the-middle: 273, 274 and 275",
    ]
