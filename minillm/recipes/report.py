"""A report as a list of blocks, written twice: `report.md` and a `report.html` that needs no other file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.files import atomic_write


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text below a header; a column whose cells all start with a digit or sign is aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self, column: int) -> bool:
        return all(re.match(r"[-+]?\d|-$", row[column]) for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """An image file of the report's folder; `alt` says in words what it shows, for those who do not see it."""

    file: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Text whose line breaks and spaces count, such as a sample."""

    text: str


Block = Heading | Paragraph | Table | Picture | Listing


def write_report(folder: str | Path, blocks: Sequence[Block]) -> None:
    """Write `report.md` and `report.html` to `folder`; the first block is the title, pictures are files of `folder`."""
    folder = Path(folder)
    atomic_write(folder / "report.md", "\n\n".join(map(to_markdown, blocks)) + "\n")
    body = "\n".join(to_html(block, folder) for block in blocks)
    title = html.escape(blocks[0].text)
    atomic_write(folder / "report.html", PAGE.replace("TITLE", title).replace("BODY", body))


def to_markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(text):
            return _escape(text)
        case Picture(file, alt, caption):
            return f"![{_escape(alt)}]({file})\n\n*{_escape(caption)}*"
        case Listing(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}text\n{text}\n{fence}"
        case Table(header, rows):
            rule = ["---:" if block.numeric(i) else "---" for i in range(len(header))]
            lines = [map(_escape, header), rule, *(map(_escape, row) for row in rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Picture(file, alt, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
        case Listing(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(header, rows):
            lines = [_row("th", header, block), *(_row("td", row, block) for row in rows)]
            return '<div class="table"><table>' + "\n".join(lines) + "</table></div>"


def _row(tag: str, cells: Sequence[str], table: Table) -> str:
    kinds = [' class="number"' if table.numeric(i) else "" for i in range(len(cells))]
    row = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{row}</tr>"


def _escape(text: str) -> str:
    """Text as itself in Markdown: its signs would otherwise start emphasis, code, a link, HTML or a table cell."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text).replace("\n", " ")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { font: 17px/1.6 system-ui, sans-serif; color: #1b1b1b; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.6rem; border-bottom: 2px solid #0072B2; padding-bottom: .2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { background: #f3f6f9; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
pre { background: #f6f6f4; border-left: 4px solid #56B4E9; padding: .8rem 1rem; font-size: .85rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1.6rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .92rem; }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #16181b; } th { background: #24282d; }
  pre { background: #202326; } td, th { border-color: #3a3f45; } figcaption { color: #aaa; }
  img { background: #fff; } }
</style>
</head>
<body>
BODY
</body>
</html>
"""
