"""`bigmodel study report`: report.json, report.md, report.tex, index.html and the plots, from the store alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigmodel_jax import metrics, status
from bigmodel_jax.study import findings, page, plots, tables
from bigmodel_jax.study.spec import Row, Study
from bigmodel_jax.study.store import Cell, Store
from bigmodel_jax.study.tuning import Choice


def of_rows(
    study: Study, rows: Sequence[Row], choices: Mapping[str, Choice], *, mixed: bool, environment: Sequence[str] = ()
) -> dict[str, Any]:
    """findings.find, and the lines that say how to make it again."""
    found = findings.find(study, rows, {name: asdict(choice) for name, choice in choices.items()}, mixed=mixed)
    again = shlex.join(["bigmodel", "study", "run", study.file, "--workdir", f"runs/{study.name}"])
    return found | {"environment": list(environment), "again": again}


def write(report: Mapping[str, Any], folder: Path) -> None:
    """All files of a report."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.all_plots(report, ("svg", "png", "pdf"))
    for name, (_, _, forms) in drawn.items():
        for form in ("png", "pdf"):
            (folder / f"{name}.{form}").write_bytes(forms[form])
    text = json.dumps(metrics.encode(report), indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    shown = [(f"{name}.png", caption) for name, (caption, _, _) in drawn.items()]
    (folder / "report.md").write_text(tables.markdown(report, shown), encoding="utf-8")
    (folder / "report.tex").write_text(tables.latex(report), encoding="utf-8")
    (folder / "index.html").write_text(page.render(report, drawn), encoding="utf-8")


def first_stage(store: Store, cells: Sequence[Cell]) -> list[str]:
    """What the runs that these start from have cost, here or where they were recorded; nothing if there are none."""
    starts = store.starts(cells)
    rows = [row for cell in starts if (row := store.row(cell) or store.from_record(cell)) is not None]
    if not starts:
        return []
    wall, cpu = (status.span(sum(getattr(row, name) for row in rows)) for name in ("wall_s", "cpu_s"))
    return [f"started from {len(starts)} runs of a first stage, {len(rows)} done in {wall} ({cpu} of CPU time)"]


def environment(store: Store, rows: Sequence[Row]) -> list[str]:
    """What the runs were made with, one line for each different answer."""
    lines: dict[str, int] = {}
    for row in rows:
        try:
            starts = json.loads((store.workdir / "cells" / row.cell / "env.json").read_text())["starts"]
        except (OSError, ValueError, KeyError):
            continue
        last = starts[-1]
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        line = f"Python {last['python']}, {versions}; {last['devices']} {last['device_kind']}, {last['cpus']} cores"
        lines[line] = lines.get(line, 0) + 1
    out = [f"{line} ({count} runs)" for line, count in lines.items()]
    commits: dict[str, int] = {}
    for row in rows:
        commits[row.commit] = commits.get(row.commit, 0) + 1
    return out + [f"commit {commit} ({count} runs)" for commit, count in commits.items()]


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """What the terminal shows: the warnings, the table, the verdicts, and where the page is."""
    heads, body = tables.rows(report)
    keep = [i for i, head in enumerate(heads) if head not in ("95% interval (bootstrap)", "g", "time per run")]
    cells = [[row[i] for i in keep] for row in (heads, *body)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keep))]
    lines = [report["title"], *(f"  ! {warning}" for warning in report["warnings"]), ""]
    for row in cells:
        first, *rest = row
        texts = [first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))]
        lines.append(f"  {'  '.join(texts)}".rstrip())
    lines += ["", *(f"{c['verdict']}: {c['text']}\n  {c['sentence']}" for c in report["claims"])]
    return "\n".join([*lines, "", f"page: {folder / 'index.html'}"])
