"""Our 8B step beside MaxText's own ahead-of-time compile: bytes per device, and bytes communicated per step.

    python -m benchmarks.plan_maxtext [v5p:8x8x8 v5e:16x16] [--maxtext-python PYTHON]

Same model, batch, length and layout: Llama-3.1-8B, 8192 tokens, one row per device, pure FSDP, scanned layers, full
recomputation, bfloat16 compute with float32 weights, AdamW. MaxText 0.2.5's rows were measured once with jax 0.12.0 and
libtpu 0.0.52; with --maxtext-python (an environment of its own, `pip install maxtext==0.2.5`) they are measured again
and read by the same reader as ours. Writes results/plan_maxtext.json and .md; a row that is there is kept (--again).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import jax

from bigmodel_jax import experiment
from bigmodel_jax.planner import compilers, targets, verdict
from bigmodel_jax.planner.compile import compile_for
from bigmodel_jax.planner.costs import costs
from bigmodel_jax.planner.hlo import read

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "plan_maxtext.json"
GiB = 2**30
TOPOLOGIES = {"v5p:8x8x8": "v5p-1024", "v5e:16x16": "v5e-256"}
# Payload in GB (1e9) per device and step; GiB per device.
RECORDED = {
    "v5p:8x8x8": {"arguments": 0.178, "temporaries": 7.0, "all-gather": 28.98, "all-reduce": 15.01, "all-to-all": 0.13},
    "v5e:16x16": {
        "arguments": 0.354,
        "temporaries": 6.07,
        "all-gather": 27.89,
        "all-reduce": 16.09,
        "all-to-all": 0.13,
    },
}
WIRE = {"all-reduce": 2.0}  # of the payload on the wire of a large ring; 1 for all others


def ours(target: str, by: str) -> dict:
    """A row of our step, weights gathered by the compiler or by rings."""
    where = targets.parse(target)
    words = [f"--config.batch_size={where.devices}", "--config.microbatch=0", f"--config.mesh.weights_by={by}"]
    words.append("--config.objective.chunk=512")
    config = experiment.resolve(experiment.read(str(ROOT / "configs" / "llama.py:8b")), words)
    compiled = compile_for(config, where, limit_s=3600)
    found = verdict.judge(config, where, compiled)
    traffic = {}
    for row in found.traffic:
        kept = traffic.setdefault(row["kind"], {"payload": 0.0, "wire": 0.0})
        kept["payload"] += row["payload"] / 1e9
        kept["wire"] += row["wire"] / 1e9
    return {
        "arguments": compiled.memory["argument"] / GiB, "temporaries": compiled.memory["temporary"] / GiB,
        "traffic": traffic, "wire": sum(t["wire"] for t in traffic.values()), "step_s": found.time["step"].value,
        "compiler": compiled.compiler, "jax": jax.__version__, "cpu_s": compiled.cpu_s, "peak_rss": compiled.peak_rss,
    }  # fmt: skip


def recorded(target: str) -> dict:
    """MaxText's row as it was measured once."""
    row = RECORDED[target]
    kinds = [kind for kind in row if kind not in ("arguments", "temporaries")]
    traffic = {kind: {"payload": row[kind], "wire": row[kind] * WIRE.get(kind, 1.0)} for kind in kinds}
    return {
        "arguments": row["arguments"], "temporaries": row["temporaries"], "traffic": traffic,
        "wire": sum(t["wire"] for t in traffic.values()),
        "source": "recorded: MaxText 0.2.5, jax 0.12.0, libtpu 0.0.52",
    }  # fmt: skip


def measured(python: str, target: str) -> dict:
    """MaxText's row, compiled now; its optimised program is dumped by XLA and read as ours is."""
    devices = targets.parse(target).devices
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | compilers.environment(targets.parse(target), False) | {
            "DECOUPLE_GCLOUD": "TRUE", "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
        }  # fmt: skip
        find = "import maxtext, pathlib; print(next(pathlib.Path(maxtext.__path__[0]).rglob('base.yml')))"
        base = subprocess.run([python, "-c", find], env=environment, capture_output=True, text=True, check=True)
        command = [
            python, "-m", "maxtext.trainers.pre_train.train_compile", base.stdout.strip().splitlines()[-1],
            f"compile_topology={TOPOLOGIES[target]}", "compile_topology_num_slices=1", "model_name=llama3.1-8b",
            "per_device_batch_size=1", "max_target_length=8192", "remat_policy=full", "scan_layers=True",
            "dtype=bfloat16", "weight_dtype=float32", "opt_type=adamw", "ici_fsdp_parallelism=-1",
            "enable_checkpointing=False", f"base_output_directory={folder}", "run_name=compile",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        texts = sorted(Path(folder).glob("*train_step*after_optimizations.txt"), key=lambda f: f.stat().st_size)
        if done.returncode or not texts:
            raise SystemExit(f"MaxText did not compile:\n{(done.stdout + done.stderr)[-2000:]}")
        text = texts[-1].read_text()
        spent = costs(read(text), {"fsdp": devices})
    traffic = {}
    for (kind, _), (payload, wire) in spent.traffic().items():
        kept = traffic.setdefault(kind, {"payload": 0.0, "wire": 0.0})
        kept["payload"], kept["wire"] = kept["payload"] + payload / 1e9, kept["wire"] + wire / 1e9
    sizes = re.search(r"argument_size_in_bytes=(\d+).*?temp_size_in_bytes=(\d+)", done.stdout + done.stderr, re.S)
    row = {"traffic": traffic, "wire": sum(t["wire"] for t in traffic.values()), "source": "measured"}
    return row | {"arguments": int(sizes[1]) / GiB, "temporaries": int(sizes[2]) / GiB} if sizes else row


def markdown(rows: dict) -> str:
    """Side by side."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    lines = [
        "# Llama-3.1-8B beside MaxText's ahead-of-time compile", "",
        "Written by `python -m benchmarks.plan_maxtext`. One row of 8192 tokens per device, pure FSDP, full",
        "recomputation. GiB per device; GB (1e9) on the wire per device and step, in a ring model. The step is the",
        "roofline of `bigmodel plan`: data-sheet rates, every link of the torus dimensions a collective spans.", "",
        "| target | what | arguments | temporaries | " + " | ".join(kinds) + " | all | of MaxText | step >= |",
        "|---|---|---|---|" + "---|" * (len(kinds) + 3),
    ]  # fmt: skip
    for target in TOPOLOGIES:
        base = rows.get(f"{target} maxtext")
        for what in ("maxtext", "compiler", "rings"):
            row = rows.get(f"{target} {what}")
            if row is None:
                continue
            name = "MaxText" if what == "maxtext" else f"ours, weights_by={what}"
            wires = [f"{row['traffic'][k]['wire']:.2f}" if k in row["traffic"] else "" for k in kinds]
            step = f"{row['step_s']:.2f} s" if row.get("step_s") else ""
            sums = f"{row['wire']:.1f}", f"{row['wire'] / base['wire']:.2f}"
            cells = [target, name, f"{row['arguments']:.3f}", f"{row['temporaries']:.2f}", *wires, *sums, step]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=list(TOPOLOGIES))
    parser.add_argument("--maxtext-python", default="")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for target in args.targets:
        if args.maxtext_python:
            rows[f"{target} maxtext"] = measured(args.maxtext_python, target)
        rows.setdefault(f"{target} maxtext", recorded(target))
        RESULT.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        for by in ("rings", "compiler"):
            if f"{target} {by}" in rows and not args.again:
                continue
            rows[f"{target} {by}"] = ours(target, by)
            RESULT.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
            print(f"{target} {by}: {rows[f'{target} {by}']['wire']:.1f} GB on the wire", flush=True)
    (ROOT / "results" / "plan_maxtext.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
