"""How our pages look: one file with everything inside it, no network, light and dark, from a phone to a wide screen.

Used by the page of an evaluation and the page of a study. Tables that sort carry a few lines of script; a page
without one has none.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

INK, PAPER = "#1c2530", "#ffffff"  # plots are drawn with these; `picture` lets them follow the page
_DARK_INK, _DARK_PAPER = "#e4eaf0", "#161b21"
_STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --soft: #566472; --line: #d9e0e7; --paper: {PAPER}; --card: #f5f7f9;
  --good: #17693a; --bad: #a3282d; --open: #6d5200; --link: #0b57a4 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {_DARK_INK}; --soft: #a3b0bd; --line: #37424d; --paper: {_DARK_PAPER}; --card: #1f262e;
    --good: #6fd195; --bad: #ff9a96; --open: #e8c15a; --link: #83bdf5 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }}
h1 {{ font-size: 1.4rem; line-height: 1.25; margin: .3rem 0 }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .4rem; border-top: 1px solid var(--line); padding-top: 1rem }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .3rem }}
p, dl, ul {{ margin: .3rem 0; max-width: 50rem }} .soft {{ color: var(--soft); font-size: .875rem }}
a {{ color: var(--link) }} code {{ font-size: .85em }}
.wide {{ overflow-x: auto; position: relative }} .wide:focus-visible {{ outline: 2px solid var(--link) }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 }}
caption {{ text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .3rem }}
th, td {{ text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }}
th {{ font-weight: 600; font-size: .875rem; color: var(--soft); vertical-align: bottom }}
tbody th {{ font-weight: 500; font-size: inherit; color: var(--ink) }}
tr > :first-child {{ text-align: left; white-space: normal;
  min-width: clamp(7.5rem, 16vw, 14rem); position: sticky; left: 0;
  background: var(--paper) }}
th.words, td.words {{ text-align: left }}
th button {{ font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit }}
th button::after {{ content: "\\2195"; opacity: .45; padding-left: .25em }}
th[aria-sort=ascending] button::after {{ content: "\\2191"; opacity: 1 }}
th[aria-sort=descending] button::after {{ content: "\\2193"; opacity: 1 }}
.plots {{ margin-top: .8rem; display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start }}
.plots figure {{ margin: 0; flex: 1 1 18rem; max-width: 30rem }}
.plots img {{ width: 100% }} img[src^="data:image/png"] {{ background: {PAPER}; border-radius: 6px }}
figcaption {{ font-size: .875rem; color: var(--soft) }}
.cards {{ display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }}
.card {{ background: var(--card); border-radius: 6px; padding: .6rem .7rem; font-size: .875rem }}
.card img {{ display: block; margin-bottom: .4rem; image-rendering: pixelated; max-width: 100% }}
.note {{ max-width: none; border-left: 4px solid var(--open); background: var(--card);
  padding: .4rem .8rem; margin: .5rem 0 }}
.verdict {{ border-left: 4px solid var(--open); background: var(--card); padding: .6rem .9rem; margin: .7rem 0 }}
.verdict p {{ max-width: none }} .verdict b {{ color: var(--open) }}
.supported {{ border-color: var(--good) }} .supported b {{ color: var(--good) }}
.contradicted {{ border-color: var(--bad) }} .contradicted b {{ color: var(--bad) }}
pre {{ white-space: pre-wrap; margin: .4rem 0 0; font-size: .8rem; max-height: 14rem; overflow-y: auto }}
summary {{ cursor: pointer; color: var(--link) }}
@media print {{ th button::after {{ content: "" }} details > * {{ display: block }} }}
"""
_SORT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const place = [...head.parentNode.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.children[place].dataset.value ?? row.children[place].textContent;
  const rows = [...body.rows].map((row, i) => [key(row), i, row]);
  rows.sort(([a, i], [b, j]) => {
    if (a === "" || b === "") return (a === "") - (b === "") || i - j;
    const x = Number(a), y = Number(b);
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
    return (up ? order : -order) || i - j;
  });
  body.append(...rows.map(([, , row]) => row));
});
"""


class Html(str):
    """Text that is HTML already."""


class Words(str):
    """A cell of words: to the left, where numbers are to the right."""


class Cell:
    """A cell of a table: what is shown, and what it sorts by (None sorts last, whichever way)."""

    def __init__(self, shown: Any, value: float | None = None):
        self.shown, self.value = shown, value


def number(value: Any, digits: int = 4) -> str:
    """A value as people read it: four significant digits, thousands apart, "–" for none."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.{digits}g}"


def text(value: Any) -> str:
    """Escaped, unless it is `Html`."""
    return str(value) if isinstance(value, Html) else html.escape(str(value))


def table(heads: Sequence[Any], rows: Sequence[Sequence[Any]], *, caption: str = "", sortable: bool = False) -> str:
    """A table in a box that scrolls by itself where the screen is narrow; the first cell of a row is its name.

    Cells are text, `Words`, `Html` or `Cell`. With `sortable`, a click (or Enter) on a head sorts by it.
    """
    body = "".join(f"<tr>{''.join(_cell(cell, i == 0) for i, cell in enumerate(row))}</tr>" for row in rows)
    words = [isinstance(cell, (Words, Html)) for cell in rows[0]] if rows else [False] * len(heads)
    names = "".join(
        f'<th scope="col"{_words(left)} aria-sort="none"><button type="button">{text(h)}</button></th>' if sortable
        else f'<th scope="col"{_words(left)}>{text(h)}</th>'
        for h, left in zip(heads, words, strict=True)
    )  # fmt: skip
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    # Reachable by keyboard, since only a focused box can be scrolled by one.
    box = f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(caption or str(heads[0]))}">'
    return f"{box}<table>{title}<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: Any, first: bool) -> str:
    value = _words(isinstance(cell, (Words, Html)))
    if isinstance(cell, Cell):
        value = f' data-value="{"" if cell.value is None else repr(float(cell.value))}"'
        cell = cell.shown
    return f'<th scope="row"{value}>{text(cell)}</th>' if first else f"<td{value}>{text(cell)}</td>"


def _words(left: bool) -> str:
    return ' class="words"' if left else ""


def picture(data: bytes, what: str) -> str:
    """An <img> that holds a PNG or SVG; in an SVG, ink and paper follow the light or dark page."""
    kind = "png"
    if not data.startswith(b"\x89PNG"):
        kind = "svg+xml"
        drawn = data.decode().replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
        style = (
            f"<style>:root{{--ink:{INK};--paper:{PAPER}}}@media(prefers-color-scheme:dark)"
            f"{{:root{{--ink:{_DARK_INK};--paper:{_DARK_PAPER}}}}}</style>"
        )
        start = drawn.index(">", drawn.index("<svg")) + 1
        data = (drawn[:start] + style + drawn[start:]).encode()
    return f'<img alt="{html.escape(what)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def figure(data: bytes, caption: str, alt: str = "") -> str:
    """A picture with its caption. alt: what it shows, in words, default the caption."""
    return f"<figure>{picture(data, alt or caption)}<figcaption>{text(caption)}</figcaption></figure>"


def document(title: str, body: Iterable[str]) -> str:
    """The page. The script of sortable tables comes along where there is one."""
    inside = "\n".join(body)
    script = f"<script>{_SORT}</script>" if 'aria-sort="none"' in inside else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{_STYLE}</style></head><body>\n{inside}\n'
        f"{script}</body></html>\n"
    )
