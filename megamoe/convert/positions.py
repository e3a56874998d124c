"""Rotary positions as config.json says them: written from a recipe's, and compared with them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megamoe.nn.rotary import yarn_scale
from megamoe.recipe.model import Rope, Yarn

Parameters = dict[str, Any]
# What transformers take where a key is absent (modeling_rope_utils, `_compute_yarn_parameters`).
_BETA_FAST = 32.0
_BETA_SLOW = 1.0


def rope_parameters(rope: Rope) -> Parameters:
    """Return `rope_parameters` of a kind of layer."""
    yarn = rope.yarn
    if yarn is None:
        return {"rope_type": "default", "rope_theta": rope.base}
    written: Parameters = {
        "rope_type": "yarn",
        "rope_theta": rope.base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    # transformers ignore `mscale` where one of the two is 0, unless they are told the quotient.
    factor = _scale_of_rotated(yarn)
    if not math.isclose(factor, _attention_factor(written)):
        written["attention_factor"] = factor
    return written


def max_positions(rope: Rope | None, seq_len: int) -> int:
    """Return `max_position_embeddings`: what was trained, or what YaRN stretches positions to."""
    if rope is None or rope.yarn is None:
        return seq_len
    return max(seq_len, round(rope.yarn.factor * rope.yarn.original_seq_len))


def yarn_differences(yarn: Yarn, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a config.json with YaRN computes other positions: 'YaRN factor 8, not 4'.

    What is compared is what transformers compute, defaults of absent keys included.
    """
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    longest = given.get("max_position_embeddings")
    # where a configuration has it outside, transformers take it from there
    original = given.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", longest
    )
    factor = rope.get("factor")
    if factor is None and longest and original:
        factor = longest / original
    if factor is None:
        yield "YaRN without a factor"
        return
    found = {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": rope.get("beta_fast") or _BETA_FAST,
        "beta_slow": rope.get("beta_slow") or _BETA_SLOW,
        "truncate": rope.get("truncate", True),
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }
    wanted = {
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": True,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    for key, value in wanted.items():
        if found[key] != value:
            yield f"YaRN {key} {found[key]}, not {value}"
    scale = _attention_factor({**rope, "factor": factor})
    if not math.isclose(scale, _scale_of_rotated(yarn)):
        yield (
            f"YaRN attention_factor {scale:g}, not {_scale_of_rotated(yarn):g} "
            f"(of mscale {yarn.mscale:g} and mscale_all_dim {yarn.mscale_all_dim:g})"
        )


def _scale_of_rotated(yarn: Yarn) -> float:
    """Return what rotated queries and keys are multiplied by."""
    return yarn_scale(yarn, yarn.mscale) / yarn_scale(yarn, yarn.mscale_all_dim)


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """Return the same as transformers take it from a configuration."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _scale(rope["factor"], mscale) / _scale(rope["factor"], mscale_all_dim)
    return _scale(rope["factor"], 1.0)


def _scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
