"""Turns the documents of one source into shards and enters them in the folder's manifest.

Shards are written in a hidden folder beside their place, forced to disk and renamed; the manifest
is replaced last. Whatever fails before leaves the folder as it was.

Shape legend: T tokens of one document.
"""

import hashlib
import os
import re
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Literal

from data_prep.files import Document
from data_prep.fim import cut_code, cut_text, encode_parts
from data_prep.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    SourceShards,
    TokenizerEntry,
    locked,
    read_manifest,
    sync_folder,
    write_atomically,
    write_manifest,
)
from data_prep.shards import ShardFiles, ShardWriter
from data_prep.tokenizer import META_NAME, Tokenizer, TokenizerMeta, load_tokenizer, read_meta
from megamoe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOKENIZER_FOLDER = "tokenizer"

_SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 512
# Batches handed out ahead of the one awaited: keeps workers busy, and memory bounded.
_BATCHES_PER_WORKER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call of `megamoe data tokenize`, its input aside.

    Args:
        tokenizer: Tokenizer folder.
        source: Name of the source in the manifest.
        out: Data folder, created if need be.
        heldout: Share of the documents kept out of training, above 0 and below 1.
        fim: Where documents are cut for a fill-in-the-middle shard.
        seed: Settles the cuts.
        workers: Processes that encode; the result does not depend on it.
        replaces: Whether a source of this name may be there already.
    """

    tokenizer: Path
    source: str
    out: Path
    heldout: float | None
    fim: Literal["text", "code"] | None
    seed: int
    workers: int
    replaces: bool

    def __post_init__(self) -> None:
        """Refuses values that cannot be meant."""
        if not _SOURCE_NAME.fullmatch(self.source):
            raise DataError(f"--source {self.source!r}: use letters, digits, '-' and '_' only")
        if self.heldout is not None and not 0.0 < self.heldout < 1.0:
            raise DataError(f"--heldout {self.heldout}: use a share between 0 and 1, as 0.03")
        if not 0 <= self.seed < 1 << 63:
            raise DataError(f"--seed {self.seed}: use a number from 0 to 2^63 - 1")
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: use 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job wrote, and how many documents were empty and left out."""

    shards: SourceShards
    empty: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One document's tokens, eod included, for the shards it goes to."""

    heldout: bool
    bytes_text: int
    tokens: "NDArray[np.int32]"
    fim: "NDArray[np.int32] | None"


def tokenize_source(
    job: Job, documents: Iterable[Document], advance: Callable[[int, int], None]
) -> Outcome:
    """Writes the shards of one source and enters them in the manifest of `job.out`.

    Args:
        job: What to do.
        documents: The text; read once, in order, and never held as a whole.
        advance: Told the number of documents and of UTF-8 bytes after each batch.

    Raises:
        DataError: No document is left, the tokenizer lacks a token that is asked for, the folder
            was made with another, the source is there already, or the disk refuses.
    """
    meta = read_meta(job.tokenizer)
    _check_tokenizer(job, meta)
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        _check_folder(job, meta, _manifest_or_none(job.out))
        with tempfile.TemporaryDirectory(prefix=f".{job.source}.", dir=job.out) as scratch:
            outcome = _write_shards(job, meta, documents, advance, Path(scratch))
            with locked(job.out):
                _publish(job, meta, Path(scratch), outcome.shards)
    except OSError as error:
        raise DataError(f"{job.out}: cannot be written: {error.strerror or error}") from error
    return outcome


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept out of training; equal texts always go the same way."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _write_shards(
    job: Job,
    meta: TokenizerMeta,
    documents: Iterable[Document],
    advance: Callable[[int, int], None],
    folder: Path,
) -> Outcome:
    names = ["train"]
    names += ["heldout"] if job.heldout is not None else []
    names += ["fim"] if job.fim is not None else []
    num_empty = 0
    bytes_text = dict.fromkeys(names, 0)

    def texts() -> Iterator[str]:
        nonlocal num_empty
        for document in documents:
            if document.text.strip():
                yield document.text
            else:
                num_empty += 1

    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                ShardWriter(folder / _prefix(job.source, name), meta.vocab_size)
            )
            for name in names
        }
        for batch in _encode_all(job, _batches(texts())):
            for encoded in batch:
                for name, tokens_T in _destinations(encoded):
                    writers[name].add(tokens_T)
                    bytes_text[name] += encoded.bytes_text
            advance(len(batch), sum(encoded.bytes_text for encoded in batch))
        files = {name: writer.finish() for name, writer in writers.items()}
    for name in names:
        _check_not_empty(job, name, files)
    shards = {
        name: Shard(
            prefix=_prefix(job.source, name), bytes_text=bytes_text[name], **asdict(files[name])
        )
        for name in names
    }
    source = SourceShards(
        train=shards["train"], heldout=shards.get("heldout"), fim=shards.get("fim")
    )
    return Outcome(shards=source, empty=num_empty)


def _destinations(encoded: _Encoded) -> Iterator[tuple[str, "NDArray[np.int32]"]]:
    yield ("heldout" if encoded.heldout else "train"), encoded.tokens
    if encoded.fim is not None:
        yield "fim", encoded.fim


def _check_not_empty(job: Job, name: str, files: dict[str, ShardFiles]) -> None:
    if files[name].documents > 0:
        return
    total = sum(files[part].documents for part in ("train", "heldout") if part in files)
    if total == 0:
        raise DataError(f"source {job.source}: the input holds no document with text")
    raise DataError(
        f"source {job.source}: --heldout {job.heldout} of {total} documents leaves {name} empty;"
        " use another share, or more documents"
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about the same size."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_all(job: Job, batches: Iterator[list[str]]) -> Iterator[list[_Encoded]]:
    """The batches encoded, in their order."""
    if job.workers == 1:
        yield from map(partial(_encode_batch, job, load_tokenizer(job.tokenizer)), batches)
        return
    pool = ProcessPoolExecutor(
        job.workers,
        mp_context=get_context("spawn"),
        initializer=_follow_parent,
    )
    pending: deque[Future[list[_Encoded]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, job, batch))
            if len(pending) > _BATCHES_PER_WORKER * job.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"source {job.source}: a worker process died, most often for want of memory;"
            " use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leaves interrupts to the parent, and ends with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(job: Job, texts: list[str]) -> list[_Encoded]:
    return _encode_batch(job, _worker_tokenizer(job.tokenizer), texts)


@lru_cache(maxsize=1)
def _worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _encode_batch(job: Job, tokenizer: Tokenizer, texts: list[str]) -> list[_Encoded]:
    return [_encode(job, tokenizer, text) for text in texts]


def _encode(job: Job, tokenizer: Tokenizer, text: str) -> _Encoded:
    import numpy as np

    eod = tokenizer.meta.eod_id
    heldout = job.heldout is not None and is_held_out(text, job.heldout)
    fim_T = None
    if job.fim is not None and not heldout:
        parts = (cut_text if job.fim == "text" else cut_code)(text, job.seed)
        fim_T = np.array([*encode_parts(tokenizer, parts), eod], dtype=np.int32)
    return _Encoded(
        heldout=heldout,
        bytes_text=len(text.encode()),
        tokens=np.array([*tokenizer.encode(text), eod], dtype=np.int32),
        fim=fim_T,
    )


def _prefix(source: str, name: str) -> str:
    return source if name == "train" else f"{source}.{name}"


def _manifest_or_none(folder: Path) -> Manifest | None:
    return read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None


def _check_tokenizer(job: Job, meta: TokenizerMeta) -> None:
    if job.fim is not None and meta.fim is None:
        raise DataError(f"{job.tokenizer}: has no tokens for fill-in-the-middle; leave --fim out")
    if meta.pad_id == meta.eod_id:
        # Megatron-core takes no loss where the label is the padding.
        raise DataError(
            f"{job.tokenizer}: pads with the token that ends documents, which would not be learnt;"
            " import it again with --pad-token TOKEN"
        )


def _check_folder(job: Job, meta: TokenizerMeta, manifest: Manifest | None) -> None:
    """Refuses a second tokenizer, or a second source of the same name, in one folder."""
    if manifest is None:
        return
    entry = manifest.tokenizer
    if entry.sha256 != meta.sha256:
        raise DataError(
            f"{job.out}: made with another tokenizer ({entry.algorithm}, {entry.vocab_size} ids);"
            f" use --tokenizer {job.out / TOKENIZER_FOLDER}, or another -o"
        )
    if (entry.vocab_size, entry.eod_id, entry.pad_id) != (
        meta.vocab_size,
        meta.eod_id,
        meta.pad_id,
    ):
        raise DataError(
            f"{job.out}: made with {entry.eod_id} at the end of a document, {entry.pad_id} as padding"
            f" and {entry.vocab_size} ids, not {meta.eod_id}, {meta.pad_id} and {meta.vocab_size};"
            f" use --tokenizer {job.out / TOKENIZER_FOLDER}, or another -o"
        )
    if job.source in manifest.sources and not job.replaces:
        raise DataError(
            f"{job.out}: source {job.source} is there already; use --replace, or another --source"
        )


def _publish(job: Job, meta: TokenizerMeta, scratch: Path, shards: SourceShards) -> None:
    """Moves finished shards into place and enters them; the caller holds the folder's lock."""
    manifest = _manifest_or_none(job.out)
    _check_folder(job, meta, manifest)
    if manifest is None:
        manifest = Manifest(tokenizer=_copy_tokenizer(job, meta), sources={})
    if former := manifest.sources.get(job.source):
        # No manifest may name a shard that is being replaced.
        others = {name: entry for name, entry in manifest.sources.items() if name != job.source}
        manifest = replace(manifest, sources=others)
        write_manifest(job.out, manifest)
        for _, shard in former.named():
            for ending in (".bin", ".idx"):
                (job.out / (shard.prefix + ending)).unlink(missing_ok=True)
    for path in sorted(scratch.iterdir()):
        path.replace(job.out / path.name)
    sync_folder(job.out)
    write_manifest(job.out, replace(manifest, sources={**manifest.sources, job.source: shards}))


def _copy_tokenizer(job: Job, meta: TokenizerMeta) -> TokenizerEntry:
    target = job.out / TOKENIZER_FOLDER
    target.mkdir(exist_ok=True)
    for name in (meta.file, META_NAME):
        write_atomically(target / name, (job.tokenizer / name).read_bytes())
    return TokenizerEntry(
        algorithm=meta.algorithm,
        vocab_size=meta.vocab_size,
        eod_id=meta.eod_id,
        pad_id=meta.pad_id,
        sha256=meta.sha256,
        file=meta.file,
    )
