"""Training and held-out text, read by Megatron-core's indexed and blended datasets.

Shapes: B sequences of a micro-batch, S sequence, of which a rank has S / cp in a row.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import numpy.typing
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megamoe.errors import DataError
from megamoe.mcore import groups
from megamoe.nn.context_group import ContextGroup
from megamoe.nn.context_tokens import document_starts
from megamoe.plan.plan import Data, Plan, Segment, Shard

_COUNTED_AT_ONCE = 1 << 20

# tokens, labels, loss_mask, position_ids: [B, S / cp]; with a document mask also starts: [S, B], int32,
# where the document of each token begins, of the whole sequence on every rank.
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What Megatron-core's dataset asks of a tokenizer."""

    vocab_size: int
    eod: int
    pad: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Identify the tokenizer in the name of the index cache."""
        return {"vocab_size": self.vocab_size, "eod": self.eod, "pad": self.pad}


class TrainingText:
    """The samples of one segment, in the order every layout sees them."""

    def __init__(self, plan: Plan, segment: Segment, cache: Path) -> None:
        """Build or open the sample index; the first rank writes it to `cache`.

        All ranks do this together.

        Raises:
            DataError: a shard is missing, or is not the one the plan was made with.
        """
        assert plan.data is not None, "a plan without data cannot be trained"
        folder = Path(plan.data.folder)
        check_shards(folder, [source.shard for source in segment.sources])
        prefixes = [str(folder / source.shard.prefix) for source in segment.sources]
        weights = [source.weight for source in segment.sources]
        config = GPTDatasetConfig(
            random_seed=plan.seed + segment.index,
            sequence_length=segment.seq_len,
            blend_per_split=[(prefixes, weights), None, None],
            path_to_cache=str(cache),
            tokenizer=_Vocabulary(plan.data.vocab_size, plan.data.eod_id, plan.data.pad_id),
            reset_position_ids=False,
            reset_attention_mask=False,  # documents are found in batches: `make_batch`
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        num_samples = segment.tokens // segment.seq_len
        builder = BlendedMegatronDatasetBuilder(
            GPTDataset, [num_samples, None, None], lambda: True, config
        )
        self.samples = builder.build()[0]
        self.sources = [source.name for source in segment.sources]
        self.seq_len = segment.seq_len
        self.end_id = _end_id(plan.data, segment)
        self._drawn = Drawn(len(self.sources))

    def tokens_drawn(self, sequences: int) -> tuple[tuple[str, int], ...]:
        """Return how many tokens the first `sequences` samples took from each source."""
        counts = [sequences]
        if len(self.sources) > 1:
            counts = self._drawn.count(self.samples.dataset_index, sequences)
        return tuple(
            (source, count * self.seq_len)
            for source, count in zip(self.sources, counts, strict=True)
        )

    def micro_batches(self, start: int, sequences: int, micro_batch: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the global batch of `sequences` that begins at `start`."""
        rank = parallel_state.get_data_parallel_rank()
        share = sequences // parallel_state.get_data_parallel_world_size()
        first = start + rank * share
        for index in range(first, first + share, micro_batch):
            samples = [self.samples[i] for i in range(index, index + micro_batch)]
            yield make_batch(samples, self.end_id)


class Drawn:
    """How often each source was drawn, kept from one count to the next."""

    def __init__(self, num_sources: int) -> None:
        """Begin without a sample."""
        self.num_samples = 0
        self.counts = numpy.zeros(num_sources, dtype=numpy.int64)

    def count(self, source_of_sample: numpy.typing.NDArray[Any], num_samples: int) -> list[int]:
        """Return it for the first samples; reads those since the last count, block by block.

        Args:
            source_of_sample: always the same; on disk, and trillions of tokens long.
            num_samples: how many of them were drawn.
        """
        if num_samples < self.num_samples:
            self.num_samples, self.counts = 0, numpy.zeros_like(self.counts)
        for begin in range(self.num_samples, num_samples, _COUNTED_AT_ONCE):
            # numpy.bincount makes int64 of what it is given.
            block = source_of_sample[begin : min(begin + _COUNTED_AT_ONCE, num_samples)]
            self.counts += numpy.bincount(block, minlength=len(self.counts))
        self.num_samples = num_samples
        return self.counts.tolist()


class Windows:
    """A text cut into windows; the last is padded and masked."""

    def __init__(
        self,
        text: numpy.typing.NDArray[numpy.integer],
        seq_len: int,
        pad_id: int,
        end_id: int | None = None,
    ) -> None:
        """Take the tokens; all but the first are predicted, and those that `make_batch` masks."""
        self.text = text
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.end_id = end_id
        self.num_windows = -(-(len(self.text) - 1) // seq_len)

    def micro_batches(self, count: int, micro_batch: int) -> Iterator[Batch]:
        """Yield `count` micro-batches of this rank; windows beyond the text count no token."""
        rank = parallel_state.get_data_parallel_rank()
        world = parallel_state.get_data_parallel_world_size()
        for step in range(count):
            first = (step * world + rank) * micro_batch
            windows = [self._window(i) for i in range(first, first + micro_batch)]
            yield make_batch(windows, self.end_id)

    def _window(self, index: int) -> dict[str, Tensor]:
        text = self.text[index * self.seq_len : (index + 1) * self.seq_len + 1]
        real = max(len(text) - 1, 0)
        padded = numpy.full(self.seq_len + 1, self.pad_id, dtype=numpy.int64)
        padded[: len(text)] = text
        mask = torch.zeros(self.seq_len)
        mask[:real] = 1
        tokens = torch.from_numpy(padded)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.seq_len),
        }


class HeldoutText(Windows):
    """Held-out text of one source, in windows."""

    def __init__(self, data: Data, shard: Shard, segment: Segment, tokens: int) -> None:
        """Read at most `tokens` tokens of a shard that was checked; documents are masked as in training."""
        text = read_tokens(Path(data.folder) / shard.prefix, tokens)
        super().__init__(text, segment.seq_len, data.pad_id, _end_id(data, segment))


def read_tokens(prefix: Path, tokens: int) -> numpy.typing.NDArray[numpy.int64]:
    """Return the first tokens of a shard, and one more to predict after the last."""
    count, documents = 0, []
    for document in shard_documents(prefix):
        if count > tokens:
            break
        documents.append(document)
        count += len(document)
    return numpy.concatenate(documents).astype(numpy.int64)[: tokens + 1]


def shard_documents(prefix: Path) -> Iterator[numpy.typing.NDArray[numpy.int32]]:
    """Yield the tokens of each document of a shard; what is not asked for is not read."""
    dataset = IndexedDataset(str(prefix))
    for document in range(len(dataset)):
        # A copy: without the dataset, what it returns is memory that is mapped no more.
        yield dataset[document].astype(numpy.int32)


def check_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Check that both files of each shard are there and the indices are the planned ones.

    Each rank looks for all files, and hashes its share of the indices.

    Raises:
        DataError: on every rank: the first file that is missing, unreadable or another.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problems = (
        (place, problem)
        for place, shard in enumerate(shards)
        if (problem := _problem(folder, shard, is_hashed=place % world == rank))
    )
    if found := [first for first in groups.told_by_all(next(problems, None)) if first]:
        raise DataError(f"{min(found)[1]}; restore it or plan again")


def _problem(folder: Path, shard: Shard, *, is_hashed: bool) -> str | None:
    """Return what is wrong with a shard."""
    for suffix in (".bin", ".idx"):
        if not (folder / f"{shard.prefix}{suffix}").is_file():
            return f"{folder}/{shard.prefix}{suffix} is missing"
    if not is_hashed:
        return None
    path = folder / f"{shard.prefix}.idx"
    try:
        with path.open("rb") as file:
            is_planned = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256_idx
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if is_planned else f"{path} changed since the plan was made"


def make_batch(samples: list[dict[str, Tensor]], end_id: int | None) -> Batch:
    """Return this rank's part of whole sequences, on its device.

    Args:
        samples: tokens, labels, loss_mask and position_ids of each, [S].
        end_id: the token that ends a document, where documents are masked: after it begins another,
            whose first token nothing foretells, so that there is no loss on the end token. None:
            they are not.
    """
    names = ("tokens", "labels", "loss_mask", "position_ids")
    device = torch.cuda.current_device()
    batch = {name: torch.stack([_own(sample[name]) for sample in samples]) for name in names}
    if end_id is not None:
        batch["loss_mask"] = batch["loss_mask"] * (batch["tokens"] != end_id)
        batch["starts"] = _starts(torch.stack([sample["tokens"] for sample in samples]), end_id)
    if torch.cuda.is_available():
        # From pageable memory a copy would wait for all work queued on the GPU.
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _starts(tokens_BS: Tensor, end_id: int) -> Tensor:
    """Return where the document of each token begins, [S, B]; each rank has read whole sequences."""
    ends_SB = tokens_BS.T.eq(end_id).int()
    return document_starts(ends_SB.cumsum(dim=0) - ends_SB, ContextGroup(None))


def _end_id(data: Data, segment: Segment) -> int | None:
    return data.eod_id if segment.document_mask else None


def _own(whole_S: Tensor) -> Tensor:
    """Return the part of a sequence that this rank has of those that share it (cp)."""
    return groups.context("tokens").shard(whole_S)
