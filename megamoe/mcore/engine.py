"""One segment of a plan, ready to train: model, optimizer, data and what a step measures."""

import resource
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megamoe.checkpoints import folder as files
from megamoe.errors import CheckpointError, TrainingError
from megamoe.mcore import checkpoint, groups
from megamoe.mcore.data import Batch, HeldoutText, TrainingText, check_shards
from megamoe.mcore.dispatchers import settle_dispatcher
from megamoe.mcore.measure import Measures, measure
from megamoe.mcore.model import build_model, unwrap
from megamoe.mcore.optim import build_optimizer, set_learning_rate
from megamoe.mcore.roll import num_targets
from megamoe.mcore.saver import Saver
from megamoe.plan.json import digest
from megamoe.plan.plan import Plan, Segment
from megamoe.plan.schedule import learning_rate_at, sequences_at
from megamoe.plan.trainable import check_trainable, left_out
from megamoe.step import EvalResult, SaveResult, StepResult


class Engine:
    """Trains one segment; the process groups are already formed (megamoe/mcore/groups.py)."""

    def __init__(self, plan: Plan, segment: Segment, run_dir: Path) -> None:
        """Build the model and open the data; continue from the run's latest checkpoint.

        Raises:
            PlanError: the plan asks for something that has no engine yet.
            DataError: a shard is missing or changed.
            CheckpointError: the latest checkpoint belongs to another plan, or is not whole.
        """
        check_trainable(plan)
        self.plan = plan
        # From here on the segment is as it can be run; `notes` say what the plan asked for instead.
        segment, notes = settle_dispatcher(plan, segment)
        self.notes = (*notes, *left_out(segment))
        self.segment = segment
        self.folder = run_dir / "checkpoints"
        self.digest = digest(plan)
        self.chunks = build_model(plan, segment)
        self.optimizer = build_optimizer(plan, segment, self.chunks)
        self.text = TrainingText(plan, segment, run_dir / "cache")
        self.heldout = self._open_heldout()
        self.step = segment.steps_start
        self.tokens_seen = segment.tokens_start
        self.ledger: tuple[tuple[str, str, int], ...] = ()  # of the segments before this one
        self.saver = Saver(self.folder, plan.keep_checkpoints)
        self._validated = False  # what ranks write, by the first save
        self._configure()
        self._resume()

    @property
    def is_done(self) -> bool:
        """Tell whether the segment's tokens are spent."""
        return self.tokens_seen >= self.segment.tokens_start + self.segment.tokens

    def train_step(self) -> StepResult:
        """Forward, backward and optimizer step on the next global batch.

        Raises:
            TrainingError: the loss or the gradient norm is not finite.
        """
        started = time.perf_counter()
        segment = self.segment
        position = self.tokens_seen - segment.tokens_start
        sequences = sequences_at(segment.batch_ramp, position)
        step_tokens = sequences * segment.seq_len
        lr = learning_rate_at(segment.lr, segment.tokens, position + step_tokens)
        set_learning_rate(self.optimizer, lr)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run_schedule(
            [
                self.text.micro_batches(
                    position // segment.seq_len, sequences, segment.layout.micro_batch
                )
                for _ in self.chunks
            ],
            sequences // (segment.dp * segment.layout.micro_batch),
        )
        _, grad_norm, _ = self.optimizer.step()
        self.step += 1
        self.tokens_seen += step_tokens
        measures = measure(self.plan.model, self.chunks, losses)
        self._check(measures, grad_norm)
        return StepResult(
            stage=segment.stage,
            segment=segment.index,
            step=self.step,
            tokens_seen=self.tokens_seen,
            step_tokens=step_tokens,
            loss_tokens=measures.loss_tokens,
            loss=measures.loss,
            mtp_loss=measures.mtp_loss,
            aux_losses=measures.aux_losses,
            grad_norm=float(grad_norm),
            lr=lr,
            sequences=sequences,
            seconds=time.perf_counter() - started,
            expert_load=measures.expert_load,
            memory_bytes=_memory_bytes(),
            cp_bytes=groups.take_context_bytes(),
        )

    @torch.no_grad()  # also tells Megatron-core's routers that expert biases do not follow these tokens
    def evaluate(self) -> list[EvalResult]:
        """Return the loss on held-out text, source by source."""
        results = []
        layout = self.segment.layout
        # Megatron-Core 0.16.1 pipeline_parallel/schedules.py:995 and :1007 (0.19.2 :1134): an interleaved
        # pipeline takes whole rounds of pp micro-batches; those beyond the text count no token.
        rounds = layout.pp if layout.vpp > 1 else 1
        for chunk in self.chunks:
            chunk.eval()
        for source, text in self.heldout:
            count = rounds * -(-text.num_windows // (layout.micro_batch * self.segment.dp * rounds))
            batches = [text.micro_batches(count, layout.micro_batch) for _ in self.chunks]
            losses = self._run_schedule(batches, count, forward_only=True)
            measures = measure(self.plan.model, self.chunks, losses)
            results.append(
                EvalResult(
                    stage=self.segment.stage,
                    segment=self.segment.index,
                    step=self.step,
                    tokens_seen=self.tokens_seen,
                    source=source,
                    loss=measures.loss,
                    tokens=measures.loss_tokens,
                )
            )
        for chunk in self.chunks:
            chunk.train()
        groups.take_context_bytes()  # steps are measured, not evaluations
        return results

    def save(self, *, wait: bool = False) -> Path:
        """Begin to write a checkpoint, which training does not wait for; return its folder.

        Args:
            wait: return when it is the latest.

        Raises:
            CheckpointError: it was waited for and could not be written.
        """
        progress = files.Progress(
            plan_digest=self.digest,
            segment=self.segment.index,
            step=self.step,
            tokens_seen=self.tokens_seen,
            segment_done=self.is_done,
            ledger=(*self.ledger, *self._drawn()),
        )
        self.saver.start(self._snapshot, progress, self.segment.stage)
        if wait and (error := self.saver.finish()):
            raise CheckpointError(error)
        return self.folder / files.name_of(self.tokens_seen)

    def ended_saves(self) -> list[SaveResult]:
        """Return the saves that have ended since the last call, failed ones too."""
        return self.saver.ended()

    def close(self) -> None:
        """Let a checkpoint that is being written be finished, also after an error in training."""
        self.saver.wait()

    def _snapshot(self) -> checkpoint.Snapshot:
        validate, self._validated = not self._validated, True
        return checkpoint.snapshot(self.chunks, self.optimizer, validate=validate)

    def _configure(self) -> None:
        config = unwrap(self.chunks[0]).config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def _resume(self) -> None:
        folder = files.latest(self.folder)
        if folder is None:
            return
        progress = files.read_progress(folder)
        if progress.plan_digest != self.digest:
            raise CheckpointError(f"{folder} belongs to another plan; use another run folder")
        same_layout = progress.segment == self.segment.index
        checkpoint.load(folder, self.chunks, self.optimizer, same_layout=same_layout)
        self.step, self.tokens_seen = progress.step, progress.tokens_seen
        own = {stage.stage for stage in self.plan.segments[self.segment.index :]}
        self.ledger = tuple(entry for entry in progress.ledger if entry[0] not in own)

    def _drawn(self) -> list[tuple[str, str, int]]:
        sequences = (self.tokens_seen - self.segment.tokens_start) // self.segment.seq_len
        drawn = self.text.tokens_drawn(sequences)
        return [(self.segment.stage, source, tokens) for source, tokens in drawn]

    def _open_heldout(self) -> list[tuple[str, HeldoutText]]:
        data = self.plan.data
        assert data is not None, "a plan without data cannot be trained"
        check_shards(Path(data.folder), [shard for _, shard in data.heldout])
        return [
            (source, HeldoutText(data, shard, self.segment, self.plan.eval_tokens))
            for source, shard in data.heldout
        ]

    def _run_schedule(
        self, batches: list[Iterator[Batch]], num_micro_batches: int, *, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        return get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=self.segment.seq_len,
            micro_batch_size=self.segment.layout.micro_batch,
            forward_only=forward_only,
        )

    def _check(self, measures: Measures, grad_norm: float) -> None:
        total = measures.loss + float(grad_norm)
        if not torch.isfinite(torch.tensor(total)):
            raise TrainingError(
                f"step {self.step} ({self.tokens_seen:,} tokens): loss {measures.loss}, gradient "
                f"norm {float(grad_norm)}; start another run with a lower learning rate, or continue to see whether it recurs"
            )


def _forward_step(batches: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, partial[Any]]:
    batch = next(batches)
    losses_BS = chunk(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch.get("starts"),
    )
    return losses_BS, partial(_loss, batch, unwrap(chunk).config.mtp_num_layers or 0)


def _loss(
    batch: Batch, mtp_depths: int, losses_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum over real tokens, their number, and what the metrics need."""
    mask_BS = batch["loss_mask"]
    loss = (losses_BS.float() * mask_BS).sum()
    num_tokens = mask_BS.sum().int()
    mtp_targets = num_targets(mask_BS, mtp_depths, batch.get("starts"))
    measured = {"loss": loss.detach(), "tokens": num_tokens, "mtp_targets": mtp_targets}
    return loss, num_tokens, measured


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
