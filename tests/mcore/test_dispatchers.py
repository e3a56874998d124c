"""Dispatchers as Megatron-core's options, and what is used where a library is absent.

DeepEP and HybridEP themselves need GPUs, which no test here has. Their place is taken by modules of the
same names: empty ones where they are only looked up, and torch over gloo (deep_ep_stand_in.py) where
Megatron-core's own dispatchers are to call them.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from megatron.core.transformer.moe import fused_a2a

from megamoe.mcore.config import transformer_config
from megamoe.mcore.dispatchers import dispatcher_options, missing, settle_dispatcher
from megamoe.mcore.engine import Engine
from tests.mcore import tiny
from tests.mcore.test_parity_recipes import GRADIENT
from tests.mcore.world import with_segment, world_of_one

REPOSITORY = Path(__file__).parents[2]
TRANSLATED = {
    "all_gather": (
        "allgather",
        "deepep",
    ),  # the second is what Megatron-core has without being asked
    "all_to_all": ("alltoall", "deepep"),
    "deepep": ("flex", "deepep"),
    "hybridep": ("flex", "hybridep"),
}


def planned(folder, dispatcher, device="cpu", **axes):
    layout = replace(tiny.LAYOUT, dispatcher=dispatcher, **axes)
    plan = with_segment(tiny.tiny_plan(folder / "data"), layout=layout)
    return replace(plan, cluster=replace(plan.cluster, device=device))


@pytest.fixture
def library(monkeypatch):
    """A function that puts names where Megatron-core imports them from: an empty deep_ep."""

    def put(package, utils):
        for name, attributes in (("deep_ep", package), ("deep_ep.utils", utils)):
            module = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, object)
            monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.mark.parametrize("dispatcher", TRANSLATED)
@pytest.mark.parametrize("axes", [{"ep": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 2, "etp": 2}])
def test_megatron_takes_the_translation_of_each_dispatcher(tmp_path, dispatcher, axes):
    """By the checks of its own configuration; a deprecated option would be a warning, so an error."""
    plan = planned(tmp_path, dispatcher, **axes)
    config = transformer_config(plan, plan.segments[0])
    found = (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend)
    assert found == TRANSLATED[dispatcher]
    assert config.moe_router_dtype == "fp32", "all that the libraries send weights in"
    assert config.moe_expert_capacity_factor is None


def test_megatron_refuses_what_does_not_go_with_the_option(tmp_path):
    plan = planned(tmp_path, "deepep", ep=2)
    config = transformer_config(plan, plan.segments[0])
    config.moe_expert_capacity_factor, config.moe_pad_expert_input_to_capacity = 1.0, True
    config.moe_router_load_balancing_type, config.moe_aux_loss_coeff = "aux_loss", 0.0
    with pytest.raises(ValueError, match="deepep backend does not support"):
        config.__post_init__()


@pytest.mark.parametrize("dispatcher", TRANSLATED)
def test_where_a_rank_has_all_experts_no_library_is_asked_for(tmp_path, dispatcher):
    assert dispatcher_options(replace(tiny.LAYOUT, dispatcher=dispatcher)) == {
        "moe_token_dispatcher_type": "alltoall"
    }
    plan = planned(tmp_path, dispatcher, device="cuda", tp=2)
    assert settle_dispatcher(plan, plan.segments[0]) == (plan.segments[0], ())


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_without_a_gpu_a_run_uses_all_to_all_and_says_so(tmp_path, dispatcher):
    plan = planned(tmp_path, dispatcher, ep=2)
    segment, notes = settle_dispatcher(plan, plan.segments[0])
    assert segment.layout == replace(plan.segments[0].layout, dispatcher="all_to_all")
    assert notes == (
        f"general: dispatcher {dispatcher}: package deep_ep needs a GPU; all_to_all is used "
        "instead, with the same result",
    )


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="it is installed")
@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_a_library_that_is_absent_is_named(tmp_path, dispatcher):
    plan = planned(tmp_path, dispatcher, device="cuda", ep=2)
    with world_of_one(tiny.tiny_plan(tmp_path / "data")):
        segment, notes = settle_dispatcher(plan, plan.segments[0])
    assert segment.layout.dispatcher == "all_to_all"
    assert notes == (
        f"general: dispatcher {dispatcher}: rank 0: package deep_ep cannot be imported (No module "
        "named 'deep_ep'); all_to_all is used instead, with the same result",
    )


def test_a_library_that_is_there_is_used(tmp_path, library):
    library(["Buffer", "HybridEPBuffer"], ["EventHandle", "EventOverlap"])
    for dispatcher in ("deepep", "hybridep"):
        plan = planned(tmp_path, dispatcher, device="cuda", ep=2)
        with world_of_one(tiny.tiny_plan(tmp_path / "data")):
            assert settle_dispatcher(plan, plan.segments[0]) == (plan.segments[0], ())


@pytest.mark.parametrize(
    ("package", "utils", "lacks"),
    [
        # DeepEP 1.2: no HybridEP; 2.1: EventOverlap is elsewhere; the branch hybrid-ep has all.
        (["Buffer"], ["EventHandle", "EventOverlap"], (None, "has no HybridEPBuffer in deep_ep")),
        (["Buffer"], ["EventHandle"], ("has no EventOverlap in deep_ep.utils", "has no Hybrid")),
        (["Buffer", "HybridEPBuffer"], ["EventHandle", "EventOverlap"], (None, None)),
    ],
)
def test_we_find_in_a_library_what_megatron_finds(library, package, utils, lacks):
    library(package, utils)
    spec = importlib.util.spec_from_file_location("fused_a2a_anew", fused_a2a.__file__)
    megatrons = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(megatrons)
    found = (megatrons.HAVE_DEEP_EP, megatrons.HAVE_HYBRIDEP)
    assert found == tuple(each is None for each in lacks)
    for dispatcher, problem in zip(("deepep", "hybridep"), lacks, strict=True):
        assert problem == missing(dispatcher) or problem in missing(dispatcher)


def test_a_run_says_nothing_where_it_does_as_it_is_told(tmp_path):
    plan = planned(tmp_path, "deepep")
    with world_of_one(plan):
        engine = Engine(plan, plan.segments[0], tmp_path / "run")
    assert engine.notes == ()
    assert engine.segment == plan.segments[0]


@pytest.fixture(scope="module")
def ranks():
    """What the four ranks of flex_probe.py found."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.mcore.flex_probe"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("dispatcher", "name"),
    [
        ("all_to_all", "MoEAlltoAllTokenDispatcher"),
        ("all_gather", "MoEAllGatherTokenDispatcher"),
        ("deepep", "_DeepepManager"),
        ("hybridep", "_HybridEPManager"),
    ],
)
def test_our_experts_behind_each_of_megatrons_dispatchers_have_the_same_gradients(
    ranks, dispatcher, name
):
    """tp 2, ep 2, etp 2; Megatron-core's code of both libraries, on stand-ins for the libraries."""
    for rank in ranks:
        found = rank[dispatcher]
        assert found["names"] == [name]
        assert found["without a gradient"] == []
        assert found["difference"] <= GRADIENT


def test_one_rank_that_lacks_the_library_decides_for_all(ranks):
    for rank in ranks:
        assert rank["notes"] == []
        assert rank["dispatcher where rank 2 has none"] == "all_to_all"
        [note] = rank["notes where rank 2 has none"]
        assert "deepep: rank 2: package deep_ep has no Buffer in deep_ep; all_to_all" in note


def test_one_rank_that_lacks_a_kernel_of_a_ring_decides_for_all(ranks):
    """Each would choose by itself how to attend together, and wait for ranks that do it otherwise."""
    for rank in ranks:
        assert rank["has ring kernel"]
        assert not rank["has ring kernel where rank 2 has none"]
