"""The report's HTML: sections, tables and figures. All text is escaped here; SVG goes in as it is."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

Heading = str | tuple[str, str]  # a name, or a name and its unit


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
    """The first cell of each row names it. The table scrolls by itself where the page is too narrow."""
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
