"""What differs between the versions of Megatron-core that are supported, each in one function.

Lines are those of 0.16.1 (Python 3.11) and of 0.19.2 (Python 3.12), under megatron/core. Both train
the same model to the same losses: tests/mcore/test_losses.py. What a version needs on a processor, or
without Transformer Engine, is a patch in megamoe/mcore/cpu.py, with the version it is `fixed_in`.
"""

import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.package_info import VERSION
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamoe.mcore.roll import roll_tensor

# `__version__` is no help: 0.19.2 adds the commit of whatever repository the process stands in.
MEGATRON_CORE: tuple[int, int] = VERSION[:2]
HAS_HYBRID_MODEL = MEGATRON_CORE >= (0, 19)
_COMMON = "megatron.core.dist_checkpointing.strategies.common"
_PREDICTION = "megatron.core.transformer.multi_token_prediction"
_DATA_PARALLEL = "megatron.core.distributed.distributed_data_parallel"


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of one pipeline rank and chunk, and what predicts further tokens."""

    block: TransformerBlockSubmodules
    mtp_block_spec: MultiTokenPredictionBlockSubmodules | None  # HybridModel asks for this name


def language_model(config: TransformerConfig, layers: Layers, **options: Any) -> Any:
    """Return Megatron-core's language model around our layers: embedding, output layer, MTP.

    0.19.2 models/gpt/gpt_model.py:121 deprecates GPTModel in favour of HybridModel, whose layers
    are letters of a pattern and one spec for each letter (models/hybrid/hybrid_block.py:47). That
    cannot say that the windows and positions of two attentions differ, and its HybridStack ends in
    a norm of Transformer Engine (:215). But HybridModel takes any stack: ours is TransformerBlock.

    Args:
        config: of the whole model.
        layers: of this rank and chunk.
        options: what GPTModel and HybridModel both take.
    """
    _replace_roll(importlib.import_module(_PREDICTION))
    if not HAS_HYBRID_MODEL:
        gpt = importlib.import_module("megatron.core.models.gpt.gpt_model")
        _replace_mtp_loss(gpt)
        _replace_roll(gpt)
        return gpt.GPTModel(
            config=config,
            transformer_layer_spec=layers.block,
            mtp_block_spec=layers.mtp_block_spec,
            **options,
        )
    hybrid = importlib.import_module("megatron.core.models.hybrid.hybrid_model")
    _replace_mtp_loss(hybrid)
    logging.getLogger(_DATA_PARALLEL).addFilter(_says_something)
    model = hybrid.HybridModel(
        config=config,
        hybrid_stack_spec=ModuleSpec(
            module=_LayerStack, submodules=layers, params={"vp_stage": options["vp_stage"]}
        ),
        hybrid_layer_pattern=_pattern(config),
        **options,
    )
    # models/hybrid/hybrid_model.py:309 and :554 want multi-token prediction with the output layer.
    if model.mtp_process and not model.post_process:
        del model.output_layer  # of no use to it, and a matrix more
    if config.mtp_num_layers and model.post_process and not model.mtp_process:
        model.forward = partial(_losses_of_received, model)
    return model


def mtp_layer_spec(*, norm: type, projection: type, layer: ModuleSpec) -> ModuleSpec:
    """Return one multi-token prediction layer around a decoder layer.

    transformer/multi_token_prediction.py names the decoder layer `transformer_layer` in 0.16.1 (line
    406), `mtp_model_layer` in 0.19.2 (:576). Checkpoints have the older name in both (:1555).
    """
    name = "transformer_layer" if MEGATRON_CORE < (0, 17) else "mtp_model_layer"
    return ModuleSpec(
        module=_PredictionLayer if HAS_HYBRID_MODEL else MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, eh_proj=projection, layer_norm=norm, **{name: layer}
        ),
    )


def dense_mlp_spec(linears: MLPSubmodules) -> Any:
    """Return a dense MLP; 0.19.2 transformer/transformer_layer.py:429 warns about its ModuleSpec."""
    if MEGATRON_CORE < (0, 18):
        return ModuleSpec(module=MLP, submodules=linears)
    return partial(MLP.as_mlp_submodule, submodules=linears)


def rotation_options(config: TransformerConfig) -> dict[str, Any]:
    """Return what apply_rotary_pos_emb must be told to rotate pairs of neighbours, as MLA does.

    0.16.1 models/common/embeddings/rope_utils.py:119 asks the configuration; 0.19.2 (:278) wants to be
    told, and rotates halves otherwise.
    """
    if "mla_rotary_interleaved" not in inspect.signature(apply_rotary_pos_emb).parameters:
        return {}
    return {"mla_rotary_interleaved": config.multi_latent_attention}


def layer_index(router: Any, num_layers: int) -> int:
    """Return the place of a router's layer: those of the decoder, then multi-token prediction.

    0.16.1 numbers the prediction layers on from the decoder's; 0.19.2 from 1
    (transformer/multi_token_prediction.py:670 and :1043).
    """
    is_numbered_anew = getattr(router, "is_mtp_layer", False)
    return int(router.layer_number) - 1 + (num_layers if is_numbered_anew else 0)


def take_mtp_losses() -> Tensor | None:
    """Return and forget the sums of prediction losses, one for each depth, if there are any."""
    return MTPLossLoggingHelper.tracker.pop("values", None)


@contextmanager
def loading_checkpoint() -> Iterator[None]:
    """Keep torch and Megatron-core from warning, inside it, of how 0.19.2 loads a checkpoint.

    dist_checkpointing/strategies/torch.py:979 loads on each rank for itself, with the arguments in
    an order that has changed; strategies/common.py:42 calls a function of its own deprecated.
    """
    logger = logging.getLogger(_COMMON)
    logger.addFilter(_is_no_deprecation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="The argument order of load has been changed")
        try:
            yield
        finally:
            logger.removeFilter(_is_no_deprecation)


class SpecifiedLatentAttention(MLASelfAttention):
    """MLA with the projections and norms of its spec.

    0.19.2 transformer/mla_qk_norm_config.py:148 wants queries without a latent normed by a layer of
    Transformer Engine; 0.16.1 does not norm them at all, as no published model does.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*names, "q_layernorm", "kv_layernorm")}


class _LayerStack(TransformerBlock):
    """TransformerBlock, built as HybridModel builds its stack."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Layers,
        *,
        layer_type_list: list[str],
        vp_stage: int | None,
        **options: Any,  # pp_layer_offset, dtype, name: of no use to layers of a spec each
    ) -> None:
        """Take the layers from the spec; the pattern must agree about their number."""
        used = {name: options[name] for name in ("pre_process", "post_process", "pg_collection")}
        super().__init__(config, submodules.block, vp_stage=vp_stage, **used)
        assert len(self.layers) == len(layer_type_list), (len(self.layers), layer_type_list)


class _PredictionLayer(MultiTokenPredictionLayer):
    """A prediction layer of HybridModel around one decoder layer, as GPTModel has it."""

    def __init__(
        self,
        *args: Any,
        mtp_layer_pattern: str,  # noqa: ARG002 - would build a HybridStack
        hybrid_submodules: Layers,  # noqa: ARG002
        **options: Any,
    ) -> None:
        """Leave out what 0.19.2 transformer/multi_token_prediction.py:1018 asks for."""
        super().__init__(*args, **options)


def _is_no_deprecation(record: logging.LogRecord) -> bool:
    return "load_common is deprecated" not in record.getMessage()


def _says_something(record: logging.LogRecord) -> bool:
    """Tell whether a message is another than 0.19.2 distributed_data_parallel.py:136.

    It asks callers to compute the layout of gradient buffers that it then computes itself.
    """
    return "full_param_layout not provided" not in record.getMessage()


def _pattern(config: TransformerConfig) -> str:
    """Return HybridModel's pattern: E or - a layer, | between chunks, / before a prediction."""
    letters = iter("E" if is_moe else "-" for is_moe in config.moe_layer_freq)
    pipeline = config.pipeline_model_parallel_layout
    assert isinstance(pipeline, PipelineParallelLayerLayout), pipeline
    ranks = zip(*pipeline.layout, strict=True)  # for each chunk of a rank, those of all ranks
    counts = [chunk.count(LayerType.decoder) for chunks in ranks for chunk in chunks]
    pattern = "|".join("".join(islice(letters, count)) for count in counts)
    return pattern + "/E" * (config.mtp_num_layers or 0)


def _replace_roll(module: Any) -> None:
    module.roll_tensor = roll_tensor


def _replace_mtp_loss(model: Any) -> None:
    """Weigh the losses of multi-token prediction as 0.16.1 does, in the module of a model.

    DeepSeek-V3, eq. 24, divides them by the length of the sequence, and so does 0.16.1
    models/gpt/gpt_model.py:656. 0.17.1 and later divide by the tokens that have a label at that
    depth: transformer/multi_token_prediction.py:885 (0.19.2) multiplies each loss with S / (S - 1),
    which is another training.
    """
    if hasattr(model, "process_mtp_loss"):
        model.process_mtp_loss = _process_mtp_loss


def _process_mtp_loss(  # noqa: PLR0913 - Megatron-core's call
    *,
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Any,
    output_weight: Tensor | None,
    is_training: bool,
    compute_language_model_loss: Any,
    config: TransformerConfig,
    packed_seq_params: Tensor | None,
    **_: Any,
) -> Tensor:
    """Attach the losses of all depths to the decoder's hidden states, which it returns."""
    hidden_states, *predictions = torch.chunk(hidden_states, 1 + config.mtp_num_layers, dim=0)
    if labels is None:
        return hidden_states
    mask_BS: Tensor = torch.ones_like(labels) if loss_mask is None else loss_mask
    scale = config.mtp_loss_scaling_factor / config.mtp_num_layers
    for depth, prediction in enumerate(predictions):
        logits, _ = output_layer(prediction, weight=output_weight)
        labels = roll_tensor(labels, packed_seq_params=packed_seq_params)[0]
        mask_BS = roll_tensor(mask_BS, packed_seq_params=packed_seq_params)[0]
        losses_BS = mask_BS * compute_language_model_loss(labels, logits)
        if is_training:
            _record(depth, config.mtp_num_layers, losses_BS.detach().sum())
        hidden_states = MTPLossAutoScaler.apply(hidden_states, scale * losses_BS)
    return hidden_states


def _losses_of_received(
    model: Any,
    *_: Any,  # tokens, positions, mask: of no use without layers
    labels: Tensor,
    loss_mask: Tensor,
    packed_seq_params: Tensor | None,
) -> Tensor:
    """Return the losses of a chunk of the output layer alone, as HybridModel has those of all chunks.

    It receives what 0.16.1 hands on from the chunk of multi-token prediction: the decoder's hidden
    states, then those of each depth, one after the other in the tokens' dimension.
    """
    hidden_states = _process_mtp_loss(
        hidden_states=model.decoder(hidden_states=None, attention_mask=None),
        labels=labels,
        loss_mask=loss_mask,
        output_layer=model.output_layer,
        output_weight=None,  # its own
        is_training=model.training,
        compute_language_model_loss=model.compute_language_model_loss,
        config=model.config,
        packed_seq_params=packed_seq_params,
    )
    logits, _ = model.output_layer(hidden_states)
    return model.compute_language_model_loss(labels, logits)


def _record(depth: int, num_depths: int, loss: Tensor) -> None:
    """Add to the sum of a depth, where 0.16.1 transformer/multi_token_prediction.py:337 has it."""
    zeros = torch.zeros(num_depths, device=torch.cuda.current_device())
    MTPLossLoggingHelper.tracker.setdefault("values", zeros)[depth] += loss
