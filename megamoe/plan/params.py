"""Exact parameter counts of a model, by component."""

from dataclasses import dataclass

from megamoe.recipe.model import GQA, MLA, Model, PeriNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamCount:
    """Numbers of parameters. All layers of a kind together; a tied output table counts once."""

    input_table: int
    output_table: int  # 0 when tied to the input table
    attention: int  # matrices
    attention_norms: int  # of latents, or of queries and keys
    norms: int  # over the hidden dimension, the final one included
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    routed_experts_active: int  # those a token visits
    mtp: int  # the multi-token-prediction layers, bias included; they share both tables
    expert_bias: int  # of the main layers; kept in the checkpoint, not trained by gradient

    @property
    def main(self) -> int:
        """Every trained weight but those of multi-token prediction."""
        return (
            self.input_table
            + self.output_table
            + self.attention
            + self.attention_norms
            + self.norms
            + self.dense_mlp
            + self.router
            + self.shared_experts
            + self.routed_experts
        )

    @property
    def total(self) -> int:
        """Every number of the model: main, multi-token prediction and expert bias."""
        return self.main + self.mtp + self.expert_bias

    def released(self, unreleased: tuple[str, ...]) -> int:
        """Every number but those of the parts that are not in the released weights."""
        parts = {"mtp": self.mtp, "expert_bias": self.expert_bias}
        return self.total - sum(parts[part] for part in unreleased)

    @property
    def active(self) -> int:
        """Main parameters a token visits, both tables counted."""
        return self.main - self.routed_experts + self.routed_experts_active

    @property
    def active_without_input_table(self) -> int:
        """Main parameters a token is multiplied with; a tied table stays, as output."""
        return self.active - (self.input_table if self.output_table else 0)


def count_params(model: Model) -> ParamCount:
    """Count the parameters of a model. No matrix has a bias."""
    hidden, layers, experts = model.hidden_dim, model.num_layers, model.experts
    moe_layers = layers - model.num_dense_layers
    table = model.vocab_size * hidden
    return ParamCount(
        input_table=table,
        output_table=0 if model.tied_embeddings else table,
        attention=layers * attention_matrices(model),
        attention_norms=layers * attention_norms(model),
        norms=(
            model.num_dense_layers * norms_per_layer(model, is_dense=True)
            + moe_layers * norms_per_layer(model, is_dense=False)
            + 1
        )
        * hidden,
        dense_mlp=model.num_dense_layers * dense_mlp(model),
        router=moe_layers * hidden * experts.num_routed,
        shared_experts=moe_layers * experts.num_shared * one_expert(model),
        routed_experts=moe_layers * experts.num_routed * one_expert(model),
        routed_experts_active=moe_layers * experts.top_k * one_expert(model),
        mtp=_mtp(model),
        expert_bias=moe_layers * expert_bias(model),
    )


def attention_matrices(model: Model) -> int:
    """Return the parameters of one attention layer's matrices."""
    hidden, attention = model.hidden_dim, model.attention
    heads = attention.num_heads
    if isinstance(attention, GQA):
        width = attention.head_dim
        return 2 * hidden * heads * width + 2 * hidden * attention.num_kv_heads * width
    query_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank, kv_rank = attention.q_lora_rank, attention.kv_lora_rank
    queries = hidden * query_width if rank is None else rank * (hidden + query_width)
    down = hidden * (kv_rank + attention.qk_rope_head_dim)
    up = kv_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return queries + down + up + heads * attention.v_head_dim * hidden


def attention_norms(model: Model) -> int:
    """Return the parameters of the norms inside one attention layer."""
    match model.attention:
        case MLA(q_lora_rank=rank, kv_lora_rank=kv_rank):
            return (rank or 0) + kv_rank
        case GQA(qk_norm=True, head_dim=width):
            return 2 * width
        case _:
            return 0


def norms_per_layer(model: Model, *, is_dense: bool) -> int:
    """Return how many norms over the hidden dimension a layer has: before its branches, and after."""
    after_attention = isinstance(model.norm, PeriNorm)
    return 2 + after_attention + model.norms_mlp_output(is_dense=is_dense)


def dense_mlp(model: Model) -> int:
    """Return the parameters of one dense SwiGLU MLP; 0 where the model has none."""
    return 3 * model.hidden_dim * (model.dense_ffn_dim or 0)


def one_expert(model: Model) -> int:
    """Return the parameters of one SwiGLU expert."""
    return 3 * model.hidden_dim * model.experts.ffn_dim


def expert_bias(model: Model) -> int:
    """Return the biases of one router, one an expert; 0 where it has none."""
    return model.experts.num_routed if model.experts.expert_bias else 0


def _mtp(model: Model) -> int:
    """Each layer: projection of [hidden, embedding], a decoder layer, and three norms of its own."""
    if model.mtp is None:
        return 0
    hidden, experts = model.hidden_dim, model.experts
    moe = (experts.num_routed + experts.num_shared) * one_expert(model)
    moe += hidden * experts.num_routed + expert_bias(model)
    ffn = moe if model.mtp.ffn == "moe" else dense_mlp(model)
    layer = attention_matrices(model) + attention_norms(model) + ffn
    norms = (norms_per_layer(model, is_dense=model.mtp.ffn == "dense") + 3) * hidden
    return model.mtp.num_layers * (2 * hidden * hidden + layer + norms)


def layer_params(model: Model, layer: int) -> int:
    """Return every number of decoder layer `layer` (counted from 0), its expert bias included."""
    hidden, experts = model.hidden_dim, model.experts
    attention = attention_matrices(model) + attention_norms(model)
    norms = norms_per_layer(model, is_dense=model.is_dense(layer)) * hidden
    if model.is_dense(layer):
        return attention + norms + dense_mlp(model)
    moe = (experts.num_routed + experts.num_shared) * one_expert(model)
    return attention + norms + moe + hidden * experts.num_routed + expert_bias(model)
