"""Code beside exported weights, for models that no class of transformers computes."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megamoe.convert.architectures import Architecture
from megamoe.recipe.model import Model

_FOLDER = Path(__file__).parent / "modeling"
_CONFIGURATION = "configuration_megamoe"
_MODELING = "modeling_megamoe"
# By architecture: the class of its configuration, and the model_type that no class of transformers
# answers to. A.X K1 has the one of its first release: as axk1 it would load without the code, and
# give other logits without a word.
_CONFIGS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "keural_moe": ("KeuralConfig", "keural_moe"),
        "axk1": ("NormedAXK1Config", "AXK1"),
        "vaetki": ("VaetkiConfig", "vaetki"),
    }
)


def needs_code(architecture: Architecture, model: Model) -> bool:
    """Tell whether no class of transformers computes a model.

    Their axk1 (5.23, AXK1DecoderLayer) norms the output of MoE layers, and not that of dense MLPs.
    """
    if architecture.model_type == "axk1":
        return model.num_dense_layers > 0 and model.norms_mlp_output(is_dense=True)
    return architecture.model_type in _CONFIGS


def code_keys(architecture: Architecture) -> dict[str, Any]:
    """Return the keys of config.json by which transformers find the code."""
    config, model_type = _CONFIGS[architecture.model_type]
    return {
        "model_type": model_type,
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION}.{config}",
            "AutoModelForCausalLM": f"{_MODELING}.{architecture.class_name}",
        },
    }


def copy_code(folder: Path) -> str:
    """Copy the code into a folder; return how to load it, in a line."""
    for name in (_CONFIGURATION, _MODELING):
        shutil.copyfile(_FOLDER / f"{name}.py", folder / f"{name}.py")
    return (
        f"{_MODELING}.py: transformers have no class that computes this model; "
        "load the folder with trust_remote_code=True"
    )
