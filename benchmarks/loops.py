"""Two ways to train the same model on the same batches: ours, and the least that does it."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from megamoe.mcore import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-core warns of all that is not installed
    cpu.enable()  # before anything imports Megatron-core
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megamoe.mcore import engine as engine_module
    from megamoe.mcore.compat import take_mtp_losses
    from megamoe.mcore.data import Batch
    from megamoe.mcore.engine import Engine
    from megamoe.mcore.measure import Measures
    from megamoe.mcore.optim import set_learning_rate
    from megamoe.mcore.router import BalancedRouter

from megamoe.errors import CheckpointError
from megamoe.plan.plan import Plan, Segment
from megamoe.plan.schedule import learning_rate_at, sequences_at
from megamoe.recipe import Model
from megamoe.step import EvalResult, SaveResult, StepResult
from megamoe.train.hooks import Recorder, make_hooks
from megamoe.train.loop import training_steps

Losses = dict[str, torch.Tensor]  # loss: sum over tokens; tokens: their number
Result = TypeVar("Result")


class Loop:
    """One model in training, by our step or by the bare one; both leave it in the same state.

    Args:
        plan: a plan of one process.
        segment: what to train of it.
        folder: the run folder.
    """

    def __init__(self, plan: Plan, segment: Segment, folder: Path) -> None:
        """Build the engine; nothing is recorded yet."""
        self.engine = Engine(plan, segment, folder)
        self.parts: dict[str, list[float]] = defaultdict(list)  # seconds of each of our steps
        self._steps = training_steps(self.engine)
        self._hooks = make_hooks(segment, [])
        modules = (module for chunk in self.engine.chunks for module in chunk.modules())
        routers = [module for module in modules if isinstance(module, BalancedRouter)]
        # Only a global balancing loss looks at the batch before.
        self._routers = routers if segment.router.global_aux_loss else []

    def record_to(self, recorders: Sequence[Recorder], parts: dict[str, list[float]]) -> None:
        """Hand each of our steps to recorders, as rank 0 does, and note what parts of it take."""
        self.parts = parts
        timed_ones = [TimedRecorder(recorder, parts) for recorder in recorders]
        self._hooks = make_hooks(self.engine.segment, timed_ones)

    def ours(self) -> StepResult:
        """Take a step and call the hooks, as `megamoe.train.loop.train` does."""
        result = next(self._steps)
        for hook in self._hooks:
            started = time.perf_counter()
            hook.after_step(result, self.engine)
            self.parts[f"hook {type(hook).__name__}"].append(time.perf_counter() - started)
        return result

    def ours_alone(self) -> StepResult:
        """Take our step, and wait for what it saves: the bare step shares this process.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        result = self.ours()
        if error := self.engine.saver.wait():
            raise CheckpointError(error)
        return result

    def bare(self) -> list[Losses]:
        """Take a step; return loss and tokens of each micro-batch, still as tensors."""
        engine, segment = self.engine, self.engine.segment
        position = engine.tokens_seen - segment.tokens_start
        sequences = sequences_at(segment.batch_ramp, position)
        step_tokens = sequences * segment.seq_len
        lr = learning_rate_at(segment.lr, segment.tokens, position + step_tokens)
        set_learning_rate(engine.optimizer, lr)
        [chunk] = engine.chunks
        chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
        losses: list[Losses] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=engine.text.micro_batches(
                position // segment.seq_len, sequences, segment.layout.micro_batch
            ),
            model=chunk,
            num_microbatches=sequences // segment.layout.micro_batch,
            seq_length=segment.seq_len,
            micro_batch_size=segment.layout.micro_batch,
            forward_only=False,
        )
        engine.optimizer.step()
        engine.step += 1
        engine.tokens_seen += step_tokens
        if self._routers:
            counts_LE = torch.stack([router.batch_counts_E for router in self._routers])
            torch.distributed.all_reduce(counts_LE)
            for router, counts_E in zip(self._routers, counts_LE, strict=True):
                router.finish_batch(counts_E)
        return losses

    def tidy(self) -> None:
        """Empty what our step would have emptied and the next one would read."""
        for module in self.engine.chunks[0].modules():
            if isinstance(module, BalancedRouter):
                module.batch_counts_E.zero_()
                module.loss_sums.clear()
        take_mtp_losses()


class TimedRecorder:
    """A recorder that notes how long another one takes."""

    def __init__(self, recorder: Recorder, parts: dict[str, list[float]]) -> None:
        """Keep both."""
        self._recorder, self._parts = recorder, parts

    def record_step(self, result: StepResult) -> None:
        """Hand on."""
        started = time.perf_counter()
        self._recorder.record_step(result)
        seconds = time.perf_counter() - started
        self._parts[f"  of it {type(self._recorder).__name__}"].append(seconds)

    def record_evals(self, results: Sequence[EvalResult]) -> None:
        """Hand on."""
        self._recorder.record_evals(results)

    def record_save(self, result: SaveResult) -> None:
        """Hand on."""
        self._recorder.record_save(result)

    def close(self) -> None:
        """Hand on."""
        self._recorder.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step took, with nothing but it running in this process."""

    wall_s: float
    processor_s: float  # of all threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The same steps of both loops, one after the other, in order."""

    ours: list[Step]
    bare: list[Step]
    results: list[StepResult]


@contextmanager
def timed_measure(parts: dict[str, list[float]]) -> Iterator[None]:
    """Note how long each call of `measure` by the engine takes."""
    names = vars(engine_module)
    untimed: Callable[..., Measures] = names["measure"]

    def measure(
        model: Model, chunks: list[DistributedDataParallel], losses: list[Losses]
    ) -> Measures:
        started = time.perf_counter()
        measures = untimed(model, chunks, losses)
        parts["measure"].append(time.perf_counter() - started)
        return measures

    names["measure"] = measure
    try:
        yield
    finally:
        names["measure"] = untimed


def run_both(first: Loop, second: Loop, *, num_steps: int) -> Steps:
    """Train two like models in step; of each step, one takes ours and the other the bare one.

    Who takes ours, and which goes first, changes from step to step: two models of one process are
    not equally fast, by where their memory lies, and a machine is not equally fast all the time.
    Our steps last until what they save is written.

    Raises:
        CheckpointError: a checkpoint could not be written.
        AssertionError: a step of theirs differs in a bit of its loss.
    """
    steps = Steps(ours=[], bare=[], results=[])
    for index in range(num_steps):
        one, other = (first, second) if index % 2 == 0 else (second, first)
        if index % 4 < 2:
            own, result = timed(one.ours_alone)
            bare, losses = timed(other.bare)
            other.tidy()
        else:
            bare, losses = timed(other.bare)
            other.tidy()
            own, result = timed(one.ours_alone)
        check_equal(result, losses)
        steps.ours.append(own)
        steps.bare.append(bare)
        steps.results.append(result)
    return steps


def timed(function: Callable[[], Result]) -> tuple[Step, Result]:
    """Call a function; return what it took, and its result."""
    started, used = time.perf_counter(), time.process_time()
    result = function()
    wall_s, processor_s = time.perf_counter() - started, time.process_time() - used
    return Step(wall_s=wall_s, processor_s=processor_s), result


def check_equal(result: StepResult, parts: list[Losses]) -> None:
    """Assert that a bare step computed what ours did, to the last bit."""
    tokens = sum(int(part["tokens"]) for part in parts)
    loss = sum(float(part["loss"]) for part in parts) / tokens
    assert (loss, tokens) == (result.loss, result.loss_tokens), (result, loss, tokens)


def _forward_step(
    batches: Iterator[Batch], chunk: torch.nn.Module
) -> tuple[torch.Tensor, partial[Any]]:
    batch = next(batches)
    losses_BS = chunk(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses_BS, partial(_sum_of_losses, batch["loss_mask"])


def _sum_of_losses(
    mask_BS: torch.Tensor, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Losses]:
    loss, tokens = (losses_BS.float() * mask_BS).sum(), mask_BS.sum().int()
    return loss, tokens, {"loss": loss.detach(), "tokens": tokens}
