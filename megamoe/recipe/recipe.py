"""A recipe: one published model and its whole curriculum, as data."""

from dataclasses import dataclass, fields
from typing import Literal

from megamoe.recipe.check import Checked, FieldError, PositiveFloat, PositiveInt
from megamoe.recipe.model import GQA, Model
from megamoe.recipe.optim import AdamW, Muon
from megamoe.recipe.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer(Checked):
    """The published tokenizer. `megamoe data tokenizer train` makes one of the same kind."""

    algorithm: Literal["byte-level-bpe", "sentencepiece-bpe", "sentencepiece-unigram"]
    vocab_size: PositiveInt  # entries; the model's table may be padded beyond it


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(Checked):
    """What the authors report of the finished model; None where they do not."""

    total_params: PositiveInt | None  # exact, of the released weights
    unreleased: tuple[Literal["mtp", "expert_bias"], ...]  # trained, and no part of total_params
    active_params: PositiveFloat | None  # as reported, rounded
    tokens: PositiveFloat | None
    gpus: PositiveInt | None
    gpu: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Checked):
    """Everything that is trained, and nothing of where."""

    name: str
    source: str
    assumed: tuple[str, ...]  # dotted names of every value that no source states
    published: Published
    model: Model
    tokenizer: Tokenizer
    optimizer: AdamW | Muon
    stages: tuple[Stage, ...]

    def check(self) -> None:
        """The parts must fit each other."""
        if not self.name.isidentifier():
            raise FieldError("name", f"{self.name!r} is not a plain word; give for example 'my_7b'")
        names = [stage.name for stage in self.stages]
        if not names:
            raise FieldError("stages", "() has no stage; give at least one")
        if len(set(names)) != len(names):
            raise FieldError("stages", f"{names} has a name twice; give each stage its own")
        if reserved := set(names) & {item.name for item in fields(self)}:
            raise FieldError("stages", f"name {reserved.pop()!r} is taken by a part of the recipe")
        if self.tokenizer.vocab_size > self.model.vocab_size:
            raise FieldError(
                "tokenizer.vocab_size",
                f"{self.tokenizer.vocab_size:,} exceeds model.vocab_size {self.model.vocab_size:,}",
            )
        self._check_unreleased()
        for stage in self.stages:
            self._check_stage(stage)

    def check_layouts(self) -> None:
        """Check that the model has what layouts share out, where no cluster is known.

        A plan checks it for itself: it can name the nearest layout that its cluster has room for.

        Raises:
            FieldError: experts or layers do not go round.
        """
        for stage in self.stages:
            try:
                stage.layout.check_model(self.model)
            except FieldError as error:
                raise FieldError(f"{stage.name}.layout.{error.field}", error.problem) from error

    def _check_interpolation(self, stage: Stage) -> None:
        if stage.rope_interpolation == 1:
            return
        rope = self.model.global_rope
        if rope is None or rope.yarn is not None:
            reason = "have no positions" if rope is None else "have YaRN, which scales them too"
            raise FieldError(
                f"{stage.name}.rope_interpolation",
                f"{stage.rope_interpolation:g}, but global layers {reason}; give 1",
            )

    def _check_pipeline(self, stage: Stage) -> None:
        try:
            stage.layout.chunks(self.model)
        except FieldError as error:
            raise FieldError(f"{stage.name}.layout.{error.field}", error.problem) from error

    def _check_unreleased(self) -> None:
        # A part that the model has not may be named: it was taken out with --set.
        parts = self.published.unreleased
        for part in parts:
            if parts.count(part) > 1:
                raise FieldError("published.unreleased", f"{part!r} is named twice; leave it out")

    def _check_stage(self, stage: Stage) -> None:
        if (stage.mtp_loss is None) != (self.model.mtp is None):
            raise FieldError(
                f"{stage.name}.mtp_loss",
                f"{stage.mtp_loss} contradicts model.mtp {self.model.mtp}; "
                + ("give None" if self.model.mtp is None else "give a weight"),
            )
        if stage.router.bias_update_rate > 0 and not self.model.experts.expert_bias:
            raise FieldError(
                f"{stage.name}.router.bias_update_rate",
                f"{stage.router.bias_update_rate:g} with model.experts.expert_bias False; give 0",
            )
        if "mla_up_projection" in stage.layout.recompute and isinstance(self.model.attention, GQA):
            raise FieldError(
                f"{stage.name}.layout.recompute",
                "'mla_up_projection' is no part of model.attention GQA; leave it out",
            )
        self._check_interpolation(stage)
        self._check_pipeline(stage)
