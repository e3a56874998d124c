"""Text of every model with a cache and without, in float64: `python -m tests.mcore.generated CASE...`.

In float32 the two ways round differently. Where two logits, or the scores of two experts, are nearly
equal, rounding decides which is taken, and the texts agree on one processor and part on another.
What was found is printed as JSON, by model.

Shapes: B batch, S sequence, V vocabulary.
"""

import json
import sys
import tempfile
from pathlib import Path

from megamoe.mcore import cpu, double

if __name__ == "__main__":  # before anything imports Megatron-core
    double.enable()
    cpu.enable()

import torch
from torch import Tensor

from tests.mcore.test_generate import (
    CASES,
    RECIPES,
    all_logits,
    built,
    prompt_of,
    relative_error,
    with_cache,
)

TOKENS = 300


def main() -> None:
    torch.set_num_threads(1)  # two of these share the machine
    sys.stdout.write(json.dumps({name: of_case(name) for name in sys.argv[1:]}))


def of_case(name: str) -> dict[str, object]:
    model, interpolation = CASES[name]
    long_BS = prompt_of(model, 3 * (model.window or 7) + 2, sequences=2)
    short_BS = prompt_of(model, 3)  # shorter than any window
    found: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        built(Path(folder), model, interpolation) as module,
    ):
        assert next(module.parameters()).dtype is torch.float64
        text_BS, logits_BSV = with_cache(module, model, long_BS, TOKENS)
        whole_BSV = all_logits(module, text_BS)[:, long_BS.shape[1] - 1 : -1]
        found["cached"] = text_BS[:, long_BS.shape[1] :].tolist()
        found["likeliest"] = whole_BSV.argmax(dim=-1).tolist()
        found["error"] = relative_error(logits_BSV, whole_BSV)
        if name in RECIPES:  # each token after another, from the whole text before it
            found["short"] = with_cache(module, model, short_BS, TOKENS)[0].tolist()
            found["without"] = without_cache(module, short_BS, TOKENS).tolist()
    return found


def without_cache(module, prompt_BS: Tensor, count: int) -> Tensor:
    text_BS = prompt_BS
    for _ in range(count):
        new_BS = all_logits(module, text_BS)[:, -1].argmax(dim=-1, keepdim=True)
        text_BS = torch.cat((text_BS, new_BS), dim=1)
    return text_BS


if __name__ == "__main__":
    main()
