"""The plan: every number of a run, settled for one cluster. The only thing ranks read.

A plan is a list of segments. A segment has one layout, sequence length, precision and world size;
inside it only learning rate, batch size, data position and loss weights move. One process group
runs one segment; between segments a checkpoint is re-sharded by the next process group.
"""

from dataclasses import dataclass
from typing import Literal

from megamoe.plan.cluster import Cluster
from megamoe.recipe.check import (
    Checked,
    Fraction,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
)
from megamoe.recipe.layout import Layout
from megamoe.recipe.model import Model
from megamoe.recipe.optim import AdamW, Muon
from megamoe.recipe.precision import Bf16, Fp8Block, Fp8Delayed, Fp32
from megamoe.recipe.stage import LearningRate, Router

PLAN_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Checked):
    """One `.bin/.idx` pair in Megatron's format."""

    prefix: str  # path without the extension, relative to Data.folder
    tokens: PositiveInt
    sha256_idx: str  # of the .idx: notices data that changed between a save and a resume


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Checked):
    """A source of the mixture, with the share of a segment's tokens drawn from it."""

    name: str
    weight: Fraction  # normalised; a source in fill-in-the-middle form is an entry of its own
    shard: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Data(Checked):
    """Tokenised text. Paths of shards are relative to `folder`."""

    folder: str  # absolute
    eod_id: NaturalInt
    pad_id: NaturalInt
    vocab_size: PositiveInt
    heldout: tuple[tuple[str, Shard], ...]  # (source, shard), for evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Checked):
    """A stretch of training on one process group. Ramps and schedules count the segment's tokens."""

    index: NaturalInt
    stage: str
    tokens_start: NaturalInt  # input tokens of the run before this segment
    tokens: PositiveInt  # of this segment: whole steps, at least what the recipe asks
    num_steps: PositiveInt
    steps_start: NaturalInt
    seq_len: PositiveInt
    world_size: PositiveInt
    dp: PositiveInt
    layout: Layout
    precision: Bf16 | Fp32 | Fp8Delayed | Fp8Block
    lr: LearningRate
    batch_ramp: tuple[tuple[int, int], ...]  # (tokens of the segment seen, sequences per step)
    sources: tuple[Source, ...]  # empty when planned without data
    document_mask: bool
    router: Router
    mtp_loss: PositiveFloat | None
    rope_interpolation: PositiveFloat
    checkpoint_every: PositiveInt  # steps; one more is made at the end of the segment
    eval_every: PositiveInt  # steps; one more at the end of the segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Checked):
    """Everything a rank needs to know."""

    format: Literal[1]
    megamoe: str  # version that made the plan
    recipe: str
    source: str
    scale: str | None
    assumed: tuple[str, ...]
    seed: NaturalInt
    deterministic: bool
    model: Model
    optimizer: AdamW | Muon
    cluster: Cluster
    data: Data | None
    segments: tuple[Segment, ...]
    eval_tokens: PositiveInt  # per source and evaluation
    keep_checkpoints: PositiveInt
