"""The tensors of a model in our checkpoints: names and shapes, from the model's structure alone."""

from collections.abc import Iterator

from megamoe.checkpoints.tensors import SHARES
from megamoe.recipe.model import GQA, Model, PeriNorm

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]
EXPERTS = ".mlp.experts.experts."  # in the names of weights whose first dimension is the expert


def our_tensors(model: Model) -> dict[str, Shape]:
    """Return name and shape of every tensor that makes the model's outputs."""
    hidden, table = model.hidden_dim, (model.vocab_size, model.hidden_dim)
    tensors: dict[str, Shape] = {"embedding.word_embeddings.weight": table}
    for i in range(model.num_layers):
        tensors.update(_layer(f"decoder.layers.{i}", model, is_dense=model.is_dense(i)))
    tensors["decoder.final_layernorm.weight"] = (hidden,)
    if not model.tied_embeddings:
        tensors["output_layer.weight"] = table
    for k in range(model.mtp.num_layers if model.mtp else 0):
        name = f"mtp.layers.{k}"
        tensors |= {f"{name}.{part}.weight": (hidden,) for part in ("enorm", "hnorm")}
        tensors[f"{name}.eh_proj.weight"] = (hidden, 2 * hidden)
        is_dense = model.mtp is not None and model.mtp.ffn == "dense"
        tensors.update(_layer(f"{name}.transformer_layer", model, is_dense=is_dense))
        tensors[f"{name}.final_layernorm.weight"] = (hidden,)
    return tensors


def share_tensors(model: Model) -> dict[str, Shape]:
    """Return the expert shares that routers balance by; they make no output."""
    return {
        name.removesuffix("weight") + SHARES: (shape[0],)
        for name, shape in our_tensors(model).items()
        if name.endswith(".router.weight")
    }


def _layer(name: str, model: Model, *, is_dense: bool) -> Named:
    hidden = (model.hidden_dim,)
    yield f"{name}.input_layernorm.weight", hidden
    for part, shape in _grouped(model) if isinstance(model.attention, GQA) else _latent(model):
        yield f"{name}.self_attention.{part}.weight", shape
    if isinstance(model.norm, PeriNorm):
        yield f"{name}.self_attn_bda.norm.weight", hidden
    yield f"{name}.pre_mlp_layernorm.weight", hidden
    if is_dense:
        assert model.dense_ffn_dim is not None, name
        yield from _mlp(f"{name}.mlp", model.dense_ffn_dim, model)
    else:
        yield from _experts(f"{name}.mlp", model)
    if model.norms_mlp_output(is_dense=is_dense):
        yield f"{name}.mlp_bda.norm.weight", hidden


def _grouped(model: Model) -> Named:
    attention = model.attention
    assert isinstance(attention, GQA), attention
    heads, width = attention.num_heads, attention.head_dim
    yield "linear_qkv", ((heads + 2 * attention.num_kv_heads) * width, model.hidden_dim)
    yield "linear_proj", (model.hidden_dim, heads * width)
    if attention.qk_norm:
        yield from ((part, (width,)) for part in ("q_layernorm", "k_layernorm"))


def _latent(model: Model) -> Named:
    a = model.attention
    assert not isinstance(a, GQA), a
    query = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    if a.q_lora_rank is None:
        yield "linear_q_proj", (query, model.hidden_dim)
    else:
        yield "linear_q_down_proj", (a.q_lora_rank, model.hidden_dim)
        yield "q_layernorm", (a.q_lora_rank,)
        yield "linear_q_up_proj", (query, a.q_lora_rank)
    yield "linear_kv_down_proj", (a.kv_lora_rank + a.qk_rope_head_dim, model.hidden_dim)
    yield "kv_layernorm", (a.kv_lora_rank,)
    up = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    yield "linear_kv_up_proj", (up, a.kv_lora_rank)
    yield "linear_proj", (model.hidden_dim, a.num_heads * a.v_head_dim)


def _mlp(name: str, ffn_dim: int, model: Model) -> Named:
    yield f"{name}.linear_fc1.weight", (2 * ffn_dim, model.hidden_dim)
    yield f"{name}.linear_fc2.weight", (model.hidden_dim, ffn_dim)


def _experts(name: str, model: Model) -> Named:
    experts = model.experts
    yield f"{name}.router.weight", (experts.num_routed, model.hidden_dim)
    if experts.expert_bias:
        yield f"{name}.router.expert_bias", (experts.num_routed,)
    for part, shape in _mlp("experts.experts", experts.ffn_dim, model):
        yield f"{name}.{part}", (experts.num_routed, *shape)
    if experts.num_shared:
        yield from _mlp(f"{name}.shared_experts", experts.num_shared * experts.ffn_dim, model)
