"""A trained model in one process, to be read from: no optimizer, no wrapper, no other rank.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from megamoe.mcore import checkpoint, groups
from megamoe.mcore.config import parameter_dtype
from megamoe.mcore.data import Batch
from megamoe.mcore.decode import make_cache
from megamoe.mcore.model import build_chunk
from megamoe.nn.cache import Cache
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe.layout import one_rank

_WHOLE = one_rank(1)


@contextmanager
def alone(plan: Plan, segment: Segment) -> Iterator[tuple[Plan, Segment]]:
    """Be a world of one process; yield the plan and the segment as such a world has them."""
    has_gpu = torch.cuda.is_available()
    # On a GPU, determinism is a setting of the process that trains: megamoe/train/main.py.
    plan = replace(plan, deterministic=plan.deterministic and not has_gpu)
    segment = replace(segment, world_size=1, dp=1, layout=_WHOLE)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    groups.form(plan, segment)
    try:
        yield plan, segment
    finally:
        groups.stop()


class TrainedModel:
    """A model with the weights of a checkpoint; the process is a world of one (`alone`)."""

    def __init__(self, plan: Plan, segment: Segment, folder: Path) -> None:
        """Build the model of a segment, laid out whole, and load a checkpoint of any layout.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
        """
        self.plan, self.segment = plan, segment
        self.module: LanguageModule = build_chunk(plan, segment)
        # Norms are made in float32; training in bfloat16 converts them, too.
        self.module.to(parameter_dtype(segment)).eval()
        checkpoint.load_weights(folder, self.module)

    def new_cache(self, *, sequences: int, tokens: int) -> Cache:
        """Return an empty cache for so many sequences of so many tokens at most."""
        return make_cache(
            self.plan.model,
            size=(sequences, tokens),
            dtype=parameter_dtype(self.segment),
            device=next(self.module.parameters()).device,
        )

    def next_logits(self, tokens_BS: Tensor, cache: Cache) -> Tensor:
        """Return [B, V] float32: logits of the token after these, which follow those of the cache."""
        return next_logits(self.module, tokens_BS, cache)

    def token_losses(self, batch: Batch) -> Tensor:
        """Return [B, S] float32: -log p of each label, in nats; 0 where the mask is."""
        logits_BSV = all_logits(self.module, batch["tokens"], batch.get("starts"))
        losses = cross_entropy(
            logits_BSV.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        )
        return losses.view_as(batch["labels"]) * batch["loss_mask"]


@torch.no_grad()
def next_logits(module: LanguageModule, tokens_BS: Tensor, cache: Cache) -> Tensor:
    """Return [B, V] float32: logits of the token after the last; the cache takes the tokens in."""
    return _logits(module, _hidden(module, tokens_BS, cache)[-1:])[:, 0]


@torch.no_grad()
def all_logits(
    module: LanguageModule, tokens_BS: Tensor, starts_SB: Tensor | None = None
) -> Tensor:
    """Return [B, S, V] float32: logits of the token after each one, without a cache.

    Args:
        module: the model.
        tokens_BS: whole sequences.
        starts_SB: where the document of each token begins; None: they see each other.
    """
    return _logits(module, _hidden(module, tokens_BS, None, starts_SB))


def _hidden(
    module: LanguageModule,
    tokens_BS: Tensor,
    cache: Cache | None,
    starts_SB: Tensor | None = None,
) -> Tensor:
    """Return [S, B, D] of the decoder; layers that predict further tokens are left out."""
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    embedded = module.embedding(input_ids=tokens_BS, position_ids=positions_BS)
    return module.decoder(
        hidden_states=embedded,
        attention_mask=None,
        inference_context=cache,
        packed_seq_params=starts_SB,
    )


def _logits(module: LanguageModule, hidden_SBD: Tensor) -> Tensor:
    tied = module.share_embeddings_and_output_weights
    weight = module.shared_embedding_or_output_weight() if tied else None
    logits_SBV, _ = module.output_layer(hidden_SBD, weight=weight)
    return logits_SBV.transpose(0, 1).float()
