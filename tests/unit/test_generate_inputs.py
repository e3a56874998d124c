"""What `megamoe generate` and `megamoe eval` refuse before torch is loaded, and what they say."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.tokenizer import SPECIAL_TOKENS, Tokenizer, read_meta
from data_prep.tokenizer_train import train_tokenizer
from megamoe import __main__ as command
from megamoe.checkpoints.place import find_checkpoint
from megamoe.errors import CheckpointError, DataError, MegamoeError
from megamoe.generate.inputs import find_groups, find_texts, open_tokenizer
from megamoe.packages import require_packages
from megamoe.plan.build import Options, build_plan
from megamoe.plan.json import digest, write_plan
from megamoe.plan.plan import Data, Plan
from tests.unit import saved
from tests.unit.test_plan_build import CPU, RECIPE

ROOT = Path(__file__).parents[2]
PLAN = build_plan(RECIPE, CPU, Options())


def plan_with(folder: Path) -> Plan:
    data = Data(folder=str(folder), eod_id=2, pad_id=0, vocab_size=270, heldout=())
    return replace(PLAN, data=data)


@pytest.fixture
def run_dir(tmp_path):
    plan = plan_with(tmp_path / "data")
    (tmp_path / "run").mkdir()
    write_plan(tmp_path / "run" / "plan.json", plan)
    for tokens in (100, 200):
        progress = saved.progress(tokens, plan_digest=digest(plan))
        saved.save(tmp_path / "run" / "checkpoints", progress)
    return tmp_path / "run"


@pytest.fixture
def tokenizer_folder(tmp_path):
    train_tokenizer("byte-level-bpe", 270, ["some text, some text"] * 9, tmp_path / "tok")
    return tmp_path / "tok"


def test_a_run_folder_stands_for_its_latest_checkpoint(run_dir):
    place = find_checkpoint(run_dir)
    assert (place.checkpoint.name, place.segment) == ("000000000000200", place.plan.segments[0])


def test_a_checkpoint_stands_for_itself(run_dir, monkeypatch):
    place = find_checkpoint(run_dir / "checkpoints" / "000000000000100")
    assert place.progress.tokens_seen == 100
    monkeypatch.chdir(run_dir / "checkpoints" / "000000000000100")
    assert find_checkpoint(Path()).plan == place.plan


@pytest.mark.parametrize("name", ["", "missing", "run/checkpoints", "run/logs"])
def test_another_folder_is_refused(run_dir, tmp_path, name):
    with pytest.raises(CheckpointError, match="neither a run folder nor a checkpoint in one; give"):
        find_checkpoint(tmp_path / name)


def test_a_run_without_a_checkpoint_is_told_to_go_on(tmp_path):
    write_plan(tmp_path / "plan.json", PLAN)
    with pytest.raises(CheckpointError, match="has no checkpoint yet; `megamoe run"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_another_plan_is_refused(run_dir):
    write_plan(run_dir / "plan.json", replace(plan_with(run_dir), seed=99))
    with pytest.raises(CheckpointError, match="000200: belongs to another plan than"):
        find_checkpoint(run_dir)


def test_the_tokenizer_lies_in_the_data_folder(tmp_path, tokenizer_folder):
    (tmp_path / "data").mkdir()
    tokenizer_folder.rename(tmp_path / "data" / "tokenizer")
    tokenizer = open_tokenizer(plan_with(tmp_path / "data"), None)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.decode(tokenizer.encode("some 글")) == "some 글"


def test_a_tokenizer_elsewhere_is_given(tmp_path, tokenizer_folder):
    given = open_tokenizer(plan_with(tmp_path / "gone"), tokenizer_folder)
    assert given.meta == read_meta(tokenizer_folder)


def test_a_missing_tokenizer_is_named_with_a_remedy(tmp_path):
    with pytest.raises(
        DataError, match="gone/tokenizer: the run's tokenizer is not there; give --"
    ):
        open_tokenizer(plan_with(tmp_path / "gone"), None)


def test_a_tokenizer_of_other_ids_is_refused(tmp_path, tokenizer_folder):
    plan = plan_with(tmp_path)
    other = replace(plan, data=replace(plan.data, vocab_size=4_096))
    with pytest.raises(DataError, match="has 270 ids and 2 at the end of a document, the run's"):
        open_tokenizer(other, tokenizer_folder)
    assert plan.data.eod_id == SPECIAL_TOKENS.index("<|eod|>")


def test_a_run_without_data_is_told_to_give_a_tokenizer(tokenizer_folder):
    assert PLAN.data is None
    with pytest.raises(DataError) as caught:
        open_tokenizer(PLAN, None)
    assert str(caught.value) == (
        f"{PLAN.recipe}: the run's plan has no data, so no tokenizer either; give --tokenizer DIR, "
        "a folder that `megamoe data tokenizer train` or `import` has made"
    )
    assert open_tokenizer(PLAN, tokenizer_folder).meta == read_meta(tokenizer_folder)


@pytest.mark.parametrize("vocab_size", [269, 270, 271])
def test_without_data_a_tokenizer_has_at_most_the_ids_of_the_model(vocab_size, tokenizer_folder):
    plan = replace(PLAN, model=replace(PLAN.model, vocab_size=vocab_size))
    if vocab_size >= 270:
        open_tokenizer(plan, tokenizer_folder)
        return
    message = "tok: has 270 ids, the model 269; give the tokenizer that its text was made with"
    with pytest.raises(DataError, match=message):
        open_tokenizer(plan, tokenizer_folder)


def test_a_missing_package_is_named_with_what_brings_it():
    with pytest.raises(MegamoeError, match=r"'no_such', .*give `pip install megamoe\[train\]`"):
        require_packages("train", "sys", "no_such")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate RUN --prompt x --max-tokens 0", "--max-tokens 0 is no text; give 1 or more"),
        ("generate RUN --prompt x --top-p 0.9", "--top-p is about drawing tokens; add --temp"),
        ("generate RUN --prompt x --seed 1", "--seed is about drawing tokens; add --temp"),
        ("generate RUN --prompt x --temperature 0", "--temperature 0 is not above 0; give 0.8"),
        ("generate RUN --prompt x --temperature nan", "--temperature nan is not above 0"),
        ("generate RUN --prompt x --temperature 1 --top-p 0", "--top-p 0 is not a share; give"),
        ("generate RUN --prompt x --temperature 1 --top-p 2", "--top-p 2 is not a share; give"),
        ("generate RUN --prompt x", "data/tokenizer: the run's tokenizer is not there; give"),
        ("eval perplexity RUN x.txt --max-tokens 0", "--max-tokens 0 predicts nothing; give"),
        ("eval perplexity RUN x.txt --tokenizer TOK", "x.txt: no such file, folder or pattern"),
        ("eval perplexity RUN x.txt", "data/tokenizer: the run's tokenizer is not there; give"),
    ],
)
def test_a_mistake_is_one_line(run_dir, tokenizer_folder, capsys, words, message):
    given = {"RUN": str(run_dir), "TOK": str(tokenizer_folder)}
    assert command.main([given.get(word, word) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_commands_are_offered_without_torch():
    program = (
        "import sys; from megamoe.__main__ import main; main(['generate', '--help']); "
        "main(['eval', '--help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["empty", "empty.bin", "empty.idx"])
def test_a_shard_without_a_token_is_named(tmp_path, name):
    (tmp_path / "empty.bin").touch()
    (tmp_path / "empty.idx").write_bytes(b"an index")
    with pytest.raises(DataError, match=f"{name}: is a shard without a token; leave it out"):
        find_texts([str(tmp_path / name)])
    (tmp_path / "empty.bin").write_bytes(b"\0\0")
    assert find_texts([str(tmp_path / name)]) == [tmp_path / name]


def test_files_of_a_language_are_found_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a.txt", "b.txt", "books/c.txt", "books/d.txt", "ko=e.txt")
    Path("books").mkdir()
    for name in names:
        Path(name).write_text("text")
    words = ["korean=a.txt", "b.txt", "한국어=books", "korean=books/d*.txt", "ko=e.txt"]
    assert find_groups(words) == {
        "korean": [Path("a.txt"), Path("books/d.txt")],
        None: [Path("b.txt"), Path("ko=e.txt")],  # the last is a file's name
        "한국어": [Path("books/c.txt"), Path("books/d.txt")],
    }
    with pytest.raises(DataError, match=r"none\.txt: no such file, folder or pattern"):
        find_groups(["korean=none.txt"])
