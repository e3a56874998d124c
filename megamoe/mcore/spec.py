"""A model as Megatron-core layer specs, from the kinds of layer it is made of."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megamoe.mcore.compat import dense_mlp_spec, mtp_layer_spec
from megamoe.mcore.experts import GroupedExperts
from megamoe.mcore.layer import (
    CoreAttention,
    GroupedAttention,
    LatentAttention,
    Norm,
    OutputNormResidual,
)
from megamoe.mcore.router import BalancedRouter
from megamoe.plan.plan import Segment
from megamoe.recipe import MLA, Model, PeriNorm


def block_spec(
    config: TransformerConfig, model: Model, segment: Segment, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline rank and chunk."""
    layers = [
        layer_spec(config, model, segment, is_local=model.is_local(i), is_dense=model.is_dense(i))
        for i in range(model.num_layers)
    ]
    start = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers[start : start + count], layer_norm=Norm)


def mtp_spec(
    config: TransformerConfig, model: Model, segment: Segment, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return this chunk's layers of multi-token prediction, which attend without a window.

    None: another chunk has them, or the model has none.
    """
    if model.mtp is None or not get_mtp_num_layers_to_build(config, vp_stage=vp_stage):
        return None
    layer = mtp_layer_spec(
        norm=Norm,
        projection=ColumnParallelLinear,
        layer=layer_spec(config, model, segment, is_local=False, is_dense=model.mtp.ffn == "dense"),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * model.mtp.num_layers)


def layer_spec(
    config: TransformerConfig, model: Model, segment: Segment, *, is_local: bool, is_dense: bool
) -> ModuleSpec:
    """Return one decoder layer: attention of its kind, an MLP of its kind, norms around them."""
    normed = ModuleSpec(module=OutputNormResidual, params={"config": config})
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_attention(model, segment, is_local=is_local),
            self_attn_bda=normed if isinstance(model.norm, PeriNorm) else get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=dense_mlp_spec(_linears()) if is_dense else _experts(),
            mlp_bda=normed if model.norms_mlp_output(is_dense=is_dense) else get_bias_dropout_add,
        ),
    )


def _attention(model: Model, segment: Segment, *, is_local: bool) -> ModuleSpec:
    params = {
        "attn_mask_type": AttnMaskType.causal,
        "rope": model.local_rope if is_local else model.global_rope,
        "interpolation": 1.0 if is_local else segment.rope_interpolation,
    }
    core = ModuleSpec(module=CoreAttention, params={"window": model.window if is_local else None})
    if isinstance(model.attention, MLA):
        return ModuleSpec(
            module=LatentAttention,
            params=params,
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=ColumnParallelLinear,
                linear_q_down_proj=ColumnParallelLinear,
                linear_q_up_proj=ColumnParallelLinear,
                linear_kv_down_proj=ColumnParallelLinear,
                linear_kv_up_proj=ColumnParallelLinear,
                core_attention=core,
                linear_proj=RowParallelLinear,
                q_layernorm=Norm,
                kv_layernorm=Norm,
            ),
        )
    qk_norm = Norm if model.attention.qk_norm else IdentityOp
    return ModuleSpec(
        module=GroupedAttention,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _experts() -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=GroupedExperts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_linears()),
            router=BalancedRouter,
        ),
    )


def _linears() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
