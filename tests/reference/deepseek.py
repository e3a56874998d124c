"""Weights of the reference from a folder with DeepSeek-V3's names, read without megamoe.convert.

Names of prediction are those of README_WEIGHTS.md in deepseek-ai/DeepSeek-V3: layers after the last
decoder layer. `eh_proj` multiplies the normed embedding of the next token and the normed hidden
state, in this order: so do vLLM's deepseek_mtp.py and SGLang's deepseek_nextn.py, which serve the
released weights, and `Reference._predict_further`. Eq. 21 of the report has the other order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megamoe.recipe import Model

Tensors = Mapping[str, Tensor]
_ATTENTION = {
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}


def reference_weights(theirs: Tensors, model: Model) -> dict[str, Tensor]:
    """Return the weights by the names of `tests.reference.model`, in float64."""
    theirs = {name: x.double() for name, x in theirs.items()}
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    if not model.tied_embeddings:
        ours["output_layer.weight"] = theirs["lm_head.weight"]
    for i in range(model.num_layers):
        ours |= _layer(f"decoder.layers.{i}", f"model.layers.{i}", theirs)
    for k in range(model.mtp.num_layers if model.mtp else 0):
        name, their_name = f"mtp.layers.{k}", f"model.layers.{model.num_layers + k}"
        for part in ("enorm", "hnorm", "eh_proj"):
            ours[f"{name}.{part}.weight"] = theirs[f"{their_name}.{part}.weight"]
        ours[f"{name}.final_layernorm.weight"] = theirs[f"{their_name}.shared_head.norm.weight"]
        ours |= _layer(f"{name}.transformer_layer", their_name, theirs)
    return ours


def _layer(name: str, their_name: str, theirs: Tensors) -> dict[str, Tensor]:
    own = {
        key.removeprefix(f"{their_name}.").removesuffix(".weight"): x
        for key, x in theirs.items()
        if key.startswith(f"{their_name}.")
    }
    ours = {f"self_attention.{a}": own[f"self_attn.{b}"] for a, b in _ATTENTION.items()}
    ours["input_layernorm"] = own["input_layernorm"]
    ours["pre_mlp_layernorm"] = own["post_attention_layernorm"]
    if "post_mlp_layernorm" in own:
        ours["mlp_bda.norm"] = own["post_mlp_layernorm"]
    if "mlp.gate" in own:
        ours["mlp.router"] = own["mlp.gate"]
        ours |= _mlp("mlp.shared_experts", own)
        experts = [_mlp(f"mlp.experts.{e}", own) for e in range(len(own["mlp.gate"]))]
        stacked = [torch.stack([list(expert.values())[i] for expert in experts]) for i in range(2)]
    else:
        ours |= _mlp("mlp", own)
        stacked = []
    weights = {f"{name}.{key}.weight": x for key, x in ours.items()}
    weights |= {f"{name}.mlp.experts.weight{i}": x for i, x in enumerate(stacked, start=1)}
    if "mlp.gate.e_score_correction_bias" in own:
        weights[f"{name}.mlp.router.expert_bias"] = own["mlp.gate.e_score_correction_bias"]
    return weights


def _mlp(name: str, own: Tensors) -> dict[str, Tensor]:
    """Return both matrices: gate above up, then down."""
    gate, up, down = (own[f"{name}.{part}_proj"] for part in ("gate", "up", "down"))
    return {f"{name}.linear_fc1": torch.cat((gate, up)), f"{name}.linear_fc2": down}
