"""Build the model chunks of one rank, wrapped for data parallelism."""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megamoe.mcore.compat import Layers, language_model
from megamoe.mcore.config import transformer_config
from megamoe.mcore.dispatch import use_local_dispatch
from megamoe.mcore.exact import float64_gradients
from megamoe.mcore.init import initialize
from megamoe.mcore.spec import block_spec, mtp_spec
from megamoe.plan.plan import Plan, Segment


def build_model(plan: Plan, segment: Segment) -> list[DistributedDataParallel]:
    """Return the chunks of this rank (one, or vpp of them), initialised."""
    config = transformer_config(plan, segment)
    stages = range(segment.layout.vpp) if segment.layout.vpp > 1 else [None]
    modules = [_chunk(config, plan, segment, vp_stage) for vp_stage in stages]
    initialize(modules, std=plan.model.init_std, seed=plan.seed)
    if config.bf16:
        modules = [Float16Module(config, module) for module in modules]
    with nullcontext() if config.bf16 else float64_gradients():
        return [
            _data_parallel(config, module, is_first=index == 0)
            for index, module in enumerate(modules)
        ]


def build_chunk(plan: Plan, segment: Segment) -> LanguageModule:
    """Return the only chunk of a rank without interleaving, neither initialised nor wrapped."""
    return _chunk(transformer_config(plan, segment), plan, segment, None)


def unwrap(chunk: Any) -> LanguageModule:
    """Return the model inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _chunk(
    config: TransformerConfig, plan: Plan, segment: Segment, vp_stage: int | None
) -> LanguageModule:
    is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = language_model(
        config,
        Layers(
            block=block_spec(config, plan.model, segment, vp_stage),
            mtp_block_spec=mtp_spec(config, plan.model, segment, vp_stage),
        ),
        vocab_size=plan.model.vocab_size,
        max_sequence_length=segment.seq_len,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=plan.model.tied_embeddings,
        position_embedding_type="none",  # positions belong to the layers
        vp_stage=vp_stage,
    )
    if is_last and not is_first and model.mtp_process and plan.model.tied_embeddings:
        # The table is the embedding that multi-token prediction has here. Megatron-Core 0.16.1
        # models/gpt/gpt_model.py:249 (0.19.2: models/hybrid/hybrid_model.py:322) makes another one,
        # which nothing uses and its state dict then does not expect.
        model.output_layer.weight = None
    use_local_dispatch(model)
    return model.to(torch.cuda.current_device())


def _data_parallel(
    config: TransformerConfig, module: nn.Module, *, is_first: bool
) -> DistributedDataParallel:
    return DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
        ),
        module=module,
        disable_bucketing=not is_first,
    )
