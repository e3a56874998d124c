"""Pipelines as text: what is read, and what is refused with a line."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.errors import RecipeError
from megamoe.recipe import Mtp
from megamoe.recipe.check import FieldError
from megamoe.recipe.pipeline import even_chunks, written_chunks
from tests.unit.test_plan_build import GENERAL, RECIPE
from tests.unit.test_plan_layout import ONES

WITH_MTP = replace(RECIPE.model, mtp=Mtp(num_layers=1, ffn="dense"), tied_embeddings=False)


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("EttttL", ["EttttL"]),
        ("Et|tt|tmL", ["Et", "tt", "tmL"]),
        ("E|(tt|)*3mL", ["E", "tt", "tt", "tt", "mL"]),
        ("Et*3|(tt|)*29,t,m*2,L", ["Ettt", *["tt"] * 29, "tmmL"]),
        ("E(t|)*2(t*2|)*2t*10L", ["Et", "t", "tt", "tt", "ttttttttttL"]),
        ("E,t,|,L", ["Et", "L"]),
        ("Ettmm|L", ["Ettmm", "L"]),
        ("E|t*2|m|L", ["E", "tt", "m", "L"]),
    ],
)
def test_a_pipeline_is_read_as_megatron_core_reads_it(text, chunks):
    """What Megatron-core's own reader makes of it: tests/mcore/test_pipeline.py."""
    assert written_chunks(text, len(chunks), 1) == tuple(chunks)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Ett|xtL", "'Ett|xtL' has a 'x' that cannot be read; give 'even', or E, t, m, L with | "),
        ("evn", "'evn' has a 'e' that cannot be read; give 'even'"),
        ("E((t|)*2)*2L", "has a '(' that cannot be read"),
        ("E(t)*2*3|L", "has a '(' that cannot be read"),
        ("Et*0|ttL", "has a '*' that cannot be read"),
        ("Ett | tL", "has a ' ' that cannot be read"),
        ("", "'' has 1 chunks, and pp x vpp is 2; put 1 | into it, or give pp x vpp = 1"),
        (
            "Et|t|tL",
            "'Et|t|tL' has 3 chunks, and pp x vpp is 2; put 1 | into it, or give pp x vpp = 3",
        ),
        ("EtttL|", "'EtttL|' leaves chunk 2 of 2 empty; give it a layer"),
        (
            "ttE|tL",
            "'ttE|tL' is not in the order of the model; write E first, then t, then m, and L last",
        ),
        ("Et|Lt", "'Et|Lt' is not in the order of the model"),
        ("Et|mtL", "'Et|mtL' is not in the order of the model"),
        ("tt|tL", "'tt|tL' has 0 E, the embedding; write it once"),
        ("Et|EtL", "'Et|EtL' has 2 E, the embedding; write it once"),
        ("Et|tt", "'Et|tt' has 0 L, the output layer; write it once"),
        (
            "Ettm|mL",
            "'Ettm|mL' has m on 2 chunks, and each is computed from the one before; write them side",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(text, problem):
    with pytest.raises(FieldError, match=re.escape(problem)) as caught:
        replace(ONES, pp=2, pipeline=text)
    assert caught.value.field == "pipeline"
    assert "\n" not in str(caught.value)


def test_a_rank_has_no_second_copy_of_the_embedding():
    """It would with two ranks of two chunks; three, or one chunk with both, have one each."""
    with pytest.raises(
        FieldError, match=re.escape("has m on the rank that has E, in another chunk")
    ):
        replace(ONES, pp=2, vpp=2, pipeline="Et|t|tm|L")
    for pp, vpp, text, ranks in (
        (3, 2, "Et|t|t|t|m|L", (0, 1)),
        (2, 1, "Ettttm|L", (0,)),
        (3, 1, "Ett|tt|mL", (0, 2)),
        (2, 2, "Et|tt|t|mL", (0, 1)),
    ):
        layout = replace(ONES, pp=pp, vpp=vpp, pipeline=text)
        assert layout.ranks_with_table(WITH_MTP) == ranks
        both_ends = tuple(sorted({*ranks, pp - 1}))
        assert layout.ranks_with_table(replace(WITH_MTP, tied_embeddings=True)) == both_ends


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Et|ttL", "'Et|ttL' has 3 t, and model.num_layers is 4; write 4 t"),
        ("Ett|ttmL", "'Ett|ttmL' has 1 m, and model.mtp is None; write no m"),
    ],
)
def test_a_pipeline_of_another_model_is_refused_with_its_stage(text, problem):
    stage = replace(GENERAL, layout=replace(ONES, pp=2, pipeline=text))
    with pytest.raises(RecipeError) as caught:
        replace(RECIPE, stages=(stage,))
    assert str(caught.value) == f"general.layout.pipeline: {problem}"


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 2))
def test_layers_dealt_evenly_are_all_there_and_the_last_chunk_has_no_more(
    count, layers, predictions
):
    chunks = even_chunks(count, layers, predictions)
    if chunks is None:
        assert layers % count
        return
    whole = "E" + "t" * layers + "m" * predictions + "L"
    assert "".join(chunks) == whole
    assert written_chunks("|".join(chunks), count, 1) == chunks
    numbers = [chunk.count("t") for chunk in chunks]
    assert len(set(numbers[:-1])) <= 1
    assert 1 <= numbers[-1] <= numbers[0]
