"""A study as one HTML page: verdicts, sortable tables, plots, and how to make every number again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bigmodel_jax.measures.look import Cell, Html, Words, document, figure, number, table, text
from bigmodel_jax.study.findings import probability, signed

FEW = 30  # runs that are listed without being asked for
FIRST = ("seeds", "gains", "curves")  # plots shown with the results
MARKS = {"supported": "✓ supported", "contradicted": "✗ contradicted", "undecided": "? undecided"}


def render(report: Mapping[str, Any], plots: Mapping[str, tuple[str, str, Mapping[str, bytes]]]) -> str:
    """The page of what findings.find gives. plots: as plots.all_plots gives them, with a form "svg"."""
    better = "less" if report["mode"] == "min" else "more"
    each = f"{len(report['seeds'])} seeds each"
    each += "".join(f", of {len(folds)} folds ({leaf})" for leaf, folds in report["folds"].items())
    facts = (
        f"{report['metric']} ({better} is better) · {len(report['variants'])} variants · {each} · "
        f"{len(report['cells'])} runs, {duration(report['cost']['wall_s'])} of wall time in all, "
        f"{duration(report['cost']['cpu_s'])} of CPU time"
    )
    parts = [f"<h1>{text(report['title'])}</h1>", f"<p>{text(report['source'])}</p>", f'<p class="soft">{facts}</p>']
    parts += [f'<p class="note" role="note">{text(warning)}</p>' for warning in report["warnings"]]
    if report["claims"]:
        parts += ["<h2>Claims</h2>", *map(_claim, report["claims"])]
    parts += ["<h2>Results</h2>", _results(report)]
    parts += _plots(plots, FIRST)
    parts += ["<h2>Against the baseline</h2>", _against(report)]
    parts += ["<h2>Variants</h2>", *_plots(plots, [n for n in plots if n not in FIRST]), _variants(report)]
    parts += ["<h2>How it was judged</h2>", f"<p>{text(report['rule'])}</p>"]
    parts += ["<h2>Runs</h2>", *_runs(report)]
    return document(report["title"], parts)


def duration(seconds: float | None) -> str:
    """A time as people say it."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def between(interval: Mapping[str, Any], show: Any = number) -> str:
    """An interval as "low to high"."""
    return "–" if interval["low"] is None else f"{show(interval['low'])} to {show(interval['high'])}"


def of_seeds(variant: Mapping[str, Any]) -> str:
    """How many runs a mean rests on, and what became of the others."""
    others = [f"{variant[kind]} {kind}" for kind in ("diverged", "failed", "missing") if variant[kind]]
    return " + ".join([str(variant["n"]), *others])


def units(report: Mapping[str, Any]) -> str:
    """What runs are compared by."""
    return "seeds and folds" if report["folds"] else "seeds"


def run_words(cell: Mapping[str, Any]) -> str:
    """Which of its variant's runs a cell is."""
    return str(cell["seed"]) if cell["fold"] is None else f"{cell['seed']}, fold {cell['fold']}"


def changes(variant: Mapping[str, Any]) -> str:
    """What a variant sets, tuned leaves last."""
    shown = [f"{leaf}={value}" for leaf, value in variant["overrides"].items()]
    tuned = [f"{leaf}={value:g}" if isinstance(value, float) else f"{leaf}={value}"
             for leaf, value in variant["tuned"].items()]  # fmt: skip
    return ", ".join(shown + [f"{word} (tuned)" for word in tuned])


def _claim(claim: Mapping[str, Any]) -> str:
    verdict = claim["verdict"]
    flips = "" if claim["p_flips"] is None else f"exact p by sign flips {probability(claim['p_flips'])}, "
    exact = "" if claim["p_ranks"] is None else f"{flips or 'exact p '}by signed ranks {probability(claim['p_ranks'])}"
    effect = "" if claim["g"] is None else f"effect size g = {number(claim['g'], 3)}; "
    return (
        f'<section class="verdict {verdict}"><p><b>{MARKS[verdict]}</b> · {text(claim["text"])}</p>'
        f'<p>{text(claim["sentence"])}</p><p class="soft">{text(effect + exact)}</p></section>'
    )


def _name(report: Mapping[str, Any], variant: Mapping[str, Any]) -> Html:
    mark = ' <span class="soft">(baseline)</span>' if variant["name"] == report["baseline"] else ""
    return Html(f"{text(variant['name'])}{mark}")


def _variants(report: Mapping[str, Any]) -> str:
    rows = [[v["name"], Words(changes(v) or "nothing: the config of the study as it is")] for v in report["variants"]]
    setup = "".join(f"<li>{text(line)}</li>" for line in report["setup"])
    return f"<ul>{setup}</ul>" + table(("variant", "sets"), rows, caption="What each variant sets of this")


def _results(report: Mapping[str, Any]) -> str:
    published = any(v["published"] is not None for v in report["variants"])
    sized = len({v["parameters"] for v in report["variants"]}) > 1
    heads = ["variant", "runs", "mean", "sd", "95% interval (t)", "95% interval (bootstrap)"]
    heads += ["published"] * published + ["parameters"] * sized + ["time per run"]
    rows = []
    for v in report["variants"]:
        row = [
            _name(report, v), Cell(of_seeds(v), v["n"]), Cell(number(v["mean"]), v["mean"]),
            Cell(number(v["sd"], 2), v["sd"]), Cell(between(v["student"]), v["student"]["low"]),
            Cell(between(v["bootstrap"]), v["bootstrap"]["low"]),
        ]  # fmt: skip
        row += [Cell(number(v["published"]), v["published"])] * published
        row += [Cell(number(v["parameters"]), v["parameters"])] * sized
        rows.append([*row, Cell(duration(v["wall_s"]), v["wall_s"])])
    out = table(heads, rows, caption=f"{report['metric']} of each variant", sortable=True)
    if published:
        about = report["published"]
        line = f"Published: {about['metric']}, {about['source']}. Another scale than here."
        out += f'<p class="soft">{text(line)}</p>'
    return out


def _against(report: Mapping[str, Any]) -> str:
    rows = []
    compared = [v for v in report["variants"] if v["against"]]
    for v in compared:
        a = v["against"]
        rows.append([
            v["name"], Cell(signed(a["mean"]), a["mean"]), Cell(between(a["student"], signed), a["student"]["low"]),
            Cell(number(a["g"], 3), a["g"]), Cell(probability(a["p"]), a["p"]),
            Cell(probability(a["holm"]), a["holm"]), Cell(probability(a["p_flips"]), a["p_flips"]),
            Cell(probability(a["p_ranks"]), a["p_ranks"]), Words(a["is"]),
            Cell(number(a["seeds_needed"]), a["seeds_needed"]),
        ])  # fmt: skip
    heads = (
        "variant", "mean gain", "95% interval", "effect g", "p", "p (Holm)", "sign flips", "ranks", "verdict",
        "seeds needed",
    )  # fmt: skip
    notes = [f"{v['name']}: {v['against']['note']}" for v in compared if v["against"]["note"]]
    caption = (
        f"Gain over {report['baseline']} in {report['metric']}, positive is better; p corrected over {len(rows)} "
        "comparisons; exact p by sign flips and signed ranks beside it"
    )
    lines = "".join(f'<p class="soft">{text(note)}</p>' for note in notes)
    return table(heads, rows, caption=caption, sortable=True) + lines if rows else "<p>Only the baseline has runs.</p>"


def _plots(plots: Mapping[str, tuple[str, str, Mapping[str, bytes]]], names: Sequence[str]) -> list[str]:
    found = [figure(plots[n][2]["svg"], plots[n][0], plots[n][1]) for n in names if n in plots]
    return ['<div class="plots">', *found, "</div>"] if found else []


def _runs(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            c["variant"], Cell(run_words(c), c["seed"]), Words(c["status"]), _value(c["value"]),
            Cell(duration(c["wall_s"]), c["wall_s"]), Cell(duration(c["cpu_s"]), c["cpu_s"]), Words(c["cell"]),
            Words(c["commit"]), Html(f"<code>{text(c['command'])}</code>"),
        ]
        for c in report["cells"]
    ]  # fmt: skip
    heads = ("variant", "seed", "status", report["metric"], "time", "CPU", "cell", "commit", "command")
    prints = "".join(
        f"<li>{text(what)}: {text(', '.join(found) or 'not recorded')}</li>"
        for what, found in report["fingerprints"].items()
    )
    versions = "".join(f"<li>{text(line)}</li>" for line in report.get("environment", ()))
    runs = table(heads, rows, caption="Every run, with the command that makes it again", sortable=True)
    if len(rows) > FEW:
        runs = f"<details><summary>All {len(rows)} runs, with their commands</summary>{runs}</details>"
    return [
        runs, "<h3>Fingerprints</h3>", f"<ul>{prints}</ul>",
        "<h3>Made with</h3>", f"<ul>{versions or '<li>not recorded</li>'}</ul>",
        f'<p class="soft">The whole study: <code>{text(report["again"])}</code></p>' if report.get("again") else "",
    ]  # fmt: skip


def _value(value: float | None) -> Cell:
    known = value is not None and math.isfinite(value)
    return Cell(number(value), value if known else None)
