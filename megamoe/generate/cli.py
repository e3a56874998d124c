"""`megamoe generate`: text that goes on after a prompt, from a run's checkpoint."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.checkpoints.place import Place, find_checkpoint
from megamoe.errors import MegamoeError
from megamoe.generate.inputs import open_tokenizer
from megamoe.generate.opened import opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from data_prep.tokenizer import Tokenizer
    from megamoe.nn.cache import Cache

_EPILOG = """examples:
  megamoe generate runs/tiny --prompt "def read("
  megamoe generate runs/tiny --prompt "Once upon" --temperature 0.8 --top-p 0.95 --seed 3
  megamoe generate runs/tiny/checkpoints/000000000564224 --prompt "" --max-tokens 300
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megamoe generate`."""
    parser.epilog = _EPILOG
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", required=True, help="beginning of the document; '' for none", metavar="TEXT"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="draw tokens; default: the likeliest one"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P (default 1)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default 0)")
    parser.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model, and which tokenizer."""
    parser.add_argument(
        "path", type=Path, metavar="RUN", help="a run folder (its latest), or one checkpoint"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="default: that of the run's data folder"
    )


def run(args: argparse.Namespace) -> int:
    """Load, and write what comes as it comes."""
    _check(args)
    place = find_checkpoint(args.path)
    tokenizer = open_tokenizer(place.plan, args.tokenizer)
    _generate(args, place, tokenizer)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.max_tokens < 1:
        raise MegamoeError(f"--max-tokens {args.max_tokens} is no text; give 1 or more")
    if args.temperature is None:
        for name in ("top_p", "seed"):
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise MegamoeError(
                    f"--{option} is about drawing tokens; add --temperature 1, or leave it out"
                )
        return
    if not 0 < args.temperature < float("inf"):
        raise MegamoeError(
            f"--temperature {args.temperature:g} is not above 0; give 0.8, or leave it out for the "
            "likeliest token"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise MegamoeError(f"--top-p {args.top_p:g} is not a share; give above 0, at most 1")


def _generate(args: argparse.Namespace, place: Place, tokenizer: "Tokenizer") -> None:
    # A document in a shard follows the end of another.
    prompt = [tokenizer.meta.eod_id, *tokenizer.encode(args.prompt)]
    with opened(place) as model:
        import torch

        from megamoe.generate.text import TextStream, following

        cache = model.new_cache(sequences=1, tokens=len(prompt) + args.max_tokens)
        device = torch.cuda.current_device()

        def step(tokens: list[int]) -> "Tensor":
            logits_BV = model.next_logits(torch.tensor([tokens], device=device), cache)
            # A table of the model may have more rows than there are tokens.
            return logits_BV[0, : tokenizer.meta.vocab_size]

        tokens = following(
            prompt,
            step,
            _chooser(args),
            max_tokens=args.max_tokens,
            end=tokenizer.meta.eod_id,
        )
        stream, count = TextStream(tokenizer, prompt[1:]), 0
        _write(args.prompt)
        started = time.perf_counter()
        for token in tokens:
            count += 1
            _write(stream.add(token))
        seconds = time.perf_counter() - started
        _write(stream.finish() + "\n")
        sys.stderr.write(_summary(args, place, cache, count, seconds))


def _chooser(args: argparse.Namespace) -> "Callable[[Tensor], int]":
    import torch

    from megamoe.generate.sampling import Sampling, draw, most_likely

    if args.temperature is None:
        return most_likely
    sampling = Sampling(
        temperature=args.temperature, top_p=1.0 if args.top_p is None else args.top_p
    )
    generator = torch.Generator().manual_seed(args.seed or 0)
    return lambda logits_V: draw(logits_V, sampling, generator)


def _summary(
    args: argparse.Namespace, place: Place, cache: "Cache", count: int, seconds: float
) -> str:
    why = "the document ended" if count < args.max_tokens else "--max-tokens"
    line = (
        f"{place.checkpoint}: {count:,} tokens in {seconds:.1f} s ({why}); cache "
        f"{cache.bytes_at(cache.num_tokens):,} bytes for {cache.num_tokens:,} tokens"
    )
    trained = place.segment.seq_len
    if cache.num_tokens > trained:
        line += f"; beyond {trained:,} tokens, the longest sequences it was trained on"
    return line + "\n"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
