"""A page of headings, text, tables and a picture, as Markdown and as one HTML file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a header; the first column is text, the others are aligned to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG file beside the page; inlined in HTML."""

    path: Path
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list."""

    items: tuple[str, ...]


Block = Text | Table | Picture | Items


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A title, figures that stand out (value, what it is), and sections."""

    title: str
    subtitle: str
    figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def to_markdown(page: Page) -> str:
    """Return the page as Markdown."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    lines += [f"- **{value}** {name}" for value, name in page.figures]
    for section in page.sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", *_markdown(block)]
    return "\n".join(lines) + "\n"


def to_html(page: Page) -> str:
    """Return the page as HTML that needs no other file."""
    figures = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for value, name in page.figures
    )
    sections = "".join(
        f"<section><h2>{escape(section.title)}</h2>"
        + "".join(_html(block) for block in section.blocks)
        + "</section>"
        for section in page.sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>"
        f'<div class="figures">{figures}</div>{sections}</body></html>\n'
    )


def _markdown(block: Block) -> list[str]:
    match block:
        case Text(text=text):
            return [text]
        case Items(items=items):
            return [f"- {item}" for item in items]
        case Picture(path=path, caption=caption):
            return [f"![{caption}]({path.name})", "", caption]
        case Table(header=header, rows=rows):
            rule = ["---", *("---:" for _ in header[1:])]
            return [_markdown_row(row) for row in (header, rule, *rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html(block: Block) -> str:
    match block:
        case Text(text=text):
            return f"<p>{escape(text)}</p>"
        case Items(items=items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Picture(path=path, caption=caption):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return (
                f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
        case Table(header=header, rows=rows):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            return f'<div class="wide">{table}</div>'


_STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --back: #f7f8fa; --accent: #0b5cad; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Noto Sans KR", "Apple SD Gothic Neo", sans-serif; color: var(--ink);
  background: var(--back); max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
header p { color: var(--soft); margin: 4px 0 24px; }
h2 { font-size: 17px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.figures div { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 18px; }
.figures b { display: block; font-size: 21px; font-weight: 620; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: 13px; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 8px; }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { color: var(--soft); font-weight: 560; } th, td { padding: 6px 12px; white-space: nowrap;
  text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
ul { margin: 0; padding-left: 20px; } li { overflow-wrap: anywhere; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
