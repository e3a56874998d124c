"""Trains a small recipe in one layout, once through and once in two groups of processes.

Run as a program with FOLDER, RECIPE and LAYOUT: prints the last step of both, as JSON. Ranks are forks
of this process, which does nothing else.
"""

import json
import sys
from pathlib import Path

from megamoe.parity import ranks, small
from megamoe.parity.layouts import parse_layouts


def main() -> None:
    """Train two steps, and one step and one more."""
    folder, recipe, layout = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    [grid] = parse_layouts(layout, small.MICRO_BATCH)
    shards = tuple(
        small.write_text(folder / "text", name, seed) for seed, name in enumerate(("one", "two"))
    )
    plan = small.plan_of(small.small_recipe(recipe), grid, seed=1)
    plan = small.with_text(plan, folder / "text", shards)
    through = ranks.train(plan, folder / "through")
    ranks.train(plan, folder / "stopped", stop_after=1)
    resumed = ranks.train(plan, folder / "stopped")
    sys.stdout.write(json.dumps([through[-1], resumed[-1]]))


if __name__ == "__main__":
    main()
