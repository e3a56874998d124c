"""How layers of the engine share sequences: which scheme, and what is made while messages are on their way."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from megamoe.mcore import context, groups, projections
from megamoe.mcore.model import build_chunk, unwrap
from megamoe.mcore.sharing import describe, sharing_of
from megamoe.nn import context_ring_kernels
from megamoe.nn.context_group import ContextGroup, Pending
from megamoe.nn.context_parallel import Scheme
from megamoe.plan.cli import named_cluster
from megamoe.recipe import MLA, Bf16
from megamoe.recipe.load import load_recipe
from tests.mcore import tiny
from tests.mcore.world import world_of_one


class Recording(ContextGroup):
    """The first of two ranks, without the other; notes when messages leave and are waited for."""

    def __init__(self) -> None:
        """Begin without a note."""
        super().__init__(None)
        self.size = 2
        self.notes: list[str] = []

    def all_gather(self, x, direction):
        """Return what this rank has, twice."""
        return self._noted(torch.cat((x, x)), direction)

    def all_to_all(self, x, direction):
        """Return what this rank would send."""
        return self._noted(x.clone(), direction)

    def _noted(self, x, direction):
        self.notes.append(f"{direction} sent")

        def arrive():
            self.notes.append(f"{direction} there")
            return x

        return Pending([], arrive)


@pytest.mark.parametrize(
    ("model", "between"),
    [
        (tiny.LATENT, ["linear_q_down_proj", "q_layernorm", "linear_q_up_proj"]),
        (tiny.GROUPED, ["product", "q_layernorm"]),
    ],
    ids=["latent", "grouped"],
)
@pytest.mark.parametrize("kind", ["local", "global"])
def test_queries_are_made_between_sending_and_waiting_in_both_directions(
    tmp_path, model, between, kind
):
    plan = tiny.tiny_plan(tmp_path, model=replace(model, num_layers=2, window_pattern="LG"))
    cp = Recording()
    with world_of_one(plan), mock.patch.dict(groups._CONTEXTS, {kind: cp}):
        chunk = unwrap(build_chunk(plan, plan.segments[0]))
        attention = chunk.decoder.layers[("local", "global").index(kind)].self_attention
        for name in set(between) - {"product"}:
            part = getattr(attention, name)
            part.register_forward_hook(lambda *_, name=name: cp.notes.append(f"forward {name}"))
            part.register_full_backward_hook(
                lambda *_, name=name: cp.notes.append(f"backward {name}")
            )
        hidden_LBD = torch.randn(8, 2, model.hidden_dim, requires_grad=True)
        starts_SB = torch.zeros(16, 2, dtype=torch.int32)
        with (
            mock.patch.object(context, "scheme_of", return_value=Scheme.GATHER),
            mock.patch.object(projections, "_product", _noting(cp.notes)),
        ):
            output, _ = attention(hidden_LBD, None, packed_seq_params=starts_SB)
        output.sum().backward()
    made = [f"forward {name}" for name in between]
    passed_back = [f"backward {name}" for name in reversed(between)]
    of_keys = ["product"] if "product" in between else []  # another than that of the queries
    assert cp.notes == [
        *(f"forward {name}" for name in of_keys),
        *("forward sent", *made, "forward there"),
        *("backward sent", *passed_back, "backward there"),
        *(f"backward {name}" for name in of_keys),
    ]


def _noting(notes):
    product = projections._product

    def noted(*arguments):
        notes.append("forward product")
        result = product(*arguments)
        result.register_hook(lambda _: notes.append("backward product"))
        return result

    return noted


@pytest.mark.parametrize("document_mask", [False, True])
def test_auto_chooses_a_ring_where_heads_do_not_divide_and_a_kernel_is(tmp_path, document_mask):
    attention = MLA(  # VAETKI-100B's
        num_heads=24,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    plan = tiny.tiny_plan(
        tmp_path,
        replace(tiny.LATENT, attention=attention),
        layout=replace(tiny.LAYOUT, cp=32, micro_batch=1),
        seq_len=131_072,
        document_mask=document_mask,
    )
    rates = {"peak_flops_per_s": 1e15, "network_bytes_per_s": 50e9}
    plan = replace(plan, cluster=replace(plan.cluster, **rates))
    _, said = describe(plan, plan.segments[0], sharing_of(plan, plan.segments[0]))
    assert said.startswith("general: cp 32, layers without: ring ")
    assert "scores written out" not in said


def test_a_ring_without_a_kernel_here_is_said_to_write_out_scores(tmp_path):
    plan = tiny.tiny_plan(tmp_path, layout=replace(tiny.LAYOUT, cp=2, cp_scheme="ring"))
    context_ring_kernels.choose.cache_clear()
    with mock.patch.dict(context_ring_kernels.KERNELS, clear=True):
        sharing = sharing_of(plan, plan.segments[0])
    context_ring_kernels.choose.cache_clear()
    assert not sharing.machine.has_ring_kernel
    said = describe(plan, plan.segments[0], sharing)[-1]
    assert "TFLOP, scores written out), as asked for" in said
    assert sharing_of(plan, plan.segments[0]).machine.has_ring_kernel


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("seq_len", "cp"), [(32_768, 8), (131_072, 32)])
@pytest.mark.parametrize("name", ["vaetki_100b_a10b", "k_exaone_236b_a23b", "ax_k1_519b_a33b"])
def test_auto_is_heads_where_cp_divides_them_and_a_ring_otherwise(
    tmp_path, name, seq_len, cp, document_mask
):
    """On nodes of 8 H200, with documents and without."""
    plan = tiny.tiny_plan(
        tmp_path,
        layout=replace(tiny.LAYOUT, cp=cp, micro_batch=1),
        seq_len=seq_len,
        document_mask=document_mask,
        precision=Bf16(),
    )
    model = load_recipe(name).recipe.model
    plan = replace(plan, model=model, cluster=named_cluster("h200-8x400g", 4))
    said = describe(plan, plan.segments[0], sharing_of(plan, plan.segments[0]))
    chosen = "heads"
    if name.startswith("vaetki") and cp == 32:  # 24 heads
        chosen = "ring"
    expected = [] if model.window is None else [f"general: cp {cp}, layers with a window: halo "]
    expected.append(f"general: cp {cp}, layers without: {chosen} ")
    assert len(said) == len(expected)
    for line, beginning in zip(said, expected, strict=True):
        assert line.startswith(beginning), line
