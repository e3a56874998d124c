"""Each patch that lets Megatron-core run without CUDA is still needed, and touches nothing with it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import megatron.core
import pytest

from megamoe.mcore import cpu

MEGATRON = Path(megatron.core.__path__[0])
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the probes found, each in a process of its own."""
    folder = tmp_path_factory.mktemp("probe")
    command = [sys.executable, "-m", "tests.mcore.cpu_probe", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_torch_is_not_touched_where_there_is_cuda(answers):
    assert answers["with cuda"]["changed"] == []


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed")
def test_a_gpu_without_transformer_engine_has_what_stands_in_for_it(answers):
    assert answers["with cuda"] == {"changed": [], "uses transformer engine": False, "gemm": True}


def test_without_cuda_every_name_is_replaced_once(answers):
    found = answers["without cuda"]
    assert (found["unchanged"], found["again"]) == ([], [])


def test_a_device_that_is_named_for_a_block_holds_for_replaced_factories(answers):
    """transformers build on "meta"; without it a model they load has positions never written."""
    assert answers["without cuda"]["on meta"] == [True, True, True]


def test_with_all_patches_a_model_trains_and_saves(answers):
    assert answers["all patches"] == {"error": None}


@pytest.mark.parametrize("name", [patch.name for patch in cpu.PATCHES])
def test_without_one_patch_megatron_fails_unless_its_version_has_mended_that(answers, name):
    needed = {patch.name for patch in cpu.needed_patches()}
    fails = answers[name]["error"] is not None
    assert fails == (name in needed), f"{name}: mended or broken anew, see fixed_in"


@pytest.mark.parametrize("patch", cpu.needed_patches(), ids=lambda patch: patch.name)
def test_the_line_that_asks_for_a_patch_still_stands(patch):
    file, code = patch.needed_by.split(": ", 1)
    assert code in (MEGATRON / file).read_text(), f"{patch.name}: {file} no longer has {code!r}"
