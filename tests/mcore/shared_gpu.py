"""Trains a small recipe in one layout, on ranks that share a GPU, and on ranks over gloo.

Run as a program with FOLDER, RECIPE and LAYOUT: prints the steps of both, as JSON. There need be no GPU.
"""

import json
import sys
from pathlib import Path

from megamoe.parity import ranks, small
from megamoe.parity.layouts import parse_layouts


def main() -> None:
    """Train two steps each way."""
    folder, recipe, layout = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    [grid] = parse_layouts(layout, small.MICRO_BATCH)
    shard = small.write_text(folder / "text", "one", seed=1)
    plan = small.plan_of(small.small_recipe(recipe), grid, seed=1)
    plan = small.with_text(plan, folder / "text", (shard,))
    shared = ranks.train(small.on_a_gpu(plan), folder / "shared")
    sys.stdout.write(json.dumps([shared, ranks.train(plan, folder / "gloo")]))


if __name__ == "__main__":  # processes of their own import this file
    main()
