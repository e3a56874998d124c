"""The sample corpus that comes with the product, handed out as files a user could have."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import raise_error, read_documents
from megamoe.errors import DataError

SAMPLE_FOLDER = Path(__file__).parent / "sample"
CORPORA = ("korean", "english", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCorpus:
    """One file of the sample, and how much it holds."""

    path: Path
    documents: int
    bytes_text: int
    bytes_hangul: int
    bytes_file: int


def copy_sample(out: Path) -> Iterator[SampleCorpus]:
    """Copies the corpora, their sources and licences into `out`; yields each corpus once copied.

    Raises:
        DataError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE_FOLDER / "SOURCES.md", out)
        shutil.copytree(SAMPLE_FOLDER / "licenses", out / "licenses", dirs_exist_ok=True)
        for name in CORPORA:
            copied = shutil.copy(SAMPLE_FOLDER / f"{name}.jsonl.zst", out)
            yield measure_corpus(Path(copied))
    except OSError as error:
        raise DataError(f"{out}: the sample cannot be written there: {error.strerror}") from error


def measure_corpus(path: Path) -> SampleCorpus:
    """Counts the documents and bytes of one file of the sample."""
    texts = [document.text for document in read_documents(path, "text", raise_error)]
    return SampleCorpus(
        path=path,
        documents=len(texts),
        bytes_text=sum(len(text.encode()) for text in texts),
        bytes_hangul=sum(hangul_bytes(text) for text in texts),
        bytes_file=path.stat().st_size,
    )


def hangul_bytes(text: str) -> int:
    """Bytes of `text` in UTF-8 that are Hangul syllables or jamo."""
    return 3 * sum(
        "\uac00" <= letter <= "\ud7a3"
        or "\u1100" <= letter <= "\u11ff"
        or "\u3131" <= letter <= "\u318e"
        for letter in text
    )
