"""Whatever is wrong with a recipe file is told in one line: where, what, and what would do.

The files are made from the published recipes by fixed rules: a typo in each keyword, a value of
another type, a negative, a zero or a huge number, a field left out, the file cut short, code where
data belongs; and contradictions written by hand.
"""

import ast
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamoe.__main__ import main
from megamoe.recipe.load import recipe_names

SOURCES = {name: path.read_text(encoding="utf-8") for name, path in recipe_names().items()}
KEYWORD = re.compile(r"^( +)(\w+)=(.+?),( *#.*)?$")
NUMBER = re.compile(r"^-?[\d_.]+(e-?\d+)?$")
MAY_BE_ZERO = {  # a range that starts at 0 or a default that allows it
    "num_dense_layers", "num_shared", "final", "warmup_tokens", "decay_tokens", "fim_rate",
    "aux_loss", "sequence_aux_loss", "global_aux_loss", "z_loss", "bias_update_rate", "beta1",
    "beta2", "weight_decay", "momentum", "bf16_first_layers", "bf16_last_layers",
    "mscale", "mscale_all_dim",
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A wrong recipe file and the words its error must have."""

    label: str
    text: str
    words: tuple[str, ...]


def keyword_lines(name: str) -> list[tuple[int, str, str]]:
    """Return (line from 0, field, value) of every keyword on a line of its own."""
    found = []
    for index, line in enumerate(SOURCES[name].splitlines()):
        if match := KEYWORD.match(line):
            found.append((index, match[2], match[3]))
    return found


def with_line(name: str, index: int, line: str | None) -> str:
    lines = SOURCES[name].splitlines()
    lines[index : index + 1] = [] if line is None else [line]
    return "\n".join(lines) + "\n"


def with_value(name: str, index: int, value: str) -> str:
    line = SOURCES[name].splitlines()[index]
    match = KEYWORD.match(line)
    assert match is not None
    return with_line(name, index, f"{match[1]}{match[2]}={value},")


def typo(field: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(field))
    if rng.random() < 0.5 and at + 1 < len(field) and field[at] != field[at + 1]:
        return field[:at] + field[at + 1] + field[at] + field[at + 2 :]
    return field[:at] + field[at] + field[at:]


def typos() -> list[Mutation]:
    rng, made = random.Random(1), []
    for name in SOURCES:
        # a typo in a short name, such as `cpp`, is as near to other names, and `bet1a` to beta2
        names = [line for line in keyword_lines(name) if len(line[1]) > 3]
        lines = [line for line in names if not line[1][-1].isdigit()]
        for index, field, value in rng.sample(lines, 20):
            wrong = typo(field, rng)
            line = SOURCES[name].splitlines()[index].replace(f"{field}=", f"{wrong}=", 1)
            words = (f"{wrong}: no such field", f"did you mean {field!r}?", f":{index + 1}: ")
            made.append(
                Mutation(f"typo {name} {wrong} {value[:9]}", with_line(name, index, line), words)
            )
    return made


def wrong_values() -> list[Mutation]:
    rng, made = random.Random(2), []
    for name in SOURCES:
        numbers = [line for line in keyword_lines(name) if NUMBER.match(line[2])]
        for index, field, _ in rng.sample(numbers, 30):
            wrong = rng.choice(("-3", "1e999", "'many'", "(1, 2)", "True", "AdamW", "10**40"))
            made.append(
                Mutation(f"value {name} {field}={wrong}", with_value(name, index, wrong), (field,))
            )
        positive = [line for line in numbers if line[1] not in MAY_BE_ZERO]
        for index, field, _ in rng.sample(positive, 8):
            made.append(Mutation(f"zero {name} {field}", with_value(name, index, "0"), (field,)))
        others = [
            line for line in keyword_lines(name) if line[2] in ("True", "False") or "'" in line[2]
        ]
        for index, field, _ in rng.sample(others, min(5, len(others))):
            made.append(Mutation(f"value {name} {field}=7", with_value(name, index, "7"), (field,)))
    return made


def missing_fields() -> list[Mutation]:
    rng, made = random.Random(3), []
    for name, source in SOURCES.items():
        needed = []
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                if call.func.id in ("replace", "Rope"):  # their fields may be left out
                    continue
                needed += [k for k in call.keywords if k.lineno == k.value.end_lineno]
        for keyword in rng.sample(needed, 10):
            text = with_line(name, keyword.lineno - 1, None)
            words = ("lacks", f"give {keyword.arg}=...")
            made.append(Mutation(f"missing {name} {keyword.arg} {keyword.lineno}", text, words))
    return made


def cut_short() -> list[Mutation]:
    made = []
    for name, source in SOURCES.items():
        for part in range(1, 10):
            text = source[: len(source.rstrip()) * part // 10]
            made.append(Mutation(f"cut {name} {part}0%", text, (".py:",)))
    return made


CODE_AT_TOP = {
    "import os": "imports 'os'",
    "import os, sys": "imports 'os, sys'",
    "from os import system": "imports from 'os'",
    "from megamoe.recipe import *": "one by one",
    "from megamoe.recipe import Stagee": "did you mean 'Stage'?",
    "from megamoe.recipe import Stage as S": "renames 'Stage'",
    "from megamoe.plan.plan import Plan": "imports from 'megamoe.plan.plan'",
    "def f(): return 1": "a function",
    "async def f(): pass": "a function",
    "class A: pass": "a class",
    "@GENERAL\ndef f(): pass": "a function",
    "for x in (1,): pass": "'for'",
    "if True: pass": "'if'",
    "with open('x') as f: pass": "'with'",
    "try:\n    pass\nexcept Exception:\n    pass": "'try'",
    "del RECIPE": "'delete'",
    "assert 1": "'assert'",
    "print('hello')": "calls 'print'",
    "exec('import os')": "calls 'exec'",
    "1 + 1": "operator",
    "X: int": "one name",
    "X = Y = 1": "one name",
    "(X, Y) = (1, 2)": "one name",
    "MODEL.num_layers = 5": "one name",
    "X += 1": "in place",
}
CODE_AS_VALUE = {
    "__import__('os').system('true')": "calls '....system'",
    "__import__('os')": "calls '__import__'",
    "open('/etc/passwd')": "calls 'open'",
    "eval('1')": "calls 'eval'",
    "().__class__": "'.__class__'",
    "().__class__.__bases__[0]": "subscript",
    "Stage.__init__": "a class or function",
    "(lambda: 1)()": "calls an expression",
    "lambda: 1": "a lambda",
    "[i for i in (1, 2)]": "a comprehension",
    "sum(i for i in (1, 2))": "calls 'sum'",
    "{1: 2 for i in (1,)}": "a comprehension",
    "(y := 5)": "an assignment :=",
    "f'{1}'": "an f-string",
    "[1, 2]": "a list",
    "{1, 2}": "a set",
    "{'a': 1}": "a dict",
    "(1, 2)[0]": "a subscript",
    "(*(1, 2),)": "a star",
    "1 if True else 2": "a condition",
    "1 < 2": "a comparison",
    "1 and 2": "and/or",
    "not 1": "other than minus",
    "7 % 4": "an operator",
    "1 << 9": "an operator",
    "2 ** 999": "an exponent",
    "10 ** 60": "a number beyond",
    "1 // 0": "zero",
    "(-8) ** 0.5": "a complex number",
    "b'bytes'": "bytes constant",
    "...": "ellipsis constant",
    "'a' * 9": "not a number",
    "'a' + 1": "two texts",
    "UNKNOWN": "'UNKNOWN' is not defined",
    "Stage": "give Stage(...)",
    "LearningRate(1, 2)": "without a name",
    "LearningRate(**X)": "**",
    "replace()": "replace has 0 objects",
    "replace(1, a=2)": "not a recipe object",
    "(" * 60 + "1" + ",)" * 60: "nested",
    "1" + " + 1" * 60: "nested",
    "9" * 5_000: "not valid Python",
    "'" + "x" * 11_000 + "'": "a text of 11,000 characters",
}


def code() -> list[Mutation]:
    source = SOURCES["vaetki_7b_a1b"]
    made = [
        Mutation(f"top {text[:20]!r}", source + text + "\n", (words,))
        for text, words in CODE_AT_TOP.items()
    ]
    for text, words in CODE_AS_VALUE.items():
        changed = source.replace("seq_len=4_096", f"seq_len={text}", 1)
        where = () if "Python" in words else ("general.seq_len: ",)
        made.append(Mutation(f"value {text[:20]!r}", changed, (words, *where)))
    return made


# (recipe, old text, new text, words of the error); the first occurrence is changed
CONTRADICTIONS = (
    ("vaetki_7b_a1b", "pp=4", "pp=25", ("general.layout.pp: ", "num_layers 24; give at most")),
    ("vaetki_7b_a1b", "vpp=1", "vpp=8", ("general.layout.pp: ", "num_layers 24; give at most")),
    ("vaetki_7b_a1b", "ep=8", "ep=7", ("general.layout.ep: ", "num_routed 64; give 4 or 8")),
    ("vaetki_7b_a1b", "ep=8", "ep=1_000", ("general.layout.ep: ", "num_routed 64; give 64")),
    ("keural_14b", "vpp=1", "vpp=2", ("stage_1.layout.vpp: ", "pp above 1")),
    ("vaetki_7b_a1b", "top_k=5", "top_k=65", ("model.experts.top_k: ", "num_routed 64")),
    ("vaetki_7b_a1b", "num_groups=1", "num_groups=5", ("model.experts.num_groups: ",)),
    ("vaetki_7b_a1b", "group_top_k=1", "group_top_k=2", ("model.experts.group_top_k: ",)),
    ("keural_14b", "expert_bias=False", "expert_bias=True", ("model.experts.expert_bias: ",)),
    ("keural_14b", "num_kv_heads=8", "num_kv_heads=7", ("model.attention.num_kv_heads: ",)),
    ("keural_14b", "head_dim=128", "head_dim=127", ("model.attention.head_dim: ", "odd")),
    ("vaetki_7b_a1b", "qk_rope_head_dim=64", "qk_rope_head_dim=63", ("qk_rope_head_dim: ", "odd")),
    ("vaetki_7b_a1b", "num_dense_layers=1", "num_dense_layers=24", ("model.num_dense_layers: ",)),
    ("vaetki_7b_a1b", "num_dense_layers=1", "num_dense_layers=0", ("model.dense_ffn_dim: ",)),
    ("keural_14b", "num_dense_layers=0", "num_dense_layers=1", ("model.dense_ffn_dim: ",)),
    ("vaetki_7b_a1b", '"LLLLLG"', '"LLXLLG"', ("model.window_pattern: ", "LLXLLG")),
    ("vaetki_7b_a1b", '"LLLLLG"', '"GGGGGG"', ("model.window: ", "give None")),
    ("vaetki_7b_a1b", "window=512", "window=None", ("model.window: ", "number of keys")),
    ("vaetki_7b_a1b", '"LLLLLG"', '"L"', ("model.global_rope: ", "give None")),
    ("vaetki_7b_a1b", 'score="sigmoid"', 'score="sigmod"', ("score: ", "did you mean 'sigmoid'?")),
    ("vaetki_7b_a1b", "final=1e-4", "final=3e-4", ("reasoning.lr.final: ", "above peak")),
    ("vaetki_7b_a1b", "final=None", "final=1e-4", ("general.lr.final: ", "contradicts")),
    ("vaetki_7b_a1b", "(0, 1_984)", "(5, 1_984)", ("general.batch_ramp: ", "start at 0")),
    ("vaetki_7b_a1b", "(0, 1_984)", "(0, 0)", ("general.batch_ramp: ", "under 1")),
    ("vaetki_7b_a1b", "(0, 1_984)", "(0, 1.5)", ("general.batch_ramp[0][1]: ", "int")),
    ("vaetki_7b_a1b", "(0, 1_984)", "0", ("general.batch_ramp[0]: ", "tuple")),
    ("vaetki_7b_a1b", "(300_000_000_000,", "(100_000_000_000,", ("general.batch_ramp: ", "ascend")),
    ("vaetki_7b_a1b", "(300_000_000_000,", "(9_000_000_000_000,", ("general.batch_ramp: ", "beyond")),
    ("vaetki_7b_a1b", '("korean", 0.2)', '("korean", 0.0)', ("general.mixture: ", "'korean'")),
    ("vaetki_7b_a1b", '("korean", 0.2)', '("code", 0.2)', ("general.mixture: ", "twice")),
    ("vaetki_7b_a1b", '("korean", 0.2)', '"korean"', ("general.mixture[0]: ",)),
    ("vaetki_7b_a1b", "fim_rate=0.6", "fim_rate=60", ("reasoning.fim_rate: ", "at most 1")),
    ("vaetki_7b_a1b", "mtp_loss=None", "mtp_loss=0.1", ("general.mtp_loss: ", "give None")),
    ("k_exaone_236b_a23b", "mtp_loss=0.05", "mtp_loss=None", ("foundation.mtp_loss: ", "weight")),
    ("vaetki_7b_a1b", "bias_update_rate=0.0", "bias_update_rate=1e-3", ("general.router.bias_update_rate: ",)),
    ("k_exaone_236b_a23b", "rope_interpolation=1.0", "rope_interpolation=8.0", ("foundation.rope_interpolation: ",)),
    ("ax_k1_519b_a33b", "rope_interpolation=1.0", "rope_interpolation=8.0", ("general.rope_interpolation: ", "YaRN", "give 1")),
    ("ax_k1_519b_a33b", "beta_slow=1.0", "beta_slow=64.0", ("model.global_rope.yarn.beta_slow: ", "beta_fast 32")),
    ("ax_k1_519b_a33b", '("mtp", "expert_bias")', '("mtp", "mtp")', ("published.unreleased: ", "named twice", "leave it out")),
    ("vaetki_7b_a1b", 'name="reasoning"', 'name="general"', ("stages: ", "twice")),
    ("vaetki_7b_a1b", 'name="reasoning"', 'name="model"', ("stages: ", "'model' is taken")),
    ("vaetki_7b_a1b", 'name="reasoning"', 'name="source"', ("stages: ", "'source' is taken")),
    ("vaetki_7b_a1b", 'name="reasoning"', 'name="two words"', ("name: ", "plain word")),
    ("vaetki_7b_a1b", 'name="vaetki_7b_a1b"', 'name="../up"', ("name: ", "plain word")),
    ("vaetki_7b_a1b", "vocab_size=135_168", "vocab_size=140_000", ("tokenizer.vocab_size: ", "137,216")),
    ("vaetki_7b_a1b", "(GENERAL, REASONING, LONG_CONTEXT)", "()", ("stages: ", "at least one")),
    ("vaetki_7b_a1b", "(GENERAL, REASONING, LONG_CONTEXT)", "GENERAL", ("stages: ", "tuple")),
    ("vaetki_7b_a1b", "(GENERAL, REASONING, LONG_CONTEXT)", "(GENERAL, 5)", ("stages[1]: ", "Stage")),
    ("vaetki_7b_a1b", "(GENERAL, REASONING, LONG_CONTEXT)", "(GENERAL, REASONNG)", ("did you mean 'REASONING'?",)),
    ("vaetki_7b_a1b", "decay_tokens=550_000_000_000", "decay_tokens=560_000_000_000", ("reasoning.lr: ",)),
    ("vaetki_7b_a1b", "tokens=1_300_000_000_000", "tokens=1.3e12", ("general.tokens: ", "1_300_000_000_000")),
    ("vaetki_7b_a1b", '"general.mixture"', '"general.mixtur"', ("assumed: ", "'general.mixture'")),
    ("vaetki_7b_a1b", '"optimizer"', '"optimiser"', ("assumed: ", "did you mean 'optimizer'?")),
    ("vaetki_7b_a1b", '"optimizer",\n', "5,\n", ("assumed[", "str")),
    ("vaetki_7b_a1b", "RECIPE =", "RECEIPT =", ("no RECIPE", "'RECEIPT'")),
    ("vaetki_7b_a1b", "RECIPE = Recipe(", "RECIPE = GENERAL\nX = Recipe(", ("RECIPE: Stage(...) is not a Recipe",)),
    ("vaetki_7b_a1b", "    MLA,\n", "", ("model.attention: calls 'MLA'", "import it")),
    ("vaetki_7b_a1b", "    MLA,\n", "    MLAA,\n", ("no 'MLAA'", "did you mean 'MLA'?")),
    ("vaetki_7b_a1b", "attention=MLA(", "attention=Rope(", ("model.attention.num_heads: no such field in Rope",)),
    ("vaetki_7b_a1b", "attention=MLA(", "attention=MAL(", ("calls 'MAL'", "did you mean 'MLA'?")),
    ("vaetki_7b_a1b", "replace(\n    GENERAL,", "replace(\n    GENRAL,", ("did you mean 'GENERAL'?",)),
    ("vaetki_7b_a1b", "GENERAL.layout", "GENERAL.layuot", ("did you mean 'layout'?",)),
    ("vaetki_7b_a1b", "beta1=0.9,", "beta1=0.9, beta1=0.8,", ("optimizer.beta1: given twice",)),
)  # fmt: skip


def contradictions() -> list[Mutation]:
    made = []
    for name, old, new, words in CONTRADICTIONS:
        assert old in SOURCES[name], old
        text = SOURCES[name].replace(old, new, 1)
        made.append(Mutation(f"{name} {new[:40]!r} for {old[:20]!r}", text, words))
    return made


MUTATIONS = [*typos(), *wrong_values(), *missing_fields(), *cut_short(), *code(), *contradictions()]


def check_one_line(capsys: pytest.CaptureFixture[str], path: str | Path) -> str:
    """Return the error that `megamoe recipe check` prints, having made sure that it is one line."""
    status = main(["recipe", "check", str(path)])
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("megamoe: error: ")
    assert "Traceback" not in printed.err
    return printed.err


def test_there_are_hundreds_of_wrong_files():
    assert len(MUTATIONS) >= 300


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.label)
def test_a_wrong_file_is_told_in_one_line(
    mutation: Mutation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "wrong.py"
    path.write_text(mutation.text, encoding="utf-8")
    message = check_one_line(capsys, path)
    assert message.startswith(f"megamoe: error: {path}:"), message
    for words in mutation.words:
        assert words in message, message


JUNK = {
    "random": random.Random(4).randbytes(3_000),
    "utf-16": SOURCES["keural_14b"].encode("utf-16"),
    "latin-1": 'X = "é"\n'.encode("latin-1"),
    "null": b"X = 1\n\0\n",
    "elf": b"\x7fELF\x02\x01\x01" + bytes(64),
    "empty": b"",
    "spaces": b" \n\t\n",
    "comment": b"# nothing\n",
    "yaml": b"model:\n  num_layers: 24\n",
    "json": b'{"model": {"num_layers": 24}}',
    "deep": b"(" * 100_000,
    "minus": b"X = " + b"-" * 100_000 + b"1\n",
    "sum": b"X = 1" + b" + 1" * 100_000 + b"\n",
    "dots": b"X = X" + b".a" * 100_000 + b"\n",
    "doubling": b"A = (1, 1)\n" + b"A = (A, A)\n" * 60,
    "chain": b"A = (1,)\n" + b"A = (A,)\n" * 3_000,
    "long": b"#" * 1_100_000,
}


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK)
def test_a_file_that_is_no_recipe_is_told_in_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "junk.py"
    path.write_bytes(content)
    assert str(path) in check_one_line(capsys, path)


def test_a_huge_file_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "huge.py"
    with path.open("wb") as file:
        file.truncate(10**9)
    assert "1,000,000,000 bytes" in check_one_line(capsys, path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("vaetki_7b", "did you mean 'vaetki_7b_a1b'?"),
        ("keural-14b", "did you mean 'keural_14b'?"),
        ("", "known: "),
        ("model_configs/keural.py", "did you mean 'keural_14b'?"),
        ("none/such.py", "no such file"),
        ("/dev/zero", "no such file"),
        ("a\0b.py", "no such file"),
        ("x" * 5_000 + ".py", "x"),
    ],
)
def test_a_missing_recipe_is_told_with_the_nearest(
    given: str, words: str, capsys: pytest.CaptureFixture[str]
):
    assert words in check_one_line(capsys, given)


def test_a_folder_is_not_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "is a folder" in check_one_line(capsys, f"{tmp_path}/")


@pytest.mark.parametrize(("old", "new"), [("fim_rate=0.6", "fim_rate=6.0"), ("ep=8", "ep=7")])
def test_an_error_names_the_line_of_the_value(tmp_path, capsys, old, new):
    source, path = SOURCES["vaetki_7b_a1b"], tmp_path / "line.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    line = next(i for i, text in enumerate(source.splitlines(), 1) if old in text)
    told = check_one_line(capsys, path).partition(f"{path}:{line}: ")[2]
    assert f".{new.replace('=', ': ')} " in told


def test_a_value_that_the_recipe_does_not_use_is_checked_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "unused.py"
    extra = "\nSPARE = replace(GENERAL, name='spare', seq_len=-1)\n"
    path.write_text(SOURCES["vaetki_7b_a1b"] + extra, encoding="utf-8")
    assert "spare.seq_len: -1 is out of range" in check_one_line(capsys, path)
