"""A plan's segment as Megatron-core's configuration: the one place that knows its field names."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megamoe.mcore.dispatchers import dispatcher_options
from megamoe.plan.plan import Plan, Segment
from megamoe.recipe import GQA, MLA, Fp32, Model


def transformer_config(plan: Plan, segment: Segment) -> TransformerConfig:
    """Return Megatron-core's configuration of the model under one segment's layout."""
    model = plan.model
    fields = {
        **_shape(model),
        **_experts(model, segment),
        **_parallel(segment, model),
        **_precision(segment),
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm.eps,
        "layernorm_zero_centered_gamma": model.norm.zero_centered,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,  # sums of losses, divided once by the global token count
        "deterministic_mode": plan.deterministic,
        "mtp_num_layers": model.mtp.num_layers if model.mtp else None,
        "mtp_loss_scaling_factor": segment.mtp_loss,
        "attention_softmax_in_fp32": True,
    }
    if isinstance(model.attention, MLA):
        return MLATransformerConfig(**fields, **_latent(model.attention))
    return TransformerConfig(**fields, **_grouped(model.attention))


def parameter_dtype(segment: Segment) -> torch.dtype:
    """Return the dtype of parameters and activations."""
    return torch.float32 if isinstance(segment.precision, Fp32) else torch.bfloat16


def _shape(model: Model) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_dim,
        "num_attention_heads": model.attention.num_heads,
        "ffn_hidden_size": model.dense_ffn_dim or model.experts.ffn_dim,
        "init_method_std": model.init_std,
    }


def _latent(attention: MLA) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.qk_nope_head_dim,
        "qk_pos_emb_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,  # positions are each layer's own: megamoe/mcore/layer.py
    }


def _grouped(attention: GQA) -> dict[str, Any]:
    return {
        "num_query_groups": attention.num_kv_heads,
        "kv_channels": attention.head_dim,
        "qk_layernorm": attention.qk_norm,
    }


def _experts(model: Model, segment: Segment) -> dict[str, Any]:
    experts, router = model.experts, segment.router
    grouped = experts.num_groups > 1
    return {
        "num_moe_experts": experts.num_routed,
        "moe_layer_freq": [0 if model.is_dense(i) else 1 for i in range(model.num_layers)],
        "moe_ffn_hidden_size": experts.ffn_dim,
        "moe_shared_expert_intermediate_size": experts.num_shared * experts.ffn_dim or None,
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.score,
        "moe_router_topk_scaling_factor": experts.scaling_factor,
        "moe_router_num_groups": experts.num_groups if grouped else None,
        "moe_router_group_topk": experts.group_top_k if grouped else None,
        "moe_router_enable_expert_bias": experts.expert_bias,
        "moe_router_bias_update_rate": router.bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [
            router.aux_loss,
            router.sequence_aux_loss,
            router.global_aux_loss,
        ],
        "moe_z_loss_coeff": router.z_loss or None,
        **dispatcher_options(segment.layout),
    }


def _parallel(segment: Segment, model: Model) -> dict[str, Any]:
    layout = segment.layout
    chunks = layout.chunks(model)
    assert chunks, layout  # megamoe/plan/layout.py
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "pipeline_model_parallel_layout": "|".join(chunks),
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1,
        # Megatron-Core 0.16.1 accepts interleaving with batched p2p and then, with two pipeline
        # ranks, crosses messages to the one peer: wrong gradients. Its own check is in the
        # argument parser of Megatron-LM, which is not part of the package.
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
        "pipeline_dtype": parameter_dtype(segment),
    }


def _precision(segment: Segment) -> dict[str, Any]:
    dtype = parameter_dtype(segment)
    return {"bf16": dtype is torch.bfloat16, "params_dtype": dtype}
