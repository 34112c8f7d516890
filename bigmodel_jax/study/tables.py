"""The tables of a study as Markdown and as LaTeX (booktabs), with the verdicts in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bigmodel_jax.measures.look import number
from bigmodel_jax.study.findings import probability, signed
from bigmodel_jax.study.page import between, changes, duration, of_seeds, run_words, units

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "∞": r"$\infty$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the one table that says it all."""
    published = any(v["published"] is not None for v in report["variants"])
    heads = [
        "variant", "n", "mean", "sd", "95% interval (t)", "95% interval (bootstrap)", "gain", "95% interval of gain",
        "p (Holm)", "g", "seeds needed", *["published"] * published, "time per run",
    ]  # fmt: skip
    out = []
    for v in report["variants"]:
        a = v["against"]
        against = ["–"] * 5
        if a is not None:
            against = [signed(a["mean"]), between(a["student"], signed), probability(a["holm"]), number(a["g"], 3),
                       number(a["seeds_needed"])]  # fmt: skip
        name = v["name"] + (" (baseline)" if v["name"] == report["baseline"] else "")
        out.append([
            name, of_seeds(v), number(v["mean"]), number(v["sd"], 2), between(v["student"]), between(v["bootstrap"]),
            *against, *[number(v["published"])] * published, duration(v["wall_s"]),
        ])  # fmt: skip
    return heads, out


def about(report: Mapping[str, Any]) -> str:
    """What the columns are, in a sentence or three."""
    better = "less" if report["mode"] == "min" else "more"
    out = (
        f"{report['metric']}, {better} is better; gains are over {report['baseline']} on common {units(report)}, "
        f"positive is better; p corrected by Holm over {sum(v['against'] is not None for v in report['variants'])} "
        "comparisons."
    )
    if report["folds"]:
        out += " Intervals and p are corrected for training rows that folds share (Nadeau and Bengio 2003)."
    if any(v["published"] is not None for v in report["variants"]):
        out += f" Published: {report['published']['metric']}, {report['published']['source']}."
    return out


def markdown(report: Mapping[str, Any], plots: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown. plots: (file, caption)."""
    heads, body = rows(report)
    lines = [f"# {report['title']}", "", report["source"], ""]
    lines += [f"> {warning}\n" for warning in report["warnings"]]
    if report["claims"]:
        lines += ["## Claims", ""]
        lines += [f"- **{c['verdict']}**: {c['text']}. {c['sentence']}" for c in report["claims"]]
        lines += [""]
    lines += ["## Results", "", about(report), "", _line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_line(row) for row in body]
    lines += ["", *(f"![{caption}]({file})\n" for file, caption in plots)]
    lines += ["## Setup", "", *(f"- {line}" for line in report["setup"]), ""]
    lines += [_line(("variant", "sets of this")), _line(("---", "---"))]
    lines += [_line((v["name"], changes(v) or "nothing")) for v in report["variants"]]
    lines += ["", "## How it was judged", "", report["rule"], "", "## Runs", ""]
    heads = ("cell", "variant", "seed", "status", report["metric"], "time", "CPU", "commit")
    lines += [_line(heads), _line(["---"] * len(heads))]
    lines += [
        _line((c["cell"], c["variant"], run_words(c), c["status"], number(c["value"]), duration(c["wall_s"]),
               duration(c["cpu_s"]), c["commit"]))
        for c in report["cells"]
    ]  # fmt: skip
    lines += ["", "A run again:", "", "```", *dict.fromkeys(c["command"] for c in report["cells"]), "```", ""]
    lines += [f"- {what}: {', '.join(found) or 'not recorded'}" for what, found in report["fingerprints"].items()]
    lines += [f"- {line}" for line in report.get("environment", ())]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def latex(report: Mapping[str, Any]) -> str:
    """A table and the verdicts to \\input into a paper; needs the package booktabs. Wide: made for table*."""
    heads, body = rows(report)
    label = re.sub(r"[^A-Za-z0-9]+", "-", report["name"]).strip("-")
    lines = [
        "% \\usepackage{booktabs}", r"\begin{table*}", r"\centering\small", rf"\caption{{{tex(report['title'])}. "
        rf"{tex(about(report))}}}", rf"\label{{tab:{label}}}", rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule", _row(heads), r"\midrule", *map(_row, body), r"\bottomrule", r"\end{tabular}", r"\end{table*}",
    ]  # fmt: skip
    if report["claims"]:
        lines += ["", r"\begin{itemize}"]
        lines += [rf"\item \textbf{{{c['verdict']}}}: {tex(c['text'])}. {tex(c['sentence'])}" for c in report["claims"]]
        lines += [r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    """Text with the characters that mean something to LaTeX escaped; a minus before a number is a minus."""
    out = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", out)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(tex, cells)) + r" \\"
