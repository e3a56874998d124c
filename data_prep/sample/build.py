"""Builds the sample corpus beside this file from Debian 12 packages.

The three files are text that may be redistributed (`SOURCES.md` names package, version and licence
of each part). To reproduce them, unpack the packages somewhere and point this script at the folder:

    apt-get download libreoffice-help-ko gnome-user-docs installation-guide-amd64 python3.11-doc \
        postgresql-doc-15 sqlite3-doc libpython3.11-stdlib libpython3.11-minimal golang-1.19-src
    for package in *.deb; do dpkg -x "$package" root; done
    python -m data_prep.sample.build --root root --out data_prep/sample

The result depends on the packages alone: files are chosen by a hash of their path up to a budget,
then written in the order of their names. A paragraph is kept once per corpus; a Korean paragraph
must be Hangul in good part, because large parts of those manuals were never translated.
"""

import argparse
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from data_prep.sample_corpus import CORPORA, hangul_bytes

MIN_DOCUMENT_BYTES = 200
MIN_CODE_BYTES = 1_000
MAX_CODE_BYTES = 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One package's share of a corpus.

    Args:
        corpus: Name of the file it goes to: korean, english or code.
        package: Debian package, the first part of each document's id.
        folder: Folder under the root that is searched.
        suffix: Ending of the files that are read.
        budget_bytes: Text taken at most; the document that passes it is the last.
        min_hangul: Least share of Hangul bytes in a paragraph; 0 takes all.
        skip: Parts of a path that exclude a file.
    """

    corpus: str
    package: str
    folder: str
    suffix: str
    budget_bytes: int
    min_hangul: float = 0.0
    skip: tuple[str, ...] = ()


SOURCES = (
    Source(
        corpus="korean",
        package="libreoffice-help-ko",
        folder="usr/share/libreoffice/help/ko/text",
        suffix=".html",
        budget_bytes=4_000_000,
        min_hangul=0.3,
    ),
    Source(
        corpus="korean",
        package="gnome-user-docs",
        folder="usr/share/help/ko",
        suffix=".page",
        budget_bytes=4_000_000,
        min_hangul=0.3,
    ),
    Source(
        corpus="korean",
        package="installation-guide-amd64",
        folder="usr/share/doc/installation-guide-amd64/ko",
        suffix=".html",
        budget_bytes=4_000_000,
        min_hangul=0.3,
    ),
    Source(
        corpus="english",
        package="python3.11-doc",
        folder="usr/share/doc/python3.11/html",
        suffix=".html",
        budget_bytes=1_200_000,
        skip=("genindex", "py-modindex", "/whatsnew/", "search.html", "contents.html"),
    ),
    Source(
        corpus="english",
        package="postgresql-doc-15",
        folder="usr/share/doc/postgresql-doc-15/html",
        suffix=".html",
        budget_bytes=1_200_000,
        skip=("bookindex", "/release-", "features-sql", "errcodes"),
    ),
    Source(
        corpus="english",
        package="sqlite3-doc",
        folder="usr/share/doc/sqlite3",
        suffix=".html",
        budget_bytes=600_000,
        skip=("/session/", "/c3ref/", "/syntax/", "/releaselog/", "matrix", "index", "keyword"),
    ),
    Source(
        corpus="code",
        package="libpython3.11-stdlib",
        folder="usr/lib/python3.11",
        suffix=".py",
        budget_bytes=2_000_000,
        skip=("/test/", "/pydoc_data/"),
    ),
    Source(
        corpus="code",
        package="golang-1.19-src",
        folder="usr/share/go-1.19/src",
        suffix=".go",
        budget_bytes=1_000_000,
        skip=(
            "_test.go",
            "/testdata/",
            "/vendor/",
            "/cmd/",
            "/runtime/",
            "/math/",
            "tables.go",
            "/debug/elf/",
            "/idct.go",
        ),
    ),
)

BLOCKS = frozenset(
    (
        *("article", "body", "br", "dd", "desc", "div", "dl", "dt", "figure", "hr", "item", "li"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "page", "pre", "screen", "section"),
        *("steps", "table", "tbody", "td", "th", "thead", "title", "tr", "ul"),
    )
)
PREFORMATTED = frozenset(("pre", "screen"))
HIDDEN_TAGS = frozenset(
    (
        *("script", "style", "head", "header", "aside", "nav", "noscript", "footer", "form"),
        *("credit", "mal:credit"),
    )
)
HIDDEN_CLASSES = frozenset(
    (
        *("related", "sphinxsidebar", "headerlink", "navheader", "navfooter", "footer"),
        *("nosearch", "toc", "MAC"),
    )
)
VOID = frozenset(("br", "hr", "img", "input", "link", "meta", "area", "base", "col", "wbr"))


class TextOfMarkup(HTMLParser):
    """Collects the paragraphs of an HTML or Mallard page in `paragraphs`, navigation left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._hidden_tag = ""
        self._hidden_depth = 0
        self._preformatted = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ends a paragraph at a block, and enters what a reader does not see."""
        if self._hidden_tag:
            self._hidden_depth += tag == self._hidden_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in VOID and (tag in HIDDEN_TAGS or classes & HIDDEN_CLASSES):
            self._hidden_tag, self._hidden_depth = tag, 1
        if tag in BLOCKS:
            self._end_paragraph()
            self._preformatted = tag in PREFORMATTED

    def handle_endtag(self, tag: str) -> None:
        """Ends a paragraph at a block, and leaves what a reader does not see."""
        if self._hidden_tag:
            self._hidden_depth -= tag == self._hidden_tag
            if self._hidden_depth == 0:
                self._hidden_tag = ""
        elif tag in BLOCKS:
            self._end_paragraph()
            self._preformatted = False

    def handle_data(self, data: str) -> None:
        """Keeps visible text."""
        if not self._hidden_tag:
            self._pieces.append(data)

    def close(self) -> None:
        """Ends the last paragraph."""
        super().close()
        self._end_paragraph()

    def _end_paragraph(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        text = text.strip("\n").rstrip() if self._preformatted else " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)


def markup_document(markup: str, min_hangul: float, seen: set[str]) -> str:
    """The page's paragraphs that are new and Korean enough, one a line; adds them to `seen`."""
    parser = TextOfMarkup()
    parser.feed(markup)
    parser.close()
    kept = []
    for paragraph in parser.paragraphs:
        if paragraph in seen or hangul_bytes(paragraph) < min_hangul * len(paragraph.encode()):
            continue
        seen.add(paragraph)
        kept.append(paragraph)
    text = "\n".join(kept)
    return text + "\n" if len(text.encode()) >= MIN_DOCUMENT_BYTES else ""


def code_document(text: str, seen: set[str]) -> str:
    """The file as it is, unless it is generated, seen before, very short or very long."""
    generated = "code generated" in text[:2_000].lower()
    if generated or text in seen or not MIN_CODE_BYTES <= len(text.encode()) <= MAX_CODE_BYTES:
        return ""
    seen.add(text)
    return text


def documents(source: Source, root: Path, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Id and text of each document of a source, at most its budget."""
    folder = root / source.folder
    names = [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{source.suffix}")]
    names = [name for name in names if not any(part in f"/{name}" for part in source.skip)]
    if not names:
        sys.exit(f"{folder}: no {source.suffix} files; unpack {source.package} under {root}")
    taken = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if taken >= source.budget_bytes:
            return
        raw = (folder / name).read_text(encoding="utf-8")
        if source.corpus == "code":
            text = code_document(raw, seen)
        else:
            text = markup_document(raw, source.min_hangul, seen)
        if text:
            taken += len(text.encode())
            yield f"{source.package}/{name}", text


def build(root: Path, out: Path) -> None:
    """Writes the three corpora and `licenses/` into `out` and prints the figures."""
    for corpus in CORPORA:
        seen: set[str] = set()
        found: list[tuple[str, str]] = []
        for source in SOURCES:
            if source.corpus == corpus:
                part = list(documents(source, root, seen))
                num_bytes = sum(len(text.encode()) for _, text in part)
                sys.stdout.write(f"{corpus} {source.package}: {len(part):,} {num_bytes:,}\n")
                found += part
        write_corpus(out / f"{corpus}.jsonl.zst", sorted(found))
    copy_licences(root, out / "licenses")


def write_corpus(path: Path, corpus: list[tuple[str, str]]) -> None:
    """Writes ids and texts as compressed JSON lines."""
    import orjson
    import zstandard

    lines = b"".join(orjson.dumps({"id": name, "text": text}) + b"\n" for name, text in corpus)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(lines))


def copy_licences(root: Path, out: Path) -> None:
    """Copies each package's statement, the licences it refers to, and GNOME's authors."""
    out.mkdir(exist_ok=True)
    for source in SOURCES:
        statement = root / "usr/share/doc" / source.package / "copyright"
        shutil.copyfile(statement, out / f"{source.package}.copyright")
    for licence in ("Apache-2.0", "GPL-2", "MPL-2.0"):
        shutil.copyfile(Path("/usr/share/common-licenses") / licence, out / licence)
    pages = (root / "usr/share/help/ko").rglob("*.page")
    credit = re.compile(r"<(?:mal:)?name>([^<]+)</")
    names = {
        " ".join(name.split())
        for page in pages
        for name in credit.findall(page.read_text(encoding="utf-8"))
    }
    authors = "".join(f"{name}\n" for name in sorted(names))
    (out / "gnome-user-docs.authors").write_text(authors, encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="build the sample corpus")
    arguments.add_argument("--root", type=Path, default=Path("/"))
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = arguments.parse_args()
    build(options.root, options.out)
