"""What transformers makes of exported folders, and folders that it makes itself.

Run as a program with a folder: Megatron-core's patches for the CPU reach torch's factories, and
transformers would load models with positions that were never written. For each FOLDER/<n>/out it
leaves FOLDER/<n>/logits.safetensors and FOLDER/<n>/theirs, a random model of the same shape.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def _loaded(folder: Path) -> torch.nn.Module:
    """Return the model of a folder; nothing may be missing, extra or misshaped."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    has_bias = "e_score_correction_bias" in (folder / "model.safetensors.index.json").read_text()
    missing = [n for n in info["missing_keys"] if has_bias or "e_score_correction_bias" not in n]
    extra = [n for n in info["unexpected_keys"] if not n.startswith("mtp.")]
    assert (missing, extra, list(info["mismatched_keys"])) == ([], [], []), folder
    model.eval()
    if model.config.model_type == "axk1":
        for layer, kind in enumerate(model.config.mlp_layer_types):
            if kind == "dense":
                _norm_dense_layer(model, layer, folder)
    return model


def _norm_dense_layer(model: torch.nn.Module, layer: int, folder: Path) -> None:
    """Norm the output of a dense MLP where the files have one; transformers 5.23 drops it."""
    name = f"model.layers.{layer}.post_mlp_layernorm.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if name not in index["weight_map"]:
        return
    with safe_open(folder / index["weight_map"][name], framework="pt") as opened:
        weight = opened.get_tensor(name)
    eps = model.config.rms_norm_eps
    model.model.layers[layer].mlp.register_forward_hook(
        lambda _, __, x: weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    )


def _made(config: transformers.PretrainedConfig, *, has_bias: bool) -> torch.nn.Module:
    """Return a random model in which no part is without effect."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            std = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.add_(torch.randn(weight.shape) * std)
        for name, buffer in model.named_buffers():
            if has_bias and name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()


def _run(folder: Path, tokens: Tensor) -> None:
    exported = _loaded(folder / "out")
    has_bias = "e_score_correction_bias" in (folder / "out/audit.json").read_text()
    made = _made(exported.config, has_bias=has_bias)
    made.save_pretrained(folder / "theirs")
    with torch.no_grad():
        results = {"exported": exported(tokens).logits, "made": made(tokens).logits}
    save_file(results, folder / "logits.safetensors")


def main() -> None:
    """Go through all folders."""
    root = Path(sys.argv[1])
    tokens = load_file(root / "tokens.safetensors")["tokens"]
    for folder in sorted(path for path in root.iterdir() if (path / "out").is_dir()):
        _run(folder, tokens)


if __name__ == "__main__":
    main()
