"""How a run is doing, read from its directory alone: running or dead, here or on another machine.

Everything comes from the files a run leaves (metrics.jsonl, env.json, result.json, checkpoints,
restarts.json): no process is asked, so it works from any machine that sees the directory, and on
runs that died months ago.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from etils import epath

from bigmodel_jax import metrics, record
from bigmodel_jax.errors import InputError

# A row this many usual intervals late means that nobody is writing any more.
LATE = 5.0
PATIENCE_S = 120.0


def read(path: str, now: float | None = None) -> dict[str, Any]:
    """State of the run in `path`.

    state: "finished", "running", "silent" (no row for much longer than usual) or "starting" (no row yet).
    step, steps: done and planned. step_s: median seconds of the last rows. tokens_per_s, examples_per_s:
    of the last row. goodput: finished steps at the usual speed, as a share of the time from the first
    start to the last row. checkpoint: newest committed step, -1 for none. eta_s: None where it cannot be said.

    Raises:
      InputError: not the directory of a run.
    """
    workdir = epath.Path(path)
    config = _json(workdir / "config.json")
    if config is None:
        raise InputError(f"'{path}' is not a run: it has no config.json")
    now = time.time() if now is None else now
    written = metrics.read(workdir)
    rows = [row for row in written if "event" not in row]
    evals = [row for row in written if row.get("event") == "eval"]
    starts = (_json(workdir / "env.json") or {}).get("starts", [])
    books = _json(workdir / "restarts.json") or {}
    out: dict[str, Any] = {
        "state": "starting", "step": 0, "steps": config["steps"], "starts": len(starts),
        "failures": books.get("failures", 0),
        "checkpoint": max(record.steps(workdir / "checkpoints"), default=-1),
        "eval": {row["name"]: row for row in evals}, "eta_s": None,
    }  # fmt: skip
    out |= {key: starts[-1].get(key) for key in ("host", "device_kind", "devices", "processes")} if starts else {}
    if rows:
        out |= _progress(rows, config["steps"], starts, now)
    if (workdir / "result.json").exists():
        out |= {"state": "finished", "eta_s": 0.0}
    return out


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _progress(rows: list[dict[str, Any]], steps: int, starts: list[dict[str, Any]], now: float) -> dict[str, Any]:
    last = rows[-1]
    # Pairs across a restart would count the time nobody ran; the median is not moved by a few of them.
    pairs = [(b["time"] - a["time"], b["step"] - a["step"]) for a, b in zip(rows, rows[1:], strict=False)]
    pairs = [(seconds, count) for seconds, count in pairs[-50:] if count > 0]
    step_s = statistics.median(s / n for s, n in pairs) if pairs else last.get("step_s")
    usual = statistics.median(s for s, _ in pairs) if pairs else PATIENCE_S
    age = now - last["time"]
    out = {
        "state": "silent" if age > max(LATE * usual, PATIENCE_S) else "running",
        "step": last["step"], "age_s": age, "step_s": step_s, "loss": last.get("loss"),
        "eta_s": step_s and (steps - last["step"]) * step_s,
        "tokens_per_s": last.get("tokens_per_s"), "examples_per_s": last.get("examples_per_s"),
        "mfu": last.get("mfu"), "skipped": last.get("skipped_total", 0.0),
    }  # fmt: skip
    if starts and step_s:
        began = time.mktime(time.strptime(starts[0]["time"], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
        whole = last["time"] - began
        out["goodput"] = min(1.0, last["step"] * step_s / whole) if whole > 0 else None
    return out


def show(status: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    done = status["step"] / max(status["steps"], 1)
    lines = [f"{status['state']}: step {status['step']} of {status['steps']} ({done:.0%})"]
    if status["state"] == "silent":
        lines[0] += f"; no row for {span(status['age_s'])}"
    elif status["state"] == "running" and status["eta_s"]:
        lines[0] += f"; about {span(status['eta_s'])} to go"
    speed = [f"{status['step_s'] * 1e3:.0f} ms per step"] if status.get("step_s") else []
    speed += [f"{status[k]:,.0f} {k.split('_')[0]}/s" for k in ("tokens_per_s", "examples_per_s") if status.get(k)][:1]
    speed += [f"{name} {status[name]:.0%}" for name in ("mfu", "goodput") if status.get(name) is not None]
    if speed:
        lines.append(", ".join(speed))
    saved = f"checkpoint {status['checkpoint']}" if status["checkpoint"] >= 0 else "no checkpoint yet"
    lines.append(f"{saved}; {status['starts']} starts, {status['failures']} crashes since the last checkpoint")
    if status.get("host"):
        devices = f"{status['devices']} x {status['device_kind']}"
        lines.append(f"{devices} in {status['processes']} processes, first on {status['host']}")
    if status.get("loss") is not None:
        skipped = f", {status['skipped']:.0f} skipped steps" if status["skipped"] else ""
        lines.append(f"loss {status['loss']:.4f}{skipped}")
    for name, row in status["eval"].items():
        shown = {k: v for k, v in row.items() if k not in metrics.RESERVED and isinstance(v, float)}
        lines.append(f"{name} at step {row['step']}: " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(shown.items())))
    return lines


def span(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return " ".join(filter(None, (f"{days} d" if days else "", f"{hours} h" if hours else "", f"{minutes} min")))
