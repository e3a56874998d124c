"""What may be installed, what it is for, and what stands in for it."""

from dataclasses import dataclass

INSTALL = "pip install 'megamoe[train]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A package that megamoe, or Megatron-core under it, can use."""

    name: str
    modules: tuple[str, ...]  # imported one after another; without the first it is absent
    distributions: tuple[str, ...]  # names it is installed under
    use: str  # what it is for
    is_used: bool  # by this version of megamoe
    instead: str  # what is done without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A package that training cannot do without. setup.py says the same versions."""

    name: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    at_least: tuple[int, ...] = ()
    below: tuple[int, ...] = ()


PYTHON_AT_LEAST, PYTHON_BELOW = (3, 11), (3, 13)

REQUIREMENTS = (
    Requirement(name="torch", modules=("torch",), distributions=("torch",), at_least=(2, 11)),
    Requirement(
        name="Megatron-core",
        modules=("megatron.core",),
        distributions=("megatron-core",),
        at_least=(0, 16, 1),
        below=(0, 20),
    ),
    Requirement(name="numpy", modules=("numpy",), distributions=("numpy",)),
    Requirement(name="rich", modules=("rich.progress",), distributions=("rich",)),
)

_ATTENTION = "torch's own attention kernels"
_EVERYWHERE = "halos, packed documents and rings included, where its trial passes"

OPTIONAL = (
    Component(
        name="Transformer Engine",
        modules=("transformer_engine", "transformer_engine.pytorch"),
        distributions=("transformer-engine",),
        use="fused Adam, which Megatron-core takes wherever it is; attention, where its trial passes; its "
        "layers and FP8 are not used by this version",
        is_used=True,
        instead=f"apex's fused Adam, or torch's AdamW; {_ATTENTION}; layers in plain torch",
    ),
    Component(
        name="apex",
        modules=("apex", "apex.optimizers", "amp_C"),
        distributions=("apex",),
        use="fused Adam, which Megatron-core takes where Transformer Engine is absent",
        is_used=True,
        instead="torch's AdamW",
    ),
    Component(
        name="DeepEP",
        modules=("deep_ep",),
        distributions=("deep-ep",),
        use="sending tokens to experts on other GPUs, where a layout has dispatcher 'deepep' or, of its "
        "branch hybrid-ep, 'hybridep'",
        is_used=True,
        instead="all_to_all, with the same result",
    ),
    Component(
        name="flash-attn 3",
        modules=("flash_attn_interface",),
        distributions=("flash-attn-3", "flashattn-hopper"),
        use=f"attention on Hopper GPUs, {_EVERYWHERE}",
        is_used=True,
        instead=f"Transformer Engine, flash-attn 2, or {_ATTENTION}",
    ),
    Component(
        name="flash-attn 2",
        modules=("flash_attn.flash_attn_interface",),
        distributions=("flash-attn",),
        use=f"attention, {_EVERYWHERE}",
        is_used=True,
        instead=_ATTENTION,
    ),
    Component(
        name="flash-attn 4",
        modules=("flash_attn.cute",),
        distributions=("flash-attn-4",),
        use="attention on Hopper and Blackwell GPUs",
        is_used=False,
        instead=_ATTENTION,
    ),
    Component(
        name="triton",
        modules=("triton",),
        distributions=("triton",),
        use="torch.compile on GPUs: Megatron-core asks for it in models with an expert bias; windows "
        "where FlashAttention's do not work",
        is_used=True,
        instead="on CPU the C++ compiler; on GPUs nothing for an expert bias, and blocks for windows",
    ),
    Component(
        name="wandb",
        modules=("wandb",),
        distributions=("wandb",),
        use="--wandb",
        is_used=True,
        instead="metrics.jsonl, which every run writes",
    ),
    Component(
        name="tensorboard",
        modules=("tensorboard",),
        distributions=("tensorboard",),
        use="--tensorboard",
        is_used=True,
        instead="metrics.jsonl, which every run writes",
    ),
    Component(
        name="matplotlib",
        modules=("matplotlib",),
        distributions=("matplotlib",),
        use="loss.png of a report",
        is_used=True,
        instead="a report without the plot",
    ),
)
