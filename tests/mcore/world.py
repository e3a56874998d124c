"""One process as a whole world, for tests that need the real engine and no other rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megamoe.mcore import groups
from megamoe.mcore.engine import Engine
from megamoe.mcore.model import unwrap
from megamoe.plan.plan import Plan


@contextmanager
def world_of_one(plan: Plan) -> Iterator[None]:
    """Be the only rank of the plan's first segment; leaves torch's settings as they were.

    The groups are formed once and stay: Megatron-core makes some fifty of them, and gloo never
    ends the threads of those it is told to destroy.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.distributed.is_initialized():
        groups.settle(plan)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        groups.form(plan, plan.segments[0])
    try:
        yield
    finally:
        MTPLossLoggingHelper.tracker.clear()  # kept per process, in the size of the first model
        torch.use_deterministic_algorithms(deterministic)


def with_segment(plan: Plan, **changes: object) -> Plan:
    """Return a plan whose one segment has other values."""
    return replace(plan, segments=(replace(plan.segments[0], **changes),))


def train(plan: Plan, folder: Path, num_steps: int) -> Engine:
    """Return an engine, continued from the folder's checkpoint if any, after some steps."""
    engine = Engine(plan, plan.segments[0], folder)
    for _ in range(num_steps):
        engine.train_step()
    return engine


def adam_states(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return the state of each weight of this rank, by name: weight, exp_avg, exp_avg_sq, step."""
    states = {}
    parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    for index, chunk in enumerate(engine.chunks):
        for name, weight in unwrap(chunk).named_parameters():
            for part in parts:
                if weight in part.model_param_group_index_map:
                    group, order = part.model_param_group_index_map[weight]
                    main = part.optimizer.param_groups[group]["params"][order]
                    states[f"{index}.{name}"] = {"weight": main, **part.optimizer.state[main]}
    return states


def everything(engine: Engine) -> dict[str, Tensor]:
    """Return a copy of all that a run carries from one step to the next, by name."""
    values = {"random": torch.get_rng_state()}
    for index, chunk in enumerate(engine.chunks):
        for name, value in unwrap(chunk).state_dict().items():
            if isinstance(value, Tensor):
                values[f"model{index}.{name}"] = value
    for weight, state in adam_states(engine).items():
        values.update({f"adam.{weight}.{name}": value for name, value in state.items()})
    return {name: value.detach().clone() for name, value in values.items()}
