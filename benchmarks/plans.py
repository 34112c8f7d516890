"""Plans for four models on five kinds of hardware that are not here, compiled for each by its own compiler.

    python -m benchmarks.plans [MODEL@TARGET ...]        # all rows that are missing; or these, anew

One is asked for as its config is written, which does not fit, and again with the advice that was given. Writes
results/plans.json and, from it, results/plans.md. Needs `bash launch/compilers`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from bigmodel_jax import experiment
from bigmodel_jax.errors import DoesNotFit, RunError
from bigmodel_jax.parallel.mesh import AXES
from bigmodel_jax.plan import plan
from bigmodel_jax.planner import compilers, targets, verdict
from bigmodel_jax.planner.compile import compile_for

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "plans.json"
MODELS = {"1B": "llama.py:1b", "8B": "llama.py:8b", "70B": "llama.py:70b", "47B-A13B": "mixtral.py"}
TARGETS = ("v5p:8x8x8", "v5e:16x16", "h100:8x8", "v6e:16x16", "2xv5e:16x16")
# Rows of 8192 tokens, 512 to a step. Where the plain layout of the config does not fit, what `plan` advised, or what a
# row per device needs.
SLICES = ("--config.mesh.slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=256")
EXPERTS = ("--config.mesh.expert=8", "--config.mesh.room=2.0")  # room for all would be computed with, mostly empty
OFFLOAD = ("--config.model.remat=offload", "--config.mesh.offload=optimizer")
LAYOUTS = {
    ("1B", "2xv5e:16x16"): SLICES,
    ("8B", "2xv5e:16x16"): SLICES,
    ("8B", "v5e:16x16"): ("--config.microbatch=256",),
    ("8B", "h100:8x8"): ("--config.microbatch=64",),
    ("70B", "v5e:16x16"): ("--config.microbatch=256", *OFFLOAD),
    ("70B", "v6e:16x16"): ("--config.microbatch=256",),
    ("70B", "2xv5e:16x16"): (*SLICES, *OFFLOAD),
    ("70B", "h100:8x8"): ("--config.microbatch=64",),
    ("47B-A13B", "v5e:16x16"): ("--config.mesh.fsdp=32", *EXPERTS, "--config.microbatch=256"),
    ("47B-A13B", "v6e:16x16"): ("--config.mesh.fsdp=32", *EXPERTS, "--config.microbatch=256"),
    ("47B-A13B", "2xv5e:16x16"): (
        "--config.mesh.slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=32", *EXPERTS,
    ),
    ("47B-A13B", "h100:8x8"): ("--config.mesh.fsdp=8", *EXPERTS, "--config.microbatch=64"),
    ("47B-A13B", "v5p:8x8x8"): ("--config.mesh.fsdp=64", *EXPERTS),
}  # fmt: skip
SHOWN = [f"mesh.{axis}" for axis in (*AXES, "slices")]  # by the mesh of a row
REFUSED = ("8B", "v5e:8x8")  # eight rows at once on a device
# The most telling first.
ORDER = [("8B", "v5p:8x8x8"), ("8B", "v5e:16x16"), ("8B", "h100:8x8"), ("70B", "v5p:8x8x8"), ("70B", "h100:8x8")]
ORDER += [(model, target) for target in TARGETS for model in MODELS if (model, target) not in ORDER]


def measure(model: str, target: str) -> dict:
    """One row: the verdict in numbers."""
    words = LAYOUTS.get((model, target), ())
    config = experiment.resolve(experiment.read(str(ROOT / "configs" / MODELS[model])), words)
    where = targets.parse(target)
    compiled = compile_for(config, where, limit_s=3600)
    found = verdict.judge(config, where, compiled)
    return {
        "config": MODELS[model], "overrides": list(words), "mesh": {k: v for k, v in found.mesh.items() if v > 1},
        "fits": found.fits, "reason": found.reason, "compiler": compiled.compiler, "label": compiled.label,
        "memory": _figures(found.memory), "time": _figures(found.time | found.run),
        "cpu_s": compiled.cpu_s, "peak_rss": compiled.peak_rss, "jax": jax.__version__,
    }  # fmt: skip


def advised(model: str, target: str) -> dict:
    """What `bigmodel plan` says of the config as it is written, and of the words it then advises."""
    raw = experiment.read(str(ROOT / "configs" / MODELS[model]))
    try:
        plan(experiment.resolve(raw), target, limit_s=3600)
    except DoesNotFit as error:
        said = str(error)
    else:
        raise SystemExit(f"{model} fits {target} as it is written: there is nothing to advise")
    words = [word for word in said.split() if word.startswith("--config.")]
    found = plan(experiment.resolve(raw, words), target, limit_s=3600)
    return {"config": MODELS[model], "target": target, "said": said, "words": words, "then": found.reason}


def _figures(figures: dict[str, verdict.Figure]) -> dict[str, dict]:
    return {name: {"value": f.value, "unit": f.unit, "from": f.source} for name, f in figures.items()}


def markdown(rows: dict) -> str:
    """The table of results/plans.md."""
    lines = [
        "# Plans", "",
        "Written by `python -m benchmarks.plans`. Memory is what the target's own compiler says; the step time is a",
        "roofline of the compiled program over data-sheet rates, a bound that no run beats, and so are tokens/s and",
        "days. For GPUs the description given to the compiler is written by hand and unchecked against a card.", "",
        "| model | target | layout | GiB per device | of | fits | step >= | MFU <= | Mtokens/s <= | days >= | "
        "compile CPU s | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model in MODELS:
        for target in TARGETS:
            row = rows.get(f"{model}@{target}")
            if row is None:
                lines.append(f"| {model} | {target} | not compiled yet | | | | | | | | | |")
                continue
            layout = ", ".join(f"{axis} {row['mesh'][axis]}" for axis in AXES if axis in row["mesh"])
            rest = [word.removeprefix("--config.") for word in row["overrides"]]
            layout += "".join(f", {word}" for word in rest if word.split("=")[0] not in SHOWN)
            cells = [_cell(row["memory"], name, 2**30, form) for name, form in (("needs", ".2f"), ("memory", ".1f"))]
            cells += [_cell(row["time"], *what) for what in (
                ("step", 1, ".2f s"), ("MFU", 0.01, ".0f%"), ("tokens/s", 1e6, ".2f"), ("days", 1, ".2f"))]  # fmt: skip
            fits = {True: "yes", False: "**no**", None: "n/a"}[row["fits"]]
            cost = f"{row['cpu_s']:.0f} | {row['peak_rss'] / 2**30:.2f}"
            lines.append(" | ".join(["", model, target, layout, *cells[:2], fits, *cells[2:], cost, ""]).strip())
    if refused := rows.get("refused"):
        lines += [
            "", f"`bigmodel plan --config configs/{refused['config']} --target {refused['target']}` ends with", "",
            f"> {refused['said']}", "", f"and with those words: {refused['then']}.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(figures: dict[str, dict], name: str, unit: float, form: str) -> str:
    value = figures.get(name, {}).get("value")
    digits = form.rstrip("s% ")
    return "n/a" if value is None else f"{value / unit:{digits}}{form[len(digits) :]}"


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    every = [f"{model}@{target}" for model, target in ORDER]
    for name in sys.argv[1:] or [name for name in every if name not in rows]:
        model, target = name.split("@")
        if not compilers.version(targets.parse(target)):
            print(f"{name}: no compiler here (bash launch/compilers)", flush=True)
            continue
        try:
            rows[name] = measure(model, target)
        except RunError as error:
            print(f"{name}: {error}", flush=True)
            continue
        RESULT.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        (ROOT / "results" / "plans.md").write_text(markdown(rows))
        print(f"{name}: {rows[name]['reason']}, {rows[name]['cpu_s']:.0f} CPU s", flush=True)
    if "refused" not in rows and compilers.version(targets.parse(REFUSED[1])):
        rows["refused"] = advised(*REFUSED)
        RESULT.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    (ROOT / "results" / "plans.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
