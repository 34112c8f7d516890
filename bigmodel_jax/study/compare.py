"""`bigmodel compare RUN_A RUN_B`: what two runs were asked, what they were fed, and where they parted.

Read from the files of the runs alone. Two runs that should be the same part either because they were fed differently
(the ledger of their batches says at which step: `log.ledger`), or because they computed differently on the same
batches (the first step whose losses differ, in the last bit and beyond a tolerance).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bigmodel_jax import metrics, schema, workdir
from bigmodel_jax.measures.look import INK, Html, Words, document, figure, number, table, text
from bigmodel_jax.measures.plots import figure as plot
from bigmodel_jax.study.plots import COLOURS

WATCHED = ("loss", "grad_norm", "lr")  # of each training row, in the order they are reported
_SHOWN = 60  # characters of a value in a table


def compare(first: str, second: str, tolerance: float = 1e-3) -> dict[str, Any]:
    """Everything that can be said of two runs, as plain values; see `lines` and `page`.

    Args:
      tolerance: relative difference of two losses that counts as more than rounding.

    Raises:
      InputError: a path that is not a run.
    """
    runs = [_Run(path) for path in (first, second)]
    if runs[0].name == runs[1].name:
        for run in runs:
            run.name = run.path
    missing = [f"{run.name} has no {file}" for run in runs for file in run.missing]
    return {
        "runs": [run.name for run in runs], "paths": [run.path for run in runs], "tolerance": tolerance,
        "missing": missing, "lengths": [run.last for run in runs],
        "config": schema.difference(runs[0].config, runs[1].config),
        "environment": schema.difference(runs[0].environment, runs[1].environment),
        "data": [run.result.get("data", "") for run in runs],
        "batches": _batches(*runs),
        "parted": {name: _parted(runs[0].train, runs[1].train, name, tolerance) for name in WATCHED},
        "evals": _evals(*runs),
        "state": [run.result.get("state_hash", "") for run in runs],
        "curves": [{"train": run.curve, "eval": run.eval_curves} for run in runs],
    }  # fmt: skip


class _Run:
    """What the directory of a run holds, read once."""

    def __init__(self, path: str):
        folder = workdir.existing(path)
        self.path, self.name = str(path), Path(str(path)).name or str(path)
        self.config = json.loads((folder / "config.json").read_text())
        self.missing = [name for name in ("env.json", "result.json") if not (folder / name).exists()]
        starts = [] if "env.json" in self.missing else json.loads((folder / "env.json").read_text())["starts"]
        kept = ("commit", "python", "versions", "platform", "device_kind", "devices", "processes", "cpus", "flags")
        self.environment = {key: starts[-1][key] for key in kept if key in starts[-1]} if starts else {}
        self.result = {} if "result.json" in self.missing else json.loads((folder / "result.json").read_text())
        rows = metrics.read(folder)
        self.missing += [] if rows else ["metrics.jsonl with rows"]
        self.train = {row["step"]: row for row in rows if "event" not in row}
        self.batches = {row["step"]: row for row in rows if row.get("event") == "batch"}
        self.evals = {(row["name"], row["step"]): row for row in rows if row.get("event") == "eval"}
        self.last = max((row["step"] for row in rows), default=0)

    @property
    def curve(self) -> list[list[float]]:
        return [[step, row["loss"]] for step, row in self.train.items() if "loss" in row]

    @property
    def eval_curves(self) -> dict[str, list[list[float]]]:
        out: dict[str, list[list[float]]] = {}
        for (name, step), row in self.evals.items():
            if "loss" in row:
                out.setdefault(name, []).append([step, row["loss"]])
        return out


def _batches(first: _Run, second: _Run) -> dict[str, Any]:
    """steps: compared. ids, hash: first step at which the example ids, or the contents, differ; None for none."""
    lacking = [run.name for run in (first, second) if not run.batches]
    common = sorted(set(first.batches) & set(second.batches))
    found: dict[str, Any] = {"lacking": lacking, "steps": len(common), "ids": None, "hash": None, "hashed": 0}
    for step in common:
        one, two = first.batches[step], second.batches[step]
        if found["ids"] is None and one["ids"] != two["ids"]:
            found["ids"] = step
            found["differ"] = sum(a != b for a, b in zip(one["ids"], two["ids"], strict=False))
            found["sizes"] = [len(one["ids"]), len(two["ids"])]
        if "hash" in one and "hash" in two:
            found["hashed"] += 1
            if found["hash"] is None and one["hash"] != two["hash"]:
                found["hash"] = step
    return found


def same(a: float, b: float, tolerance: float = 0.0) -> bool:
    """Whether two numbers are equal, or within a relative tolerance; NaN equals NaN."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b))


def _parted(
    first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]], name: str, tolerance: float
) -> dict[str, Any]:
    """steps: with both. bitwise, beyond: [step, first, second] of the first difference, None for none. largest: the
    largest relative difference and its step."""
    common = [s for s in sorted(set(first) & set(second)) if name in first[s] and name in second[s]]
    found: dict[str, Any] = {"steps": len(common), "bitwise": None, "beyond": None, "largest": None}
    for step in common:
        a, b = float(first[step][name]), float(second[step][name])
        if same(a, b):
            continue
        found["bitwise"] = found["bitwise"] or [step, a, b]
        if not same(a, b, tolerance):
            found["beyond"] = found["beyond"] or [step, a, b]
        away = abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf
        if found["largest"] is None or away > found["largest"][1]:
            found["largest"] = [step, away]
    return found


def _evals(first: _Run, second: _Run) -> list[dict[str, Any]]:
    """The last evaluation that both have of each set, by metric."""
    out = []
    common = set(first.evals) & set(second.evals)
    for name in sorted({name for name, _ in common}):
        step = max(step for other, step in common if other == name)
        one, two = first.evals[name, step], second.evals[name, step]
        for key in sorted(set(one) & set(two) - {*metrics.RESERVED, "examples"}):
            if isinstance(one[key], (int, float)) and isinstance(two[key], (int, float)):
                out.append({"set": name, "step": step, "metric": key, "values": [one[key], two[key]]})
    return out


def lines(found: Mapping[str, Any]) -> list[str]:
    """What a person reads first, one fact a line."""
    one, two = found["runs"]
    out = list(found["missing"])
    if len(set(found["lengths"])) > 1:
        ends = f"{one} ends at step {found['lengths'][0]:,}, {two} at {found['lengths'][1]:,}"
        out.append(f"{ends}; compared where both have rows")
    changed = found["config"]
    out.append(f"config: {len(changed)} leaves differ: {', '.join(changed)}" if changed else "config: the same")
    if found["environment"]:
        out.append(f"environment: differs in {', '.join(found['environment'])}")
    if all(found["data"]) and len(set(found["data"])) > 1:
        out.append("data: other fingerprints; the examples or their order are not the same")
    out += _batch_lines(found)
    out += [_parted_line(name, found["parted"][name], found["tolerance"]) for name in WATCHED]
    if all(found["state"]):
        out.append("final state: the same bits" if len(set(found["state"])) == 1 else "final state: other bits")
    return out


def _batch_lines(found: Mapping[str, Any]) -> list[str]:
    b = found["batches"]
    if b["lacking"]:
        return [f"batches: no ledger in {' and '.join(b['lacking'])}; run with --config.log.ledger=True to have one"]
    if not b["steps"]:
        return ["batches: no step is in both ledgers"]
    if b["ids"] is None and b["hash"] is None:
        content = "ids and contents" if b["hashed"] == b["steps"] else f"ids, and contents where hashed ({b['hashed']})"
        return [f"batches: the same {content} at all {b['steps']:,} steps"]
    out = []
    if b["ids"] is not None:
        sizes = "" if b["sizes"][0] == b["sizes"][1] else f", {b['sizes'][0]} and {b['sizes'][1]} rows"
        out.append(f"batches: other example ids from step {b['ids']:,} ({b['differ']} of them differ there{sizes})")
    if b["hash"] is not None and (b["ids"] is None or b["hash"] < b["ids"]):
        out.append(f"batches: the same ids, but other contents from step {b['hash']:,} (transforms, tokenizer, files)")
    return out


def _parted_line(name: str, p: Mapping[str, Any], tolerance: float) -> str:
    if not p["steps"]:
        return f"{name}: no step is logged by both"
    if p["bitwise"] is None:
        return f"{name}: bitwise the same at all {p['steps']:,} common steps"
    step, a, b = p["bitwise"]
    out = f"{name}: first differs at step {step:,} ({a!r} and {b!r})"
    if p["beyond"] is None:
        return f"{out}, never by more than {tolerance:g} (at most {p['largest'][1]:.2g}, step {p['largest'][0]:,})"
    return f"{out}, by more than {tolerance:g} from step {p['beyond'][0]:,}"


def curves(found: Mapping[str, Any], axis: Any) -> None:
    """Training loss of both, one thick and one thin so that equal curves show both, and evaluations as points."""
    finite = []
    for place, (name, each) in enumerate(zip(found["runs"], found["curves"], strict=True)):
        look: dict[str, Any] = {"color": COLOURS[place], "linestyle": ("-", "--")[place]}
        axis.plot(*_columns(each["train"]), linewidth=(3.0, 1.3)[place], alpha=(0.75, 1.0)[place], label=name, **look)
        for set_name, points in each["eval"].items():
            axis.plot(*_columns(points), marker=("o", "s")[place], markersize=5, linewidth=0, color=COLOURS[place],
                      label=f"{name}, {set_name}")  # fmt: skip
        values = [y for _, y in each["train"] if math.isfinite(y)]
        finite += values[len(values) // 20 :]
    if finite:
        pad = 0.05 * (max(finite) - min(finite)) or 0.1
        axis.set_ylim(min(finite) - pad, max(finite) + pad)
    step = found["parted"]["loss"]["beyond"]
    if step:
        axis.axvline(step[0], color=INK, linewidth=1, linestyle=":")
        axis.annotate(f"part at {step[0]:,}", (step[0], 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axis.set(xlabel="step", ylabel="loss")
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def page(found: Mapping[str, Any]) -> str:
    """The comparison as one HTML page."""
    one, two = found["runs"]
    parts = [f"<h1>{text(one)} against {text(two)}</h1>", f'<p class="soft">{text(" · ".join(found["paths"]))}</p>']
    parts += ["<ul>", *(f"<li>{text(line)}</li>" for line in lines(found)), "</ul>"]
    if any(each["train"] or each["eval"] for each in found["curves"]):
        svg = plot(partial(curves, found), (5.6, 3.8), "svg")
        parts.append(f'<div class="plots">{figure(svg, f"Loss of {one} and {two}")}</div>')
    for what, name in (("config", "Config"), ("environment", "Environment")):
        if found[what]:
            rows = [
                [leaf, *(Html(f"<code>{text(_short(v))}</code>") for v in pair)]
                for leaf, pair in found[what].items()
            ]  # fmt: skip
            parts += [f"<h2>{name}</h2>", table(("leaf", one, two), rows, caption="What differs", sortable=True)]
    if found["evals"]:
        rows = [
            [Words(f"{e['set']}/{e['metric']}"), f"{e['step']:,}", *map(number, e["values"]),
             number(e["values"][1] - e["values"][0], 3)]
            for e in found["evals"]
        ]  # fmt: skip
        parts += ["<h2>Evaluation</h2>", table(("metric", "step", one, two, "difference"), rows)]
    return document(f"{one} against {two}", parts)


def _short(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"


def compare_runs(first: str, second: str, tolerance: float, out: str) -> None:
    """The verb: print the lines, and with `out` write compare.json and index.html there."""
    found = compare(first, second, tolerance)
    print("\n".join(lines(found)))
    for leaf, (a, b) in found["config"].items():
        print(f"  {leaf}: {_short(a)} -> {_short(b)}")
    for e in found["evals"]:
        print(f"  {e['set']}/{e['metric']} at step {e['step']:,}: {number(e['values'][0])} -> {number(e['values'][1])}")
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.dumps(metrics.encode(found), indent=1, allow_nan=False)
        (folder / "compare.json").write_text(plain + "\n", encoding="utf-8")
        (folder / "index.html").write_text(page(found), encoding="utf-8")
        print(f"page: {folder / 'index.html'}")
