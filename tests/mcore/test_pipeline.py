"""Written pipelines as Megatron-core takes them, and what it needs where a rank has few layers.

That they train the model of one process: test_parity_recipes.py and test_parity.py.
"""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megamoe.mcore.compat import HAS_HYBRID_MODEL
from megamoe.recipe.pipeline import written_chunks
from tests.mcore import tiny
from tests.mcore.world import train, world_of_one

LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
PIECES = st.sampled_from(["t", "t*3", "t*12,", "(tt|)*2t", "(t|t*2,|)*3tt", "t|t"])


@given(
    st.lists(PIECES, max_size=6),
    st.sampled_from(["L", "|L", "|mL", "t,m*2L", "|tm,L", "m|L", "|m*2|L"]),
)
def test_a_pipeline_is_read_as_megatron_core_reads_it(pieces, end):
    text = "E" + "".join(pieces) + end
    wanted = PipelineParallelLayerLayout.parse_str_to_list(text)
    chunks = tuple("".join(LETTERS[layer.name] for layer in chunk) for chunk in wanted)
    assert written_chunks(text, len(chunks), 1) == chunks


def test_megatron_still_adds_up_the_embedding_of_the_last_rank_whatever_it_has():
    """`Layout.ranks_with_table` says which ranks have one."""
    assert parallel_state.default_embedding_ranks([3, 5, 7, 9]) == [3, 9]


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="GPTModel does it, and has no HybridModel")
def test_megatron_still_wants_multi_token_prediction_with_the_output_layer():
    """`_losses_of_received` stands in, and an output layer beside the prediction is left out."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    assert "mtp_num_layers is not None and self.mtp_process" in inspect.getsource(
        HybridModel.forward
    )
    assert "if post_process or self.mtp_process:" in inspect.getsource(HybridModel.__init__)


@pytest.fixture
def engine(tmp_path):
    plan = tiny.tiny_plan(tmp_path / "data")
    with world_of_one(plan):
        yield train(plan, tmp_path, 2)


def test_a_part_without_a_weight_knows_the_step_of_the_others(engine):
    others, experts = engine.optimizer.chained_optimizers
    experts.optimizer.state.clear()  # as on a rank that holds the embedding alone
    groups = experts.state_dict()["optimizer"]["param_groups"]
    assert {group["step"] for group in groups} == {2.0}
    assert not experts.optimizer.state
    assert {group["step"] for group in others.state_dict()["optimizer"]["param_groups"]} == {2.0}


def test_megatron_still_wants_a_weight_in_every_part(engine):
    experts = engine.optimizer.chained_optimizers[1]
    experts.optimizer.state.clear()
    with pytest.raises(AssertionError):  # it looks for the one step that all weights have made
        type(experts).state_dict(experts)
