"""Tells, as JSON, which of the patches of megamoe/mcore/cpu.py Megatron-core still needs.

Run as a program. Megatron-core is imported once, unpatched; each probe is a fork of it.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

with warnings.catch_warnings():
    # Importing Megatron-Core 0.16.1 makes torch warn about parts of its own.
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.tensor_parallel.mappings import (
        all_to_all,
        gather_from_sequence_parallel_region,
    )
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megamoe.mcore import cpu, groups
    from megamoe.mcore.engine import Engine

from tests.mcore import tiny


def watched() -> dict[str, object]:
    """Return what the patches replace in torch, by name."""
    names = ["tensor", "zeros", "ones", "empty", "empty_like", "full", "arange"]
    cuda = [
        "current_device",
        "current_stream",
        "default_stream",
        "Stream",
        "Event",
        "stream",
        "synchronize",
    ]
    random = ["get_rng_state", "set_rng_state", "manual_seed"]
    methods = ["cuda", "type", "record_stream"]
    return {
        **{f"torch.{name}": getattr(torch, name) for name in names},
        **{f"torch.cuda.{name}": getattr(torch.cuda, name) for name in cuda + random},
        **{f"torch.Tensor.{name}": getattr(torch.Tensor, name) for name in methods},
        "all_to_all_single": torch.distributed.all_to_all_single,
        "all_gather": torch.distributed.all_gather,
        "reduce_scatter": torch.distributed.reduce_scatter,
    }


def changed_by(action: Callable[[], None]) -> list[str]:
    """Return the names whose objects an action replaces."""
    before = watched()
    action()
    return [name for name, thing in watched().items() if thing is not before[name]]


def enable_with_cuda() -> dict[str, object]:
    """Return what `enable` replaces where torch says there is CUDA."""
    torch.cuda.is_available = lambda: True
    changed = changed_by(cpu.enable)
    has_engine = multi_latent_attention.HAVE_TE
    return {
        "changed": changed,
        "uses transformer engine": has_engine,
        "gemm": hasattr(moe_utils, "te_general_gemm"),
    }


def enable_without_cuda() -> dict[str, object]:
    """Return what `enable` leaves as it is here, and what a second call replaces."""
    changed = changed_by(cpu.enable)
    unchanged = [name for name in watched() if name not in changed]
    again = changed_by(cpu.enable)
    with torch.device("meta"):
        on_meta = [torch.arange(3), torch.empty(3), torch.tensor(3.0)]
    return {"unchanged": unchanged, "again": again, "on meta": [x.is_meta for x in on_meta]}


def leave_out(name: str | None) -> dict[str, object]:
    """Train one step, save and exchange tokens with every patch but one; return what failed."""
    for patch in cpu.needed_patches():
        if patch.name != name:
            patch.apply()
    try:
        _train_and_save()
        _share_embedding()
        _exchange_tokens()
        _gather_tokens()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def _train_and_save() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    plan = tiny.tiny_plan(folder / "data")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    groups.form(plan, plan.segments[0])
    engine = Engine(plan, plan.segments[0], folder)
    engine.train_step()
    engine.save(wait=True)
    groups.stop()


class _Config(SimpleNamespace):
    """A configuration in which all that is not given is off."""

    def __getattr__(self, _: str) -> None:
        return None


def _share_embedding() -> None:
    """Begin with the same embedding on the first and the last of two pipeline ranks."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    first = SimpleNamespace(
        config=_Config(pipeline_model_parallel_size=2),
        pre_process=True,
        post_process=False,
        share_embeddings_and_output_weights=True,
        embedding=SimpleNamespace(word_embeddings=SimpleNamespace(weight=weight)),
        shared_embedding_or_output_weight=lambda: weight,
        vp_stage=None,
        vp_size=None,
        pp_group=torch.distributed.group.WORLD,
        embd_group=torch.distributed.group.WORLD,
        _is_in_embd_group=lambda: True,
    )
    LanguageModule.setup_embeddings_and_output_layer(first)
    torch.distributed.destroy_process_group()


def _exchange_tokens() -> None:
    """Send tokens to two ranks, with split sizes as the token dispatcher makes them."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    sizes = torch.tensor([1, 2], dtype=torch.int32)
    all_to_all(torch.distributed.group.WORLD, torch.zeros(3, 4), sizes, sizes)
    torch.distributed.destroy_process_group()


def _gather_tokens() -> None:
    """Be two ranks, with one token and two, that gather all and scatter the sums."""
    folder = tempfile.mkdtemp(dir=sys.argv[1])
    child = os.fork()
    rank = 0 if child else 1
    try:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        world, sizes = torch.distributed.group.WORLD, [1, 2]
        tokens = torch.full((sizes[rank], 4), float(rank))
        tokens.requires_grad_()
        gathered = gather_from_sequence_parallel_region(
            tokens, group=world, output_split_sizes=sizes
        )
        assert gathered[:, 0].tolist() == [0, 1, 1]
        (gathered * (1 + rank)).sum().backward()
        assert (tokens.grad == 3).all()
    finally:
        if not child:
            os._exit(0)
        os.waitpid(child, 0)


def _in_fork(probe: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Run a probe in a copy of this process, which its patches end with."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(probe()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def main() -> None:
    """Write the answers of all probes to standard output."""
    answers = {
        "with cuda": _in_fork(enable_with_cuda),
        "without cuda": _in_fork(enable_without_cuda),
        "all patches": _in_fork(lambda: leave_out(None)),
    }
    for patch in cpu.PATCHES:
        answers[patch.name] = _in_fork(lambda name=patch.name: leave_out(name))
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()
