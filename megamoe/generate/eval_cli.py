"""`megamoe eval perplexity`: what files of text cost a run's checkpoint."""

import argparse
import sys
from typing import TYPE_CHECKING

from megamoe.checkpoints.place import find_checkpoint
from megamoe.errors import MegamoeError
from megamoe.generate.cli import add_model_arguments
from megamoe.generate.inputs import find_groups, open_tokenizer
from megamoe.generate.opened import opened

if TYPE_CHECKING:
    from megamoe.generate.perplexity import Cost

_EPILOG = """examples:
  megamoe eval perplexity runs/tiny korean.jsonl.zst english.txt
  megamoe eval perplexity runs/tiny data/sample/*.heldout.bin
  megamoe eval perplexity runs/tiny korean=news.jsonl.zst korean='books/*.txt' english=en.txt
"""
_DESCRIPTION = (
    "Print the loss in nats a token, the perplexity and the bits a byte of each file: text (.txt, "
    ".jsonl, also compressed; folders and quoted patterns too) or shards (PREFIX.bin); and of all "
    "files of a language together, where they are given as LANGUAGE=FILE."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand of `megamoe eval`."""
    parser.epilog = _EPILOG
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    costing = commands.add_parser(
        "perplexity",
        help="loss, perplexity and bits a byte of files of text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(costing)
    costing.add_argument("files", nargs="+", metavar="[LANGUAGE=]FILE", help="text or shards")
    costing.add_argument(
        "--text-key", default="text", metavar="KEY", help="field of a JSON line (default text)"
    )
    costing.add_argument(
        "--max-tokens", type=int, default=sys.maxsize - 1, metavar="N", help="of a file at most"
    )
    costing.set_defaults(run=run_perplexity)


def run_perplexity(args: argparse.Namespace) -> int:
    """Print a line for each file as it is done."""
    if args.max_tokens < 1:
        raise MegamoeError(f"--max-tokens {args.max_tokens} predicts nothing; give 1 or more")
    place = find_checkpoint(args.path)
    tokenizer = open_tokenizer(place.plan, args.tokenizer)
    groups = find_groups(args.files)
    with opened(place) as model:
        from megamoe.generate.perplexity import cost_of, read_text, sum_of

        names = [str(file) for files in groups.values() for file in files]
        totals = {name: f"all of {name}" for name in groups if name}
        width = max(map(len, [*names, *totals.values()]))
        _say(f"{place.checkpoint}, windows of {model.segment.seq_len:,} tokens")
        _say(
            f"{'file':<{width}}  {'tokens':>12}  {'nats/token':>10}  {'perplexity':>10}  "
            f"{'bits/byte':>9}"
        )
        for name, files in groups.items():
            costs: list[Cost] = []
            for file in files:
                text = read_text(
                    file, tokenizer, text_key=args.text_key, max_tokens=args.max_tokens
                )
                costs.append(cost_of(text, model, tokenizer))
                _say(_row(f"{text.name:<{width}}", costs[-1]))
            if name:
                _say(_row(f"{totals[name]:<{width}}", sum_of(costs)))
    return 0


def _row(name: str, cost: "Cost") -> str:
    return (
        f"{name}  {cost.tokens:>12,}  {cost.loss:>10.4f}  {cost.perplexity:>10,.2f}  "
        f"{cost.bits_per_byte:>9.4f}"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
