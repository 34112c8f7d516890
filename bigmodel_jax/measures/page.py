"""An evaluation as one page: HTML with everything inside it, no scripts, no network, fit for a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

TITLES = {
    "nll": "loss (nats)", "loss": "loss", "top3": "top-3 accuracy", "top5": "top-5 accuracy",
    "bits_per_byte": "bits per byte", "mcc": "Matthews correlation", "auc": "AUC",
    "ece": "calibration error", "precision_micro": "precision, micro",
    "precision_macro": "precision, macro", "recall_micro": "recall, micro", "recall_macro": "recall, macro", "f1": "F1",
    "f1_micro": "F1, micro", "f1_macro": "F1, macro", "exact_match": "exact match", "bleu": "BLEU", "chrf": "chrF",
    "rouge_l": "ROUGE-L", "mse": "mean squared error", "mae": "mean absolute error", "r2": "R²",
}  # fmt: skip
PLOTS = {
    "roc": "ROC curve", "confusion": "Confusion matrix", "reliability": "Reliability", "spread": "Spread over {units}",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --soft: #5c6b7a; --line: #d9e0e7; --paper: #fff; --card: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4eaf0; --soft: #9aa8b5; --line: #37424d; --paper: #161b21; --card: #1f262e } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .3rem 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p, dl { margin: .3rem 0 } .soft { color: var(--soft); font-size: .875rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7.5rem }
th { font-weight: 600; font-size: .875rem; color: var(--soft) }
.plots { margin-top: .8rem; display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
.plots figure { margin: 0; flex: 1 1 18rem; max-width: 30rem }
.plots img { width: 100%; background: #fff; border-radius: 6px }
figcaption { font-size: .875rem; color: var(--soft) }
.cards { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.card { background: var(--card); border-radius: 6px; padding: .6rem .7rem; font-size: .875rem }
.card img { display: block; margin-bottom: .4rem; image-rendering: pixelated; max-width: 100% }
pre { white-space: pre-wrap; margin: .4rem 0 0; font-size: .8rem; max-height: 14rem; overflow-y: auto }
"""


def number(value: Any) -> str:
    """A value as people read it: four significant digits, thousands apart, "–" for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def interval(found: Mapping[str, Any] | None) -> str:
    """"low to high", or "–"."""
    if not found or found.get("low") is None:
        return "–"
    return f"{number(found['low'])} to {number(found['high'])}"


def title(name: str) -> str:
    """What a measure is called."""
    return TITLES.get(name, name.replace("_", " "))


def table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, value, interval, note) of each measure of one evaluation set."""
    rows = []
    for name, value in result["values"].items():
        found = result["intervals"].get(name)
        notes = [result["notes"].get(name, "")] + ([found["note"]] if found and found.get("note") else [])
        notes = [note for note in notes if note and not (value is None and note.startswith("undefined on"))]
        rows.append((title(name), number(value), interval(found), "; ".join(notes)))
    return rows


def render(
    report: Mapping[str, Any],
    plots: Mapping[str, Mapping[str, bytes]],
    pictures: Mapping[str, Mapping[int, bytes]],
) -> str:
    """The page.

    Args:
      report: what eval.json holds: run, step, facts and sets.
      plots: {set: {plot: PNG}}. pictures: {set: {example id: PNG}}.
    """
    parts = [f"<h1>Evaluation of {_text(report['run'])}</h1>"]
    facts = " · ".join(f"{_text(k)} {_text(v)}" for k, v in report["facts"].items())
    parts.append(f'<p class="soft">{facts}</p>')
    for name, result in report["sets"].items():
        parts += _set(name, result, plots.get(name, {}), pictures.get(name, {}))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report['run'])}: evaluation</title><style>{_STYLE}</style></head><body>\n{body}\n"
        "</body></html>\n"
    )


def _set(
    name: str, result: Mapping[str, Any], plots: Mapping[str, bytes], pictures: Mapping[int, bytes]
) -> list[str]:
    out = [f"<h2>{_text(name)}</h2>", f'<p class="soft">{_text(result["about"])}</p>']
    level = f"{100 * result['level']:g}% interval"
    rows = table(result)
    out.append(_table(("measure", "value", level), [row[:3] for row in rows]))
    notes = [f"{row[0]}: {row[3]}" for row in rows if row[3]]
    if "all" in result["notes"]:
        notes.insert(0, result["notes"]["all"])
    out += [f'<p class="soft">{_text(note)}</p>' for note in notes]
    out.append('<div class="plots">')
    for kind, png in plots.items():
        caption = PLOTS[kind].format(units=result["units"])
        out.append(f"<figure>{_image(png, caption)}<figcaption>{_text(caption)}</figcaption></figure>")
    out.append("</div>")
    details = result.get("details", {})
    if details.get("per_class"):
        columns = ("name", "support", "predicted", "precision", "recall", "f1")
        each = [tuple(str(c[k]) if k == "name" else number(c[k]) for k in columns) for c in details["per_class"]]
        heads = ("class", "examples", "predicted", "precision", "recall", "F1")
        out += ["<h3>By class</h3>", _table(heads, each)]
    if details.get("confused"):
        pairs = [(c["label"], c["predicted"], number(c["count"])) for c in details["confused"][:10]]
        out += ["<h3>Most confused</h3>", _table(("label", "predicted", "examples"), pairs)]
    if result["worst"]:
        heading = "Largest loss" if "loss" in result["worst"][0] else "Furthest from the references"
        cards = "".join(_card(each, pictures) for each in result["worst"])
        out.append(f'<h3>{heading}</h3><div class="cards">{cards}</div>')
    return out


def _card(worst: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    lines = [f"#{worst['id']}" + (f": loss {number(worst['loss'])}" if "loss" in worst else "")]
    lines += [f"{key}: {_shown(worst[key])}" for key in worst if key not in ("id", "loss", "text", "picture")]
    parts = [_image(pictures[worst["id"]], f"example {worst['id']}")] if worst["id"] in pictures else []
    parts += [f"<div>{_text(line)}</div>" for line in lines]
    if worst.get("text"):
        parts.append(f"<pre>{_text(worst['text'])}</pre>")
    return f'<div class="card">{"".join(parts)}</div>'


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return number(value) if isinstance(value, (int, float)) else str(value)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{_text(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(value: Any) -> str:
    return html.escape(str(value))
