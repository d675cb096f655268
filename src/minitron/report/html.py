"""The report's HTML: sections, tables and figures. All text is escaped here; SVG is inserted as it is.

A page loads nothing: its style sheet and figures are inline, it has no scripts, and its content security policy forbids
    both.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

Heading = str | tuple[str, str]  # a name, or a name and its unit


def document(title: str, header: str, body: str) -> str:
    """Write the whole page; header and body are HTML."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{header}
<main>
{body}
</main>
</body>
</html>
"""


def section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *(part for part in parts if part), "</section>"])


def subsection(title: str, *parts: str) -> str:
    return "\n".join([f"<h3>{escape(title)}</h3>", *(part for part in parts if part)])


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def facts(pairs: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items()) + "</dl>"


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>\n{content}</details>"


def figure(svg: str, title: str, caption: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption>\n{svg}</figure>"


def figures(drawn: Iterable[str]) -> str:
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"


def table(caption: str, head: Sequence[Heading], rows: Iterable[Sequence[str]]) -> str:
    """Write a table that scrolls by itself on a narrow page; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{_heading(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _heading(cell: Heading) -> str:
    return escape(cell) if isinstance(cell, str) else f"{escape(cell[0])}<small>{escape(cell[1])}</small>"
