"""An evaluation as one page: HTML with everything inside it, no scripts, no network, fit for a phone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigmodel_jax.measures.look import document, figure, number, picture, text
from bigmodel_jax.measures.look import table as _table

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


def interval(found: Mapping[str, Any] | None) -> str:
    """An interval as "low to high", or "–" where there is none."""
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
    parts = [f"<h1>Evaluation of {text(report['run'])}</h1>"]
    facts = " · ".join(f"{text(k)} {text(v)}" for k, v in report["facts"].items())
    parts.append(f'<p class="soft">{facts}</p>')
    for name, result in report["sets"].items():
        parts += _set(name, result, plots.get(name, {}), pictures.get(name, {}))
    return document(f"{report['run']}: evaluation", parts)


def _set(name: str, result: Mapping[str, Any], plots: Mapping[str, bytes], pictures: Mapping[int, bytes]) -> list[str]:
    out = [f"<h2>{text(name)}</h2>", f'<p class="soft">{text(result["about"])}</p>']
    level = f"{100 * result['level']:g}% interval"
    rows = table(result)
    out.append(_table(("measure", "value", level), [row[:3] for row in rows]))
    notes = [f"{row[0]}: {row[3]}" for row in rows if row[3]]
    if "all" in result["notes"]:
        notes.insert(0, result["notes"]["all"])
    out += [f'<p class="soft">{text(note)}</p>' for note in notes]
    out.append('<div class="plots">')
    for kind, png in plots.items():
        caption = PLOTS[kind].format(units=result["units"])
        out.append(figure(png, caption))
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
    parts = [picture(pictures[worst["id"]], f"example {worst['id']}")] if worst["id"] in pictures else []
    parts += [f"<div>{text(line)}</div>" for line in lines]
    if worst.get("text"):
        parts.append(f"<pre>{text(worst['text'])}</pre>")
    return f'<div class="card">{"".join(parts)}</div>'


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return number(value) if isinstance(value, (int, float)) else str(value)
