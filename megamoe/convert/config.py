"""config.json of each architecture, written from a model and compared with one."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from megamoe.convert.architectures import Architecture, Stage
from megamoe.convert.positions import max_positions, rope_parameters, yarn_differences
from megamoe.convert.remote_code import code_keys, needs_code
from megamoe.recipe.model import GQA, MLA, Model, Rope

Config = dict[str, Any]
_PUBLISHED_INTERPOLATION = 8.0  # VAETKI: what its readers take for `rope_scaling: null`
# What does not change what a model computes, or is compared in a way of its own.
_FREE = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "initializer_range",
        "max_position_embeddings",
        "model_type",
        "num_nextn_predict_layers",  # the tensors tell: folders without them say 1 too
        "rope_interleave",
        "rope_parameters",
        "rope_scaling",
        "topk_method",
    }
)


def config_of(architecture: Architecture, stage: Stage) -> Config:
    """Return config.json without dtype and special tokens."""
    model = stage.model
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": max_positions(model.global_rope, stage.seq_len),
        "tie_word_embeddings": model.tied_embeddings,
        "num_experts_per_tok": model.experts.top_k,
        **_CONFIGS[architecture.model_type](stage),
        **(code_keys(architecture) if needs_code(architecture, model) else {}),
    }


def differences(
    architecture: Architecture, stage: Stage, given: Mapping[str, Any]
) -> Iterator[str]:
    """Yield where a config.json says another model than the plan: 'hidden_size 64, not 32'.

    Layers of prediction are told by the tensors, so a list of none of them is not compared.
    """
    wanted = config_of(architecture, stage)
    if "quantization_config" in given:
        yield "quantization_config, whose weights are not read"
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    flat = {key: value for key, value in given.items() if value is not None and value != []}
    flat.setdefault("sliding_window", None)  # null, or not there: no window
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    for key, value in wanted.items():
        if key not in _FREE and value != [] and flat.get(key, value) != value:
            yield f"{key} {flat[key]}, not {value}"
    if architecture.model_type == "vaetki":
        yield from _interpolation_differences(stage, rope)
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = wanted.get("rope_scaling") or wanted.get("rope_parameters") or {}
    if kind != known.get("rope_type", "default"):
        yield f"rope_type {kind!r}, not {known.get('rope_type', 'default')!r}"
    elif kind == "yarn":
        assert stage.model.global_rope is not None, stage
        assert stage.model.global_rope.yarn is not None, stage
        yield from yarn_differences(stage.model.global_rope.yarn, given)


def _interpolation_differences(stage: Stage, rope: Mapping[str, Any]) -> Iterator[str]:
    """Yield by what positions of global layers are divided, if it is not what the stage does."""
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in (None, "default", "linear"):  # null, as transformers save it: default
        yield f"rope_type {kind!r}, not 'linear' or none"
        return
    factor = rope.get("factor") if kind == "linear" else _PUBLISHED_INTERPOLATION
    if not isinstance(factor, int | float):
        yield f"rope_type 'linear' with factor {factor}, not {stage.interpolation:g}"
    elif factor != stage.interpolation:
        yield (
            f"rope_interpolation {factor:g}, not {stage.interpolation:g} (give --tokens-seen of a "
            f"stage that has it, or the plan --set STAGE.rope_interpolation={factor:g})"
        )


def rotary_is_split(given: Mapping[str, Any]) -> bool:
    """Tell whether MLA's rotary rows pair i with i + d/2, as `rope_interleave: false` says."""
    return given.get("rope_interleave") is False


def _exaone_moe(stage: Stage) -> Config:
    model, rope = stage.model, stage.model.local_rope
    assert rope is not None, model
    prediction = _prediction(model)
    return {
        **_grouped(model),
        **_rope(rope),
        **_routing(model),
        "num_experts": model.experts.num_routed,
        "num_shared_experts": model.experts.num_shared,
        "moe_intermediate_size": model.experts.ffn_dim,
        "intermediate_size": model.dense_ffn_dim or model.experts.ffn_dim,
        "first_k_dense_replace": model.num_dense_layers,
        "mlp_layer_types": [
            "dense" if model.is_dense(i) else "sparse" for i in range(model.num_layers)
        ],
        "layer_types": _layer_types(model),
        "sliding_window": model.window,
        "sliding_window_pattern": model.window_pattern,
        **prediction,
        "mtp_layer_types": ["full_attention"] * prediction["num_nextn_predict_layers"],
    }


def _mixtral(stage: Stage) -> Config:
    model = stage.model
    rope = model.local_rope or model.global_rope
    assert rope is not None, model
    return {
        **_grouped(model),
        **_rope(rope),
        "num_local_experts": model.experts.num_routed,
        "intermediate_size": model.experts.ffn_dim,
        "sliding_window": model.window,
    }


def _keural(stage: Stage) -> Config:
    return {**_mixtral(stage), "layer_types": _layer_types(stage.model)}


def _deepseek_v3(stage: Stage) -> Config:
    rope = stage.model.global_rope
    assert rope is not None, stage
    return {**_latent(stage.model), **_rope(rope), **_prediction(stage.model)}


def _axk1(stage: Stage) -> Config:
    model, rope = stage.model, stage.model.global_rope
    assert rope is not None, stage
    kinds = ["dense" if model.is_dense(i) else "sparse" for i in range(model.num_layers)]
    return {
        **_latent(model),
        **_rope(rope),
        **_prediction(model),
        "mlp_layer_types": kinds,
        # whether there is a bias; transformers' class always has one
        "topk_method": "noaux_tc" if model.experts.expert_bias else None,
    }


def _vaetki(stage: Stage) -> Config:
    model = stage.model
    assert model.local_rope is not None, stage
    assert model.global_rope is not None, stage
    scaling: Config | None = {"rope_type": "linear", "factor": stage.interpolation}
    if stage.interpolation == _PUBLISHED_INTERPOLATION:
        scaling = None
    return {
        **_latent(model),
        "layer_types": _layer_types(model),
        "sliding_window": model.window,
        "rope_theta": model.local_rope.base,
        "rope_theta_local": model.local_rope.base,
        "rope_theta_global": model.global_rope.base,
        "rope_scaling": scaling,
    }


def _latent(model: Model) -> Config:
    attention, experts = model.attention, model.experts
    assert isinstance(attention, MLA), attention
    return {
        **_routing(model),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_interleave": True,
        "attention_bias": False,
        "n_routed_experts": experts.num_routed,
        "n_shared_experts": experts.num_shared,
        "moe_intermediate_size": experts.ffn_dim,
        "intermediate_size": model.dense_ffn_dim or experts.ffn_dim,
        "first_k_dense_replace": model.num_dense_layers,
    }


def _grouped(model: Model) -> Config:
    attention = model.attention
    assert isinstance(attention, GQA), attention
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    }


def _routing(model: Model) -> Config:
    experts = model.experts
    return {
        "scoring_func": "sigmoid",
        # a single choice is not divided by itself
        "norm_topk_prob": experts.top_k > 1,
        "routed_scaling_factor": experts.scaling_factor,
        "n_group": experts.num_groups,
        "topk_group": experts.group_top_k,
    }


def _prediction(model: Model) -> Config:
    return {"num_nextn_predict_layers": model.mtp.num_layers if model.mtp else 0}


def _rope(rope: Rope) -> Config:
    """Return positions, for readers before and since transformers 5."""
    return {"rope_theta": rope.base, "rope_parameters": rope_parameters(rope)}


def _layer_types(model: Model) -> list[str]:
    kinds = {True: "sliding_attention", False: "full_attention"}
    return [kinds[model.is_local(i)] for i in range(model.num_layers)]


_CONFIGS = MappingProxyType(
    {
        "exaone_moe": _exaone_moe,
        "mixtral": _mixtral,
        "keural_moe": _keural,
        "deepseek_v3": _deepseek_v3,
        "axk1": _axk1,
        "vaetki": _vaetki,
    }
)
