"""The subcommands of `megamoe data`.

Importing this file costs nothing: what does the work is imported by the function that needs it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.files import Document
    from data_prep.progress import Progress
    from megamoe.errors import DataError

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

ALGORITHMS = ("byte-level-bpe", "sentencepiece-bpe", "sentencepiece-unigram")

_INPUT_HELP = (
    "files, folders (read recursively) or quoted patterns: .jsonl or .json (one object a line) and"
    " .txt (one document a file), also with .gz, .zst or .xz; .parquet"
)
_EPILOG = """examples:
  megamoe data sample text
  megamoe data tokenizer train --algorithm byte-level-bpe --vocab-size 32000 -o tok text/
  megamoe data tokenize --tokenizer tok --source korean -o data text/korean.jsonl.zst
  megamoe data inspect data
"""
_TRAIN_EXAMPLE = """example:
  megamoe data tokenizer train --algorithm byte-level-bpe --vocab-size 32000 -o tok text/
"""
_IMPORT_EXAMPLE = """example, the tokenizer of a published model:
  megamoe data tokenizer import models/K-EXAONE-236B-A23B -o tok
  megamoe generate runs/continued --tokenizer tok --prompt "The "
"""
_TOKENIZE_EXAMPLE = """example, a folder of two sources:
  megamoe data tokenize --tokenizer tok --source korean -o data --heldout 0.03 korean.jsonl.zst
  megamoe data tokenize --tokenizer tok --source code -o data --heldout 0.03 --fim --code code/
"""
_SAMPLE_EXAMPLE = """example:
  megamoe data sample text
"""
_INSPECT_EXAMPLE = """example:
  megamoe data inspect data
  megamoe data inspect data --source korean --document 0
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds `sample`, `tokenizer train` and `import`, `tokenize` and `inspect` under `megamoe data`."""
    parser.epilog = _EPILOG
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    _add_sample(subparsers)
    _add_tokenizer(subparsers)
    _add_tokenize(subparsers)
    _add_inspect(subparsers)


def run_sample(args: argparse.Namespace) -> int:
    """Copies the sample corpus into a folder and prints what it holds."""
    from data_prep.sample_corpus import copy_sample

    for corpus in copy_sample(args.out):
        _say(
            f"{corpus.path}: {corpus.documents:,} documents, {corpus.bytes_text:,} bytes of text"
            f" ({corpus.bytes_hangul:,} Hangul), {corpus.bytes_file:,} on disk"
        )
    _say(f"where the texts come from and their licences: {args.out / 'SOURCES.md'}")
    return 0


def run_tokenizer_train(args: argparse.Namespace) -> int:
    """Trains a tokenizer and prints where it is."""
    from data_prep.files import expand_inputs
    from data_prep.progress import show_progress
    from data_prep.tokenizer_train import train_tokenizer

    files = expand_inputs(args.inputs)
    with show_progress("reading", len(files)) as progress:
        texts = (document.text for document in _documents(files, args, progress))
        meta = train_tokenizer(args.algorithm, args.vocab_size, texts, args.out)
    _say(f"{args.out}: {meta.algorithm}, {meta.vocab_size:,} ids, sha256 {meta.sha256[:16]}")
    return 0


def run_tokenizer_import(args: argparse.Namespace) -> int:
    """Makes a tokenizer folder of a published tokenizer and prints its special tokens."""
    from data_prep.tokenizer_import import import_tokenizer

    imported = import_tokenizer(
        args.source, args.out, end_token=args.end_token, pad_token=args.pad_token
    )
    meta, end = imported.meta, imported.ends[0]
    fim = meta.fim and f"{meta.fim.prefix}, {meta.fim.middle} and {meta.fim.suffix}"
    _say(f"{args.out}: {meta.algorithm}, {meta.vocab_size:,} ids, sha256 {meta.sha256[:16]}")
    _say(f"end of a document: {end.word} {end.token} ({end.where})")
    for other in imported.ends[1:]:
        _say(f"not {other.word} {other.token}, which {other.where} names; --end-token takes it")
    _say(f"padding: {meta.special_tokens[meta.pad_id]} {meta.pad_id}")
    _say(f"fill-in-the-middle: {fim or 'none'}")
    return 0


def run_tokenize(args: argparse.Namespace) -> int:
    """Writes the shards of one source and prints their counts."""
    from data_prep.files import expand_inputs
    from data_prep.progress import show_progress
    from data_prep.tokenize import Job, tokenize_source
    from megamoe.errors import DataError

    if args.code and not args.fim:
        raise DataError("--code says where --fim cuts; add --fim, or leave --code out")
    job = Job(
        tokenizer=args.tokenizer,
        source=args.source,
        out=args.out,
        heldout=args.heldout,
        fim=("code" if args.code else "text") if args.fim else None,
        seed=args.seed,
        workers=args.workers,
        replaces=args.replace,
    )
    files = expand_inputs(args.inputs)
    with show_progress(args.source, len(files)) as progress:
        documents = _documents(files, args, progress)
        outcome = tokenize_source(job, documents, progress.advance)
    for name, shard in outcome.shards.named():
        _say(
            f"{args.out / shard.prefix}.bin: {name}, {shard.documents:,} documents,"
            f" {shard.tokens:,} tokens, {shard.bytes_text / shard.tokens:.2f} bytes a token"
        )
    if outcome.empty:
        _say(f"{outcome.empty:,} empty documents left out")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Prints the table of a data folder, or one of its documents."""
    from data_prep.inspection import describe_folder, show_document
    from megamoe.errors import DataError

    if args.document is None:
        _say(describe_folder(args.folder, args.source))
    elif args.source is None:
        raise DataError("--document says which of a source's documents; add --source NAME")
    else:
        _say(show_document(args.folder, args.source, args.part, args.document))
    return 0


def _add_sample(subparsers: "Subparsers") -> None:
    parser = _add(subparsers, "sample", "copy the sample corpus (Korean, English, code)")
    parser.epilog = _SAMPLE_EXAMPLE
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to put it in")
    parser.set_defaults(run=run_sample)


def _add_tokenizer(subparsers: "Subparsers") -> None:
    group = _add(subparsers, "tokenizer", "train a tokenizer, or import a published one")
    group.epilog = _TRAIN_EXAMPLE + _IMPORT_EXAMPLE
    commands = group.add_subparsers(required=True, metavar="COMMAND")
    parser = _add(commands, "train", "train a tokenizer on text files")
    parser.epilog = _TRAIN_EXAMPLE
    parser.add_argument("--algorithm", choices=ALGORITHMS, required=True)
    parser.add_argument("--vocab-size", type=int, required=True, help="exact number of ids")
    parser.add_argument("-o", "--out", type=Path, required=True, help="tokenizer folder to write")
    _add_reading(parser)
    parser.set_defaults(run=run_tokenizer_train)
    parser = _add(commands, "import", "make a tokenizer folder of a published tokenizer")
    parser.epilog = _IMPORT_EXAMPLE
    parser.add_argument(
        "source",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder with tokenizer.json or tokenizer.model, or that file",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument(
        "--end-token", metavar="TOKEN", help="ends documents (default: what the folder calls eos)"
    )
    parser.add_argument(
        "--pad-token", metavar="TOKEN", help="pads (default: what the folder calls pad, else bos)"
    )
    parser.set_defaults(run=run_tokenizer_import)


def _add_tokenize(subparsers: "Subparsers") -> None:
    parser = _add(subparsers, "tokenize", "turn the documents of one source into shards")
    parser.epilog = _TOKENIZE_EXAMPLE
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--source", required=True, help="name of the source in the manifest")
    parser.add_argument("-o", "--out", type=Path, required=True, help="data folder to add it to")
    parser.add_argument(
        "--heldout", type=float, metavar="SHARE", help="share of documents kept for evaluation"
    )
    parser.add_argument(
        "--fim", action="store_true", help="also write the training documents for infilling"
    )
    parser.add_argument(
        "--code", action="store_true", help="--fim cuts at words and lines, not characters"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the --fim cuts (default 1234)")
    parser.add_argument("--workers", type=int, default=2, help="processes that encode (default 2)")
    parser.add_argument(
        "--replace", action="store_true", help="take the place of a source of this name"
    )
    _add_reading(parser)
    parser.set_defaults(run=run_tokenize)


def _add_inspect(subparsers: "Subparsers") -> None:
    parser = _add(subparsers, "inspect", "show what a data folder holds")
    parser.epilog = _INSPECT_EXAMPLE
    parser.add_argument("folder", type=Path, metavar="DIR", help="data folder")
    parser.add_argument("--source", help="only this source")
    parser.add_argument("--document", type=int, metavar="K", help="decode document K, from 0")
    parser.add_argument(
        "--part", choices=("train", "heldout", "fim"), default="train", help="of --document"
    )
    parser.set_defaults(run=run_inspect)


def _add(subparsers: "Subparsers", name: str, text: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=_INPUT_HELP)
    parser.add_argument(
        "--text-key", default="text", help="JSON field or Parquet column (default text)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out lines that cannot be read, count them"
    )


def _documents(
    files: tuple[Path, ...], args: argparse.Namespace, progress: "Progress"
) -> Iterator["Document"]:
    """The documents of all files; says at the end how many bad lines were left out."""
    from data_prep.files import raise_error, read_documents

    bad: list[DataError] = []
    for file in files:
        yield from read_documents(file, args.text_key, bad.append if args.skip_bad else raise_error)
        progress.file_done()
    if bad:
        _say(f"{len(bad):,} bad lines left out; the first: {bad[0]}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
