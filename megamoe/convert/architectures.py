"""Which Hugging Face architecture can express a model: by its structure, each refusal with a reason."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from megamoe.convert.tables import TABLES, Table
from megamoe.errors import CheckpointError
from megamoe.plan.plan import Segment
from megamoe.recipe.model import GQA, MLA, DualNorm, Model, Mtp, PeriNorm, PreNorm

Problems = Iterator[str]
_DEEPSEEK_PREDICTION = Mtp(num_layers=1, ffn="moe")
_LATENT_EPS = 1e-6  # of the norms of MLA's latents in transformers, whatever the configuration says


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A model as it stands in one stage of its training."""

    model: Model
    interpolation: float  # positions of global layers are divided by it
    seq_len: int  # the longest so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A class of models on the Hub.

    Args:
        model_type: as config.json says.
        class_name: the class for language modelling.
        table: names of its tensors.
        has_yarn: YaRN is written for it and read.
    """

    model_type: str
    class_name: str
    has_yarn: bool = False

    @property
    def table(self) -> Table:
        """Names of its tensors."""
        return TABLES[self.model_type]

    @property
    def has_prediction(self) -> bool:
        """Tell whether its files hold multi-token prediction; otherwise it is left out."""
        return self.table.prediction is not None


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.model_type: architecture
        for architecture in (
            Architecture(model_type="exaone_moe", class_name="ExaoneMoeForCausalLM"),
            Architecture(model_type="mixtral", class_name="MixtralForCausalLM"),
            Architecture(model_type="keural_moe", class_name="KeuralMoECausalLM"),
            Architecture(
                model_type="deepseek_v3", class_name="DeepseekV3ForCausalLM", has_yarn=True
            ),
            Architecture(model_type="axk1", class_name="AXK1ForCausalLM", has_yarn=True),
            Architecture(model_type="vaetki", class_name="VaetkiForCausalLM"),
        )
    }
)
assert list(ARCHITECTURES) == list(TABLES)


def stage_of(model: Model, segments: tuple[Segment, ...], index: int) -> Stage:
    """Return the model as segment `index` trains it."""
    return Stage(
        model=model,
        interpolation=segments[index].rope_interpolation,
        seq_len=max(segment.seq_len for segment in segments[: index + 1]),
    )


def architecture_for(stage: Stage, place: str) -> Architecture:
    """Return the first architecture that expresses a model.

    Raises:
        CheckpointError: none does; says for each the first reason.
    """
    reasons = []
    for architecture in ARCHITECTURES.values():
        found = list(problems(architecture, stage))
        if not found:
            return architecture
        reasons.append((len(found), f"{architecture.model_type}: {found[0]}"))
    reasons.sort(key=lambda reason: reason[0])  # the nearest first
    raise CheckpointError(
        f"{place}: no Hugging Face architecture expresses this model "
        f"({'; '.join(text for _, text in reasons)})"
    )


def without_prediction(architecture: Architecture, model: Model) -> Model:
    """Return the part of a model that an architecture's files hold."""
    return model if architecture.has_prediction else replace(model, mtp=None)


def remarks(architecture: Architecture, model: Model) -> Iterator[str]:
    """Yield what readers of an architecture may not make of a model."""
    if architecture.table.copies and model.mtp not in (None, _DEEPSEEK_PREDICTION):
        yield (
            f"readers of {architecture.model_type} know one layer of multi-token prediction, with experts; "
            f"{model.mtp} is written, and what they make of it is not known"
        )


def problems(architecture: Architecture, stage: Stage) -> Problems:
    """Yield what of a model an architecture cannot express."""
    model = stage.model
    for name, rope in (("local_rope", model.local_rope), ("global_rope", model.global_rope)):
        if rope is not None and rope.yarn is not None and not architecture.has_yarn:
            readers = [other.model_type for other in ARCHITECTURES.values() if other.has_yarn]
            yield f"{name}.yarn, which is converted for {' and '.join(readers)} alone"
        if rope is not None and rope.interleaved != isinstance(model.attention, MLA):
            yield f"{name}.interleaved {rope.interleaved}"
    yield from _PROBLEMS[architecture.model_type](stage)


def _exaone_moe(stage: Stage) -> Problems:
    model = stage.model
    yield from _is_attention(model, GQA)
    if isinstance(model.attention, GQA) and not model.attention.qk_norm:
        yield "attention without QK-norm"
    yield from _is_norm(model, PreNorm, zero_centered=False)
    yield from _deepseek_routing(model)
    if model.window is None:
        yield "no layer with a window"
    elif model.local_rope is None or model.global_rope is not None:
        yield "positions on other layers than those with a window"
    if model.mtp is not None and model.mtp.num_layers > 1:
        yield f"mtp.num_layers {model.mtp.num_layers}"


def _mixtral(stage: Stage) -> Problems:
    model = stage.model
    if len(set(model.window_pattern)) > 1:
        yield f"window_pattern {model.window_pattern!r}, layers of two kinds"
    yield from _softmax_experts(stage)


def _keural(stage: Stage) -> Problems:
    if not stage.model.tied_embeddings:
        yield "an output table of its own"
    yield from _softmax_experts(stage)
    if stage.model.local_rope != stage.model.global_rope:
        yield "positions that differ between layers"


def _deepseek_v3(stage: Stage) -> Problems:
    yield from _is_norm(stage.model, PreNorm, zero_centered=False)
    yield from _latent(stage)


def _axk1(stage: Stage) -> Problems:
    yield from _is_norm(stage.model, DualNorm, zero_centered=False)
    yield from _latent(stage)
    if isinstance(stage.model.attention, MLA) and stage.model.attention.q_lora_rank is None:
        yield "queries without a latent"


def _vaetki(stage: Stage) -> Problems:
    model = stage.model
    yield from _is_attention(model, MLA)
    yield from _is_norm(model, PeriNorm, zero_centered=True)
    yield from _deepseek_routing(model)
    if isinstance(model.attention, MLA) and model.attention.q_lora_rank is None:
        yield "queries without a latent"
    if set(model.window_pattern) != {"L", "G"}:
        yield f"window_pattern {model.window_pattern!r}, layers of one kind"
    if model.experts.expert_bias:
        yield "experts.expert_bias True"


def _latent(stage: Stage) -> Problems:
    model = stage.model
    yield from _is_attention(model, MLA)
    yield from _deepseek_routing(model)
    yield from _no_interpolation(stage)
    if model.window is not None:
        yield "layers with a window"
    if model.norm.eps != _LATENT_EPS:
        yield f"norm.eps {model.norm.eps:g}, the class has {_LATENT_EPS:g} for the norms of latents"


def _softmax_experts(stage: Stage) -> Problems:
    model, experts = stage.model, stage.model.experts
    yield from _is_attention(model, GQA)
    if isinstance(model.attention, GQA) and model.attention.qk_norm:
        yield "attention with QK-norm"
    yield from _is_norm(model, PreNorm, zero_centered=False)
    yield from _no_interpolation(stage)
    if experts.score != "softmax":
        yield f"experts.score {experts.score!r}"
    if experts.scaling_factor != 1:
        yield f"experts.scaling_factor {experts.scaling_factor:g}"
    if experts.num_shared or model.num_dense_layers:
        yield "shared experts or dense layers"
    if experts.num_groups > 1 or experts.expert_bias:
        yield "groups of experts or an expert bias"
    if None in _ropes(model):
        yield "layers without positions"


def _deepseek_routing(model: Model) -> Problems:
    experts = model.experts
    if experts.score != "sigmoid":
        yield f"experts.score {experts.score!r}"
    if not experts.num_shared:
        yield "no shared expert"
    if experts.num_groups > 1 and experts.top_k != 2 * experts.group_top_k:
        yield "groups chosen by other than their two best experts"


def _no_interpolation(stage: Stage) -> Problems:
    if stage.interpolation != 1 and "G" in stage.model.window_pattern:
        yield f"rope_interpolation {stage.interpolation:g}"


def _ropes(model: Model) -> list[object]:
    kinds = (("L", model.local_rope), ("G", model.global_rope))
    return [rope for letter, rope in kinds if letter in model.window_pattern]


def _is_attention(model: Model, kind: type) -> Problems:
    if not isinstance(model.attention, kind):
        yield f"attention {type(model.attention).__name__}"


def _is_norm(model: Model, kind: type, *, zero_centered: bool) -> Problems:
    if not isinstance(model.norm, kind) or model.norm.zero_centered != zero_centered:
        centred = ", zero-centred" if model.norm.zero_centered else ""
        yield f"norm {type(model.norm).__name__}{centred}"


_PROBLEMS = MappingProxyType(
    {
        "exaone_moe": _exaone_moe,
        "mixtral": _mixtral,
        "keural_moe": _keural,
        "deepseek_v3": _deepseek_v3,
        "axk1": _axk1,
        "vaetki": _vaetki,
    }
)
