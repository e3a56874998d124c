"""What one optimizer step measured. Every value says its unit; None means not measured here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step, equal on all ranks unless marked as the rank's own."""

    stage: str
    segment: int
    step: int  # optimizer steps of the whole run, this one included
    tokens_seen: int  # input tokens of the whole run, this step included
    step_tokens: int  # input tokens of this step
    loss_tokens: (
        int  # tokens of this step that the loss counts: no padding, no end of a masked document
    )
    loss: float  # nats per loss token
    mtp_loss: float | None  # nats per token that is predicted further ahead, unweighted
    aux_losses: tuple[tuple[str, float], ...]  # (name, coefficient times loss, mean over layers)
    grad_norm: float  # global L2 norm before clipping
    lr: float
    sequences: int  # global batch size, in sequences
    seconds: float  # wall time of the step on this rank
    expert_load: tuple[float, ...]  # per MoE layer: busiest expert's tokens / mean tokens
    memory_bytes: int  # peak of this rank: device memory, or resident memory on CPU
    # (kind of layer, bytes forward, backward) for context parallelism, of the rank that received most
    cp_bytes: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Held-out loss of one source of text."""

    stage: str
    segment: int
    step: int
    tokens_seen: int
    source: str
    loss: float  # nats per token
    tokens: int  # tokens it was measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """One attempt to write a checkpoint."""

    stage: str
    segment: int
    step: int
    tokens_seen: int
    stall_seconds: float  # that training stood still
    seconds: float  # from the beginning of the save until the checkpoint was the latest
    num_bytes: int  # of all ranks; 0 where nothing was written
    error: str | None  # why there is no checkpoint, in one line
