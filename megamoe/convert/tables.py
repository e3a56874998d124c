"""Names of tensors, ours and theirs, one table for each Hugging Face architecture.

A line: our name without its prefix, the rule, their names without theirs. `{}` is the expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megamoe.convert.rules import Halves, Heads, RotaryLast, Rule, Same

Line = tuple[Rule, tuple[str, ...]]
Lines = Mapping[str, Line]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The names of one architecture.

    Args:
        layer: their prefix of a decoder layer, with `{}` for its number.
        once: tensors outside layers.
        in_layer: tensors of a decoder layer, of any kind.
        prediction: their prefix of a layer of multi-token prediction; where it is that of decoder
            layers, its number follows theirs. None: has none.
        copies: our tables that each layer of multi-token prediction holds once more, and their names.
        other_names: endings, or beginnings, by which some folders have a name, and the usual one.
    """

    layer: str
    once: Lines
    in_layer: Lines
    prediction: str | None = None
    copies: tuple[tuple[str, str], ...] = ()
    other_names: tuple[tuple[str, str], ...] = ()


def _same(theirs: str) -> Line:
    return Same(), (theirs,)


def _mlp(ours: str, theirs: str, names: tuple[str, str, str]) -> dict[str, Line]:
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    return {
        f"{ours}.linear_fc1.weight": (Halves(), (gate, up)),
        f"{ours}.linear_fc2.weight": _same(down),
    }


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ONCE: dict[str, Line] = {
    "embedding.word_embeddings.weight": _same("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": _same("model.norm.weight"),
    "output_layer.weight": _same("lm_head.weight"),
}
_GROUPED: dict[str, Line] = {
    "self_attention.linear_qkv.weight": (
        Heads(),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.linear_proj.weight": _same("self_attn.o_proj.weight"),
    "self_attention.q_layernorm.weight": _same("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": _same("self_attn.k_norm.weight"),
}
_LATENT: dict[str, Line] = {
    "self_attention.linear_q_proj.weight": (
        RotaryLast(per_head=True),
        ("self_attn.q_proj.weight",),
    ),
    "self_attention.linear_q_down_proj.weight": _same("self_attn.q_a_proj.weight"),
    "self_attention.q_layernorm.weight": _same("self_attn.q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": (
        RotaryLast(per_head=True),
        ("self_attn.q_b_proj.weight",),
    ),
    "self_attention.linear_kv_down_proj.weight": (
        RotaryLast(per_head=False),
        ("self_attn.kv_a_proj_with_mqa.weight",),
    ),
    "self_attention.kv_layernorm.weight": _same("self_attn.kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": _same("self_attn.kv_b_proj.weight"),
    "self_attention.linear_proj.weight": _same("self_attn.o_proj.weight"),
}
_TWO_NORMS: dict[str, Line] = {
    "input_layernorm.weight": _same("input_layernorm.weight"),
    "pre_mlp_layernorm.weight": _same("post_attention_layernorm.weight"),
}
_MLPS: dict[str, Line] = {
    **_mlp("mlp", "mlp", _PROJECTIONS),
    "mlp.router.weight": _same("mlp.gate.weight"),
    **_mlp("mlp.experts.experts", "mlp.experts.{}", _PROJECTIONS),
    **_mlp("mlp.shared_experts", "mlp.shared_experts", _PROJECTIONS),
}
_BIAS_OF_GATE = {"mlp.router.expert_bias": _same("mlp.gate.e_score_correction_bias")}
# Names of DeepSeek-V3's files (its README_WEIGHTS.md). Columns of eh_proj: the embedding's, then the
# hidden state's, as in Megatron-core (multi_token_prediction.py, `_concat_embeddings`) and in the
# readers of those files (vLLM's deepseek_mtp.py, SGLang's deepseek_nextn.py); eq. 21 of the report
# writes them the other way round.
_PREDICTION: dict[str, Line] = {
    "enorm.weight": _same("enorm.weight"),
    "hnorm.weight": _same("hnorm.weight"),
    "eh_proj.weight": _same("eh_proj.weight"),
    "final_layernorm.weight": _same("shared_head.norm.weight"),
}
# vLLM takes the tables of prediction from these copies; without them it draws from memory as it is.
_COPIES = (
    ("embedding.word_embeddings.weight", "embed_tokens.weight"),
    ("output_layer.weight", "shared_head.head.weight"),
)

EXAONE_MOE = Table(
    layer="model.layers.{}.",
    once={
        **_ONCE,
        "mtp.layers.0.enorm.weight": _same("mtp.pre_fc_norm_embedding.weight"),
        "mtp.layers.0.hnorm.weight": _same("mtp.pre_fc_norm_hidden.weight"),
        "mtp.layers.0.eh_proj.weight": _same("mtp.fc.weight"),
        "mtp.layers.0.final_layernorm.weight": _same("mtp.norm.weight"),
    },
    in_layer={
        **_GROUPED,
        **_TWO_NORMS,
        **_MLPS,
        "mlp.router.expert_bias": _same("mlp.e_score_correction_bias"),
    },
    prediction="mtp.layers.{}.",
    other_names=((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),),
)
AXK1 = Table(
    layer="model.layers.{}.",
    once=_ONCE,
    in_layer={
        **_LATENT,
        **_TWO_NORMS,
        **_MLPS,
        **_BIAS_OF_GATE,
        **_PREDICTION,
        "mlp_bda.norm.weight": _same("post_mlp_layernorm.weight"),
    },
    prediction="model.layers.{}.",
    copies=_COPIES,
    other_names=((".mlp.post_mlp_layernorm.weight", ".post_mlp_layernorm.weight"),),
)
DEEPSEEK_V3 = Table(
    layer="model.layers.{}.",
    once=_ONCE,
    in_layer={**_LATENT, **_TWO_NORMS, **_MLPS, **_BIAS_OF_GATE, **_PREDICTION},
    prediction="model.layers.{}.",
    copies=_COPIES,
)
VAETKI = Table(
    layer="model.layers.{}.",
    once=_ONCE,
    in_layer={
        **_LATENT,
        **_MLPS,
        "input_layernorm.weight": _same("input_layernorm.weight"),
        "self_attn_bda.norm.weight": _same("post_attention_layernorm.weight"),
        "pre_mlp_layernorm.weight": _same("pre_mlp_layernorm.weight"),
        "mlp_bda.norm.weight": _same("post_mlp_layernorm.weight"),
    },
)
MIXTRAL = Table(
    layer="model.layers.{}.",
    once=_ONCE,
    in_layer={
        **_GROUPED,
        **_TWO_NORMS,
        "mlp.router.weight": _same("block_sparse_moe.gate.weight"),
        **_mlp("mlp.experts.experts", "block_sparse_moe.experts.{}", ("w1", "w3", "w2")),
    },
)
KEURAL = Table(
    layer="layers.{}.",
    once={
        "embedding.word_embeddings.weight": _same("embed_tokens.weight"),
        "decoder.final_layernorm.weight": _same("norm.weight"),
    },
    in_layer={
        "input_layernorm.weight": _same("attn_norm.weight"),
        **{
            ours: (rule, tuple(name.replace("self_attn.", "attn.") for name in theirs))
            for ours, (rule, theirs) in _GROUPED.items()
        },
        "pre_mlp_layernorm.weight": _same("moe_norm.weight"),
        "mlp.router.weight": _same("moe.gate.weight"),
        **_mlp("mlp.experts.experts", "moe.experts.{}", _PROJECTIONS),
    },
    other_names=(("_orig_mod.", ""), ("module.", ""), ("model.", "")),
)

# By HF `model_type`, in the order in which an export looks for one that fits.
TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "exaone_moe": EXAONE_MOE,
        "mixtral": MIXTRAL,
        "keural_moe": KEURAL,
        "deepseek_v3": DEEPSEEK_V3,
        "axk1": AXK1,
        "vaetki": VAETKI,
    }
)
