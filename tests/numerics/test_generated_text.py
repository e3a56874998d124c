"""Tokens come one after another until the document ends, and spell whole characters."""

import pytest
import torch

from data_prep.tokenizer import Tokenizer, load_tokenizer
from data_prep.tokenizer_import import import_tokenizer
from data_prep.tokenizer_train import train_tokenizer
from megamoe.generate.text import TextStream, following
from tests.unit.test_data_tokenizer_import import sentencepiece

END = 2


@pytest.fixture(scope="module", params=[("byte-level-bpe", 280), ("sentencepiece-bpe", 310)])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"line {number} of a little text, here and there\n" for number in range(200)]
    train_tokenizer(*request.param, texts, folder)
    return load_tokenizer(folder)


def run(answers: list[int], max_tokens: int) -> tuple[list[int], list[list[int]]]:
    """Return what comes after a prompt, and what each step was given."""
    given: list[list[int]] = []

    def step(tokens: list[int]) -> torch.Tensor:
        given.append(tokens)
        return torch.nn.functional.one_hot(torch.tensor(answers[len(given) - 1]), 9).float()

    tokens = following([5, 6], step, lambda x: int(x.argmax()), max_tokens=max_tokens, end=END)
    return list(tokens), given


def test_the_prompt_is_read_once_and_each_token_after_it_alone():
    assert run([3, 4, 8], 3) == ([3, 4, 8], [[5, 6], [3], [4]])


@pytest.mark.parametrize("max_tokens", [3, 4, 9])
def test_the_end_token_ends_it_and_is_not_told(max_tokens):
    assert run([3, 4, END, 8], max_tokens) == ([3, 4], [[5, 6], [3], [4]])


def test_it_ends_before_the_end_token_when_there_are_enough():
    assert run([3, 4, END, 8], 2) == ([3, 4], [[5, 6], [3]])


@pytest.mark.parametrize(
    "text", ["a little text", "안녕, here 😀 and there\n\n  x", "é\ufffdé", " "]
)
def test_text_streams_in_whole_characters(tokenizer, text):
    stream = TextStream(tokenizer, ())
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text


def test_bytes_that_are_no_character_are_told_at_last(tokenizer):
    stream = TextStream(tokenizer, ())
    first_of_three = tokenizer.encode("가")[0]
    assert stream.add(first_of_three) == ""
    assert stream.finish() == "\ufffd"
    assert [stream.add(first_of_three) for _ in range(4)] == ["", "", "", "\ufffd" * 4]


@pytest.mark.parametrize("prompt", ["", "a prompt", " ", "0 "])
def test_spaces_stay_where_a_codec_drops_the_first(tmp_path, prompt):
    # As Llama's: a space is put before a text, and taken off again.
    imported = sentencepiece(tmp_path / "hf", {})
    import_tokenizer(imported, tmp_path / "tok", end_token=None, pad_token=None)
    tokenizer = load_tokenizer(tmp_path / "tok")
    for text in ("and so on", "글 😀 줄  and\n a line", "of</s>"):
        before = tokenizer.encode(prompt)
        whole = tokenizer.encode(prompt + text)
        assert whole[: len(before)] == before
        stream = TextStream(tokenizer, before)
        pieces = [stream.add(token) for token in whole[len(before) :]]
        expected = tokenizer.decode(whole).removeprefix(tokenizer.decode(before))
        assert "".join(pieces) + stream.finish() == expected
