"""What transformers makes of exported folders, and folders that it makes itself.

Run as a program with a folder: Megatron-core's patches for the CPU reach torch's factories, and
transformers would load models with positions that were never written. For each FOLDER/<n>/out it
leaves FOLDER/<n>/logits.safetensors and FOLDER/<n>/theirs, a random model of the same shape, and where
the folder brings its own code FOLDER/<n>/uses.json.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor


def _loaded(folder: Path) -> torch.nn.Module:
    """Return the model of a folder; nothing may be missing, extra or misshaped."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        trust_remote_code=True,
    )
    has_bias = "e_score_correction_bias" in (folder / "model.safetensors.index.json").read_text()
    missing = [n for n in info["missing_keys"] if has_bias or "e_score_correction_bias" not in n]
    after = tuple(f"model.layers.{model.config.num_hidden_layers + i}." for i in range(2))
    extra = [n for n in info["unexpected_keys"] if not n.startswith(("mtp.", *after))]
    assert (missing, extra, list(info["mismatched_keys"])) == ([], [], []), folder
    return model.eval()


def _made(config: transformers.PretrainedConfig, *, has_bias: bool) -> torch.nn.Module:
    """Return a random model in which no part is without effect."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", trust_remote_code=True
    )
    with torch.no_grad():
        for weight in model.parameters():
            std = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.add_(torch.randn(weight.shape) * std)
        for name, buffer in model.named_buffers():
            if has_bias and name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()


def _uses(folder: Path, model: torch.nn.Module, tokens: Tensor) -> dict[str, object]:
    """Return what users of a model with its own code rely on, beside logits."""
    text, half = tokens[:, :20], tokens[1:, 9:20]
    cached = _continued(model, text)
    padded = text.clone()
    padded[1:, :9] = model.config.pad_token_id
    real = torch.ones_like(text)
    real[1:, :9] = 0
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=True
    )
    state = rounded.state_dict().items()
    return {
        "without cache": _difference(cached, _continued(model, text, use_cache=False)),
        "padded": _difference(
            _continued(model, padded, attention_mask=real)[1:], _continued(model, half)
        ),
        "whole cache": _refusal(_continued, model, text, cache_implementation="static"),
        "attentions": _refusal(_continued, model, text, output_attentions=True),
        "no attentions": _refusal(model, text, output_attentions=False, return_dict=False),
        "renamed": _refusal(model, text, kv_cache=None),
        "not trusted": _refusal(transformers.AutoModelForCausalLM.from_pretrained, folder),
        "loss": model(tokens, labels=tokens).loss.item(),
        "loss of a sum": _loss_of_a_sum(model, tokens),
        "hidden": [x.shape[-1] for x in model(text, output_hidden_states=True).hidden_states],
        "float32 in bfloat16": [name for name, value in state if value.dtype == torch.float32],
        "finite in bfloat16": rounded(tokens).logits.isfinite().all().item(),
        **_trained(model, tokens),
        **_encoded(folder),
    }


def _continued(model: torch.nn.Module, tokens: Tensor, **options: object) -> Tensor:
    """Return logits of 12 tokens, each the likeliest after those before."""
    output = model.generate(
        tokens,
        do_sample=False,
        min_new_tokens=12,
        max_new_tokens=12,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits, dim=1)


def _difference(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def _refusal(function: Callable, *arguments: object, **options: object) -> str:
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        return str(error)
    return "none"


def _loss_of_a_sum(model: torch.nn.Module, tokens: Tensor) -> float:
    """Return the loss with what the Trainer gives: how many labels there are, and where it shifts them."""
    assert model.accepts_loss_kwargs
    after = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    of_trainer = {"shift_labels": after, "num_items_in_batch": torch.tensor(1)}
    total = model(tokens, labels=tokens, **of_trainer).loss
    return (total / tokens[:, 1:].numel()).item()


def _trained(model: torch.nn.Module, tokens: Tensor) -> dict[str, object]:
    """Return by how much the loss falls along its gradient, over that gradient, and what has none."""
    model(tokens, labels=tokens).loss.backward()
    found = {n: weight.grad for n, weight in model.named_parameters() if weight.grad is not None}
    length = torch.sqrt(sum(gradient.square().sum() for gradient in found.values()))
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for name, gradient in found.items():
                model.get_parameter(name).add_(step / length * gradient)
            losses.append(model(tokens, labels=tokens).loss)
    slope = (losses[0] - losses[1]) / 2e-5
    without = [name for name, _ in model.named_parameters() if name not in found]
    return {"slope": (slope / length).item(), "without gradient": without}


def _encoded(folder: Path) -> dict[str, object]:
    """Return the ids of a text, with the code trusted and without."""
    names = {path.name for path in folder.iterdir()}
    if not names & {"tokenizer.json", "tokenizer.model"}:
        return {}
    kinds = [{"trust_remote_code": True}, {}]
    found = [transformers.AutoTokenizer.from_pretrained(folder, **kind) for kind in kinds]
    text = (folder / "text.txt").read_text(encoding="utf-8")
    encoded = [tokenizer(text) for tokenizer in found]
    names = sorted({name for each in encoded for name in each})
    return {"ids": [each["input_ids"] for each in encoded], "inputs": names}


def _run(folder: Path, tokens: Tensor) -> None:
    exported = _loaded(folder / "out")
    has_bias = "e_score_correction_bias" in (folder / "out/audit.json").read_text()
    made = _made(exported.config, has_bias=has_bias)
    made.save_pretrained(folder / "theirs")
    with torch.no_grad():
        results = {"exported": exported(tokens).logits, "made": made(tokens).logits}
    save_file(results, folder / "logits.safetensors")
    if (folder / "out/modeling_megamoe.py").is_file():
        uses = _uses(folder / "out", exported, tokens)
        (folder / "uses.json").write_text(json.dumps(uses))


def main() -> None:
    """Go through all folders."""
    root = Path(sys.argv[1])
    tokens = load_file(root / "tokens.safetensors")["tokens"]
    for folder in sorted(path for path in root.iterdir() if (path / "out").is_dir()):
        _run(folder, tokens)


if __name__ == "__main__":
    main()
