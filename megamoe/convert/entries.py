"""A table and a model together: every tensor of ours with its rule and every tensor of theirs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megamoe.convert.ours import EXPERTS, Shape, our_tensors
from megamoe.convert.rules import RotaryLast, Rule, Same
from megamoe.convert.tables import Line, Table
from megamoe.recipe.model import DualNorm, Model

_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.)?(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of ours, or one expert of it, and the tensors of theirs that it becomes."""

    ours: str
    index: tuple[int, int] | None  # expert and number of experts
    shape: Shape  # of the tensor, or of the expert
    rule: Rule
    theirs: tuple[tuple[str, Shape], ...]
    is_copy: bool = False  # of a tensor that another entry holds; a folder may do without

    @property
    def is_float32(self) -> bool:
        """Tell whether it is float32 whatever the weights are: a bias moves in steps of 1e-4."""
        return self.ours.endswith(".expert_bias")


def entries(table: Table, model: Model, *, rotary_is_split: bool = False) -> Iterator[Entry]:
    """Yield every tensor of a model, experts one by one, in the order of our layers; then the copies.

    Args:
        table: the names.
        model: the structure, which the table's architecture can express.
        rotary_is_split: their rotary rows of MLA pair i with i + d/2.
    """
    for ours, shape in our_tensors(model).items():
        prefix, (rule, names) = _line(table, model, ours)
        if isinstance(rule, RotaryLast):
            rule = replace(rule, is_split=rotary_is_split)
        bound = rule.bind(model)
        count = shape[0] if EXPERTS in ours else None
        for expert in range(count or 1):
            own = shape[1:] if count else shape
            # Shapes of their tensors follow from the rule, on a tensor without values.
            parts = bound.split(torch.empty(own, device="meta"))
            yield Entry(
                ours=ours,
                index=(expert, count) if count else None,
                shape=own,
                rule=bound,
                theirs=tuple(
                    (prefix + name.format(expert), tuple(part.shape))
                    for name, part in zip(names, parts, strict=True)
                ),
            )
    yield from _copies(table, model)


def useless_norms(table: Table, model: Model) -> Mapping[str, Shape]:
    """Return the norms after dense MLPs that a folder may hold and a model does not apply.

    The released weights of A.X-K1 have one in each layer, and transformers' axk1 drops it so.
    """
    if not isinstance(model.norm, DualNorm) or model.norm.after_dense_mlp:
        return {}
    normed = replace(model, norm=replace(model.norm, after_dense_mlp=True))
    own = our_tensors(model)
    found = {name: shape for name, shape in our_tensors(normed).items() if name not in own}
    lines = {name: _line(table, model, name) for name in found}
    return {prefix + names[0]: found[ours] for ours, (prefix, (_, names)) in lines.items()}


def usual_name(table: Table, name: str) -> str:
    """Return the name that a table has for a tensor which some folders call otherwise."""
    for other, usual in table.other_names:
        if name.endswith(other):
            return name.removesuffix(other) + usual
        if not usual and name.startswith(other):
            name = name.removeprefix(other)
    return name


def _copies(table: Table, model: Model) -> Iterator[Entry]:
    """Yield the tables once more for each layer of multi-token prediction."""
    for number in range(model.mtp.num_layers if model.mtp else 0):
        for ours, theirs in table.copies:
            name = table.copies[0][0] if model.tied_embeddings else ours
            shape = (model.vocab_size, model.hidden_dim)
            prefix = _prefix_of_prediction(table, model, number)
            yield Entry(
                ours=name,
                index=None,
                shape=shape,
                rule=Same(),
                theirs=((prefix + theirs, shape),),
                is_copy=True,
            )


def _prefix_of_prediction(table: Table, model: Model, number: int) -> str:
    assert table.prediction, "prediction is refused by the architecture"
    first = model.num_layers if table.prediction == table.layer else 0
    return table.prediction.format(first + number)


def _line(table: Table, model: Model, ours: str) -> tuple[str, Line]:
    if ours in table.once:
        return "", table.once[ours]
    found = _LAYER.fullmatch(ours)
    assert found, ours
    kind, number, rest = found.groups()
    if kind == "decoder":
        return table.layer.format(number), table.in_layer[rest]
    return _prefix_of_prediction(table, model, int(number)), table.in_layer[rest]
