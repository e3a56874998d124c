"""Trains a recipe at full width on this machine's GPU and writes down how fast.

On a machine without CUDA the same code runs at a tiny size, to show that it runs; its figures say
nothing.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run by its path, from anywhere
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.record import Record, describe_machine, result_path, say  # noqa: E402
from benchmarks.timing import matmul_ceiling  # noqa: E402

MATRIX_PRODUCT = "matrix product"
NATURAL, BALANCED = "natural routing", "balanced routing"
PEAK_BF16 = 989.4e12  # dense bfloat16 of H100 and H200 SXM, NVIDIA's data sheets
EPILOG = """example (one GPU, the recipe's sizes, result in benchmarks/results):
  python benchmarks/gpu_check.py
example (no GPU, a minute, result shown):
  python benchmarks/gpu_check.py --device cpu --scale tiny

With nothing installed but torch, triton and transformers, and Megatron-core in a folder:
  PYTHONPATH=.:kernels:/path/to/megatron python benchmarks/gpu_check.py
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure every case that time allows; 0 when megamoe's own step was measured, 2: a mistake."""
    args = _parse(arguments)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "gpu_check: this machine has no CUDA device; give --device cpu --scale tiny\n"
        )
        return 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core's, about itself
        from megamoe.errors import MegamoeError
        from megamoe.mcore import cpu

        cpu.enable()
        record = Record(args.output or result_path(device), describe_machine(device))
        try:
            Check(args, device, record).run()
        except MegamoeError as error:
            sys.stderr.write(f"gpu_check: {error}\n")
            return 2
    if record.path is None:
        sys.stdout.write(json.dumps(record.result, indent=1) + "\n")
    else:
        say(f"result: {record.path}")
    return 0 if record.tokens_per_s(f"random, {NATURAL}") else 1


class Check:
    """One run of all cases, with its deadline."""

    def __init__(self, args: argparse.Namespace, device: torch.device, record: Record) -> None:
        """Read the recipe; nothing is built yet."""
        from benchmarks.megamoe_step import Load, check_kernel
        from megamoe.recipe.load import load_recipe
        from megamoe.recipe.scale import scale_tiny

        if args.attention is not None:
            check_kernel(args.attention)
        loaded = load_recipe(args.recipe)
        self.recipe = (scale_tiny(loaded) if args.scale == "tiny" else loaded).recipe
        self.load = Load(
            sequences=args.sequences,
            micro_batch=args.micro_batch,
            warmup=args.warmup,
            count=args.steps,
        )
        self.args, self.device, self.record = args, device, record
        self.deadline = time.monotonic() + args.time_limit
        self.peaks: dict[str, float | None] = {}

    def run(self) -> None:
        """Measure the ceiling, megamoe's steps, and those of transformers."""
        self.record.result |= {
            "recipe": self.recipe.name,
            "scale": self.args.scale,
            "seq_len": self.recipe.stages[0].seq_len,
            "micro_batch": self.load.micro_batch,
            "sequences_per_step": self.load.sequences,
        }
        size = 8192 if self.device.type == "cuda" else 256
        self.case(MATRIX_PRODUCT, lambda: matmul_ceiling(self.device, size))
        measured = self.record.result["cases"][MATRIX_PRODUCT].get("tflop_per_s")
        self.peaks = {
            "of 989.4 TFLOP/s": PEAK_BF16 if self.device.type == "cuda" else None,
            "of the matrix product": measured * 1e12 if measured else None,
        }
        with tempfile.TemporaryDirectory() as folder:
            num_layers = self.megamoe(Path(folder))
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if num_layers is not None:
                self.transformers(Path(folder), num_layers)
                self.compare()

    def case(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure one case, if there is time left, and keep it at once; a failure is kept too."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.record.add(name, {"skipped": f"time limit of {self.args.time_limit} s"})
            return
        say(f"{name} ({left:.0f} s left)")
        start = time.monotonic()
        try:
            value = measure()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the other cases can still be measured
            value = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        self.record.add(name, value | {"took_s": time.monotonic() - start})
        say(f"  {_short(value)}")

    def megamoe(self, folder: Path) -> int | None:
        """Train with as many layers as fit; return how many, or None where none do."""
        from benchmarks import megamoe_step as ours

        counts = ours.layer_counts(self.recipe)
        most = self.args.layers or self._first_count()
        tried = [count for count in reversed(counts) if count <= most] or [most]
        for num_layers in tried:
            plan = ours.make_plan(self.recipe, num_layers, self.load, self.device)
            try:
                with ours.world_of_one(plan, self.device):
                    self._cases(plan, folder / str(num_layers))
            except torch.OutOfMemoryError as error:
                say(f"{num_layers} layers do not fit: {str(error).splitlines()[0]}")
                self.record.give_up({"layers": num_layers}, keep=(MATRIX_PRODUCT,))
            else:
                return num_layers
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def _first_count(self) -> int:
        from benchmarks import megamoe_step as ours

        if self.device.type != "cuda":
            return self.recipe.model.num_layers
        free, _ = torch.cuda.mem_get_info(self.device)
        return ours.layers_that_fit(self.recipe, self.load, free)

    def _cases(self, plan: Any, folder: Path) -> None:
        from benchmarks import megamoe_step as ours
        from benchmarks.sample_text import sample_text
        from megamoe.mcore.engine import Engine
        from megamoe.plan.params import count_params

        random = ours.random_text(plan, folder / "random")
        self.record.result |= {
            "layers": plan.model.num_layers,
            "layers_of_recipe": self.recipe.model.num_layers,
            "parameters": count_params(plan.model).total,
        }
        say(f"building {plan.model.num_layers} layers")
        start = time.monotonic()
        engine = Engine(random, random.segments[0], folder / "run")
        self.record.result["build_s"] = time.monotonic() - start
        if self.args.attention is not None:
            ours.choose_kernel(engine, self.args.attention)

        def measure(text: Any) -> dict[str, Any]:
            return ours.measure(engine, text, self.load, self.device, self.peaks)

        @cache
        def sample() -> tuple[Any, str]:
            return sample_text(plan, folder / "sample")

        def on_sample() -> dict[str, Any]:
            text, what = sample()
            return measure(text) | {"text": what}

        def evenly(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            with ours.balanced(engine):
                return case()

        self.case(f"random, {NATURAL}", lambda: measure(random))
        self.case(f"random, {BALANCED}", lambda: evenly(lambda: measure(random)))
        self.case(f"sample text, {NATURAL}", on_sample)
        self.case(f"sample text, {BALANCED}", lambda: evenly(on_sample))
        self.case("breakdown", lambda: ours.break_down(engine, self.device))

    def transformers(self, folder: Path, num_layers: int) -> None:
        """Do the same steps with plain transformers, where it is installed."""
        names = [f"transformers, random, {routing}" for routing in (NATURAL, BALANCED)]
        if find_spec("transformers") is None:
            for name in names:
                say(f"{name}: skipped, transformers is not installed")
                self.record.add(name, {"skipped": "transformers is not installed"})
            return
        from benchmarks import megamoe_step as ours
        from benchmarks import transformers_step as theirs
        from megamoe.mcore.data import TrainingText

        plan = ours.make_plan(self.recipe, num_layers, self.load, self.device)
        plan = ours.random_text(plan, folder / "transformers")
        with ours.world_of_one(plan, self.device):
            text = TrainingText(plan, plan.segments[0], folder / "transformers" / "cache")

            @cache
            def model() -> Any:
                return theirs.build(plan.model, plan.segments[0].seq_len, self.device)

            def measure() -> dict[str, Any]:
                return theirs.measure(model(), plan, text, self.load, self.device, self.peaks)

            def measure_balanced() -> dict[str, Any]:
                with theirs.balanced(model()):
                    return measure()

            for name, case in zip(names, (measure, measure_balanced), strict=True):
                try:
                    self.case(name, case)
                except torch.OutOfMemoryError as error:
                    self.record.add(name, {"failed": str(error).splitlines()[0]})

    def compare(self) -> None:
        """Note how fast our steps are in the terms of transformers' with the same routing."""
        ratios: dict[str, float | None] = {}
        for routing in (NATURAL, BALANCED):
            ours = self.record.tokens_per_s(f"random, {routing}")
            theirs = self.record.tokens_per_s(f"transformers, random, {routing}")
            ratios[routing] = ours / theirs if ours and theirs else None
            shown = "not measured" if ratios[routing] is None else f"{ratios[routing]:.3f}"
            say(f"tokens/s of megamoe over those of transformers, random, {routing}: {shown}")
        self.record.result["tokens_per_s_over_transformers"] = ratios
        self.record.save()


def _short(value: dict[str, Any]) -> str:
    for key in ("skipped", "failed"):
        if key in value:
            return f"{key}: {value[key]}"
    if "tokens_per_s" in value:
        return f"{value['tokens_per_s']:,.0f} tokens/s, {value['model_tflop_per_s']:.3g} TFLOP/s"
    return f"{value['tflop_per_s']:.3g} TFLOP/s" if "tflop_per_s" in value else "done"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="vaetki_7b_a1b", metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--layers", type=int, metavar="N", help="at most (default: what fits)")
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="of a step (8)")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps not timed (3)")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="timed steps a case (10)"
    )
    parser.add_argument(
        "--attention", metavar="NAME", help="kernel (default: the first that works)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=420.0, metavar="S", help="no case begins later (420 s)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="result, as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
