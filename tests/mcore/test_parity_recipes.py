"""Every recipe is the same model in every layout, by `megamoe parity`: the command, as a user gives it.

A few layouts of each recipe in `make test`; all of them in `make parity`.
"""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from megamoe.parity.layouts import DEFAULT, Grid, parse_layouts
from megamoe.parity.small import small_recipe
from megamoe.recipe.load import load_recipe, recipe_names

REPOSITORY = Path(__file__).parents[2]
FIVE = "tp2xpp2xcp2xep2xdp2"  # all axes above one, on 16 processes

# Layouts differ in the order of float32 sums: heads and MLP rows over tp, experts and layers over
# the others; sums over tokens are float64. On the longest way from a token to its loss and back are
# some 3 * 1,800 additions (`roundings` in test_model.py). Their roundings, 2^-24 each, are a random
# walk: within 4 standard deviations, 4 * sqrt(3 * 1800) * 2^-24 = 2e-5.
GRADIENT = 2e-5
# The same walk with 2^-53 is 3e-14; a product of matrices of another shape adds up in another order.
DOUBLE = 1e-10

# Recipes that are another's at the smallest scale; one of them is compared.
SAME = {"vaetki_100b_a10b": "vaetki_20b_a2b"}
FAST = {
    "vaetki_7b_a1b": "dp2,pp2,cp4xring,tp2xcp2xep2",
    "vaetki_20b_a2b": "tp2,cp2xep2",
    "k_exaone_236b_a23b": "ep2xpp2,dp2xpp2xep2,cp2xring,pp3xE|ttt|tmL,pp3xEtt|ttm|L,"
    "tp2xpp2xvpp2xcp2xep2xetp2xheads",
    "keural_14b": "tp2xcp2,pp3xE|tttt|L,ep2xall_gather",
    "ax_k1_519b_a33b": "tp2xep2xetp2,pp2xvpp2xEt|t|tt|mL",
}
# All of DEFAULT, but its layout of 8 processes is for one recipe of each kind of attention: FIVE has
# the same axes.
EIGHT = "tp2xpp2xcp2xep2"
ALL = ",".join(layout for layout in DEFAULT.split(",") if layout != EIGHT) + f",{FIVE}"
# Beyond it: ways to attend together, of which "auto" takes "gather" for so small a model, and to reach
# experts, and what chunks of a pipeline hold: embedding, multi-token prediction and output layer alone,
# uneven layers, no decoder layer.
MORE = {
    "vaetki_7b_a1b": f"{EIGHT},{FIVE}xheads,cp2xring,tp2xcp2xheads,dp2xtp2xpp2xvpp2xcp2xep2xring,"
    "pp3xE|tttt|L,pp2xvpp2xEt|tt|t|L",
    "vaetki_20b_a2b": "cp2xheads,tp2xcp2xring,tp2xpp2xcp2xetp2xall_gatherxheadsxEtt|ttL",
    "k_exaone_236b_a23b": f"{EIGHT},tp4,tp4xcp2xring,cp2xheads,cp2xring,tp2xetp2,tp2xep2xetp2,tp2xcp2xep8,"
    "tp2xcp2xetp2,tp2xep2xetp2xall_gather,dp2xpp2xep2xall_gather,tp2xpp2xvpp2xcp2xep2xetp2xheads,"
    "pp3xEt|ttt|mL,pp2xvpp2xE|tt|tt|mL,tp2xpp2xcp2xE|ttttmL,tp2xpp2xcp2xetp2xringxEtt|ttmL,"
    "pp2xEttttm|L,pp4xE|tttt|m|L,tp2xpp3xcp2xEtt|ttm|L",
    "keural_14b": "pp3xEt|ttt|L,pp2xvpp2xE|tt|tt|L,dp2xpp2xvpp2xep2,cp2xheads",
    "ax_k1_519b_a33b": "cp4xring,dp2xpp2xcp2xring,dp2xcp2xep2xheads,pp2xcp2xep2xheads,cp2xep2xringxall_gather,"
    "pp2xvpp2xcp2xep2xgatherxall_gather,pp3xE|tttt|mL,dp2xpp3xep2xE|ttt|tmL,dp2xpp3xep2xE|ttttm|L",
}
FULL = {
    name: f"{ALL},{MORE[name]}" if name in MORE else ALL
    for name in recipe_names()
    if name not in SAME
}
# With documents apart: what ranks know of them must be the same on all axes.
PACKED = {"k_exaone_236b_a23b": "pp2xcp2"}
PACKED_FULL = {
    "k_exaone_236b_a23b": "tp2,tp4,pp2xvpp2,cp4,cp2xheads,cp2xring,pp3xcp2xEtt|ttm|L",
    "vaetki_7b_a1b": "cp4,cp2xheads,tp2xpp2xcp2xep2",
    "ax_k1_519b_a33b": "tp2xcp2xep2",
    "keural_14b": "cp2",
}
IN_FLOAT64 = {
    "vaetki_7b_a1b": "ep4,cp4xring,cp2xheads,tp2xcp2xep2",
    "vaetki_20b_a2b": EIGHT,
    "k_exaone_236b_a23b": "tp2,pp2xvpp2,tp2xcp2xep2,dp2xpp2xep2,pp3xcp2xEtt|ttm|L",
    "keural_14b": "pp2,tp2xcp2",
    "ax_k1_519b_a33b": "cp2,tp2xep2xetp2",
}


def cases(matrix: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, layout) for name, layouts in matrix.items() for layout in layouts.split(",")]


def parity(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    on_the_processor = ("env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-W", "ignore")
    command = [*on_the_processor, "-m", "megamoe", "parity", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A function that compares a recipe's layouts once, and returns what was found by layout."""
    folder = tmp_path_factory.mktemp("parity")

    @cache
    def compared(name: str, layouts: str, dtype: str = "float32", *others: str) -> dict[str, dict]:
        file = folder / f"{name}-{dtype}{''.join(others)}.json"
        options = ("--layouts", layouts, "--dtype", dtype, "--json", str(file), *others)
        done = parity(folder, name, *options)
        assert file.exists(), done.stderr
        record = json.loads(file.read_text())
        assert record["device"] == "CPU"
        found = {row["layout"]: row for row in record["rows"]}
        assert done.returncode == (0 if all(row["is_equal"] for row in found.values()) else 1)
        return found

    return compared


def check(row: dict, bound: float) -> None:
    assert row["error"] is None
    found = row["comparison"]
    assert found["beyond"] == []
    assert found["tensors"].keys() == {"gradient", "adam", "weight"}
    for worst in found["tensors"].values():
        assert worst["difference"] <= bound, worst["name"]
    for name, difference in found["measured"].items():
        assert difference <= bound, name
    has_mtp = load_recipe(row["recipe"]).recipe.model.mtp is not None
    assert ("mtp_loss" in found["measured"]) == has_mtp
    aux = {"aux_loss", "sequence_aux_loss", "global_aux_loss", "z_loss"}
    assert aux | {"loss", "grad_norm"} <= found["measured"].keys()


@pytest.mark.parametrize(("name", "other"), SAME.items())
def test_a_recipe_that_is_not_compared_is_one_that_is_but_for_its_name(name, other):
    ours, compared = small_recipe(name), small_recipe(other)
    said = {key: getattr(ours, key) for key in ("name", "source", "assumed")}
    assert replace(compared, **said) == ours
    assert other in FAST
    assert other in FULL


def features(grid: Grid) -> set[str]:
    """Return the axes above one of a layout, and what else of it makes ranks talk."""
    layout = grid.layout
    found = {axis for axis in ("tp", "pp", "vpp", "cp", "ep", "etp") if getattr(layout, axis) > 1}
    if grid.world_size > layout.tp * layout.pp * layout.cp:
        found.add("dp")
    if layout.cp > 1:
        found.add("gather" if layout.cp_scheme == "auto" else layout.cp_scheme)
    if layout.dispatcher != "all_to_all":
        found.add(layout.dispatcher)
    if layout.pipeline != "even":
        found.add("written")
    return found


def test_every_axis_and_scheme_is_compared_together_with_every_other():
    """Two that are right alone may not be together."""
    together = [
        features(grid)
        for layouts in FULL.values()
        for grid in parse_layouts(layouts, micro_batch=2)
    ]
    schemes, others = {"heads", "ring", "gather"}, {"all_gather", "written"}
    every = {"tp", "pp", "vpp", "cp", "ep", "etp", "dp"} | schemes | others
    missing = [
        pair
        for pair in combinations(sorted(every), 2)
        if not set(pair) <= schemes and not any(set(pair) <= found for found in together)
    ]
    assert missing == []


@pytest.mark.parametrize(("name", "layout"), cases(FAST))
def test_a_layout_trains_the_model_of_one_process(rows, name, layout):
    check(rows(name, FAST[name])[layout], GRADIENT)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), cases(FULL))
def test_every_layout_of_every_recipe_trains_the_model_of_one_process(rows, name, layout):
    check(rows(name, FULL[name])[layout], GRADIENT)


@pytest.mark.parametrize(("name", "layout"), cases(PACKED))
def test_a_layout_keeps_documents_apart_as_one_process_does(rows, name, layout):
    check(rows(name, PACKED[name], "float32", "--document-mask")[layout], GRADIENT)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), cases(PACKED_FULL))
def test_every_axis_keeps_documents_apart_as_one_process_does(rows, name, layout):
    found = rows(name, PACKED_FULL[name], "float32", "--document-mask")
    check(found[layout], GRADIENT)


def assert_no_bit_differs(row: dict) -> None:
    found = row["comparison"]["tensors"]
    assert [worst["difference"] for worst in found.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parity
@pytest.mark.parametrize("name", FULL)
def test_data_parallelism_changes_no_bit_of_any_recipe(rows, name):
    assert_no_bit_differs(rows(name, FULL[name])["dp2"])


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_data_parallelism_and_a_pipeline_change_no_bit(rows, layout):
    """Sums over micro-batches and ranks are float64; a pipeline only cuts between layers."""
    assert_no_bit_differs(rows("vaetki_7b_a1b", FAST["vaetki_7b_a1b"])[layout])


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["pp2xvpp2", "pp3xE|tttt|L", "pp2xvpp2xEt|tt|t|L"])
def test_no_pipeline_changes_a_bit(rows, layout):
    assert_no_bit_differs(rows("vaetki_7b_a1b", FULL["vaetki_7b_a1b"])[layout])


def test_two_names_of_a_grid_have_the_numbers_of_one_run(rows):
    """Its seconds too."""
    found = rows("k_exaone_236b_a23b", FAST["k_exaone_236b_a23b"])
    assert found["ep2xpp2"] | {"layout": "dp2xpp2xep2"} == found["dp2xpp2xep2"]


def test_some_experts_get_no_token_in_a_whole_batch(rows):
    """Their gradients are zero in every layout, and the ranks that hold them wait for nothing."""
    assert any(
        row["comparison"]["idle_experts"] > 0
        for name in FAST
        for row in rows(name, FAST[name]).values()
    )


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), cases(IN_FLOAT64))
def test_in_float64_only_a_fault_would_be_left(rows, name, layout):
    check(rows(name, IN_FLOAT64[name], "float64")[layout], DOUBLE)


@pytest.mark.parity
def test_a_difference_beyond_the_bound_is_named_and_ends_with_1(tmp_path):
    done = parity(tmp_path, "keural_14b", "--layouts", "tp2", "--bound", "1e-12")
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout
    assert "tp2 differs in" in done.stdout
    assert "keural_14b: one process" in done.stderr


def test_a_layout_that_cannot_be_is_refused_before_anything_starts(tmp_path):
    done = parity(tmp_path, "vaetki_7b_a1b", "--layouts", "tp2,tp8")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "megamoe: error: layout tp8: vaetki_7b_a1b/general: model.attention.num_heads 4 is not a "
        "multiple of tp 8; nearest possible layout: dp2 tp4\n"
    )


@pytest.mark.parametrize("bound", ["nan", "inf", "-1"])
def test_a_bound_that_bounds_nothing_is_refused(tmp_path, bound):
    done = parity(tmp_path, "keural_14b", "--layouts", "tp2", "--bound", bound)
    assert done.returncode == 2
    assert f"--bound: {float(bound)} is no relative difference; give a number" in done.stderr


def test_a_layout_that_fits_no_world_is_refused_with_one_that_does(tmp_path):
    """The length of a sequence is the command's own; what would do instead must not end there."""
    done = parity(tmp_path, "k_exaone_236b_a23b", "--layouts", "cp3")
    assert done.returncode == 2
    assert done.stderr.endswith("nearest possible layout on world size 2: dp1 cp2\n")
