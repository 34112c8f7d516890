"""Tokens per second on CPU beside transformers: the same weights, prompts and greedy tokens, float32.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r benchmarks/peers/requirements.txt
    python -m benchmarks.generate --peers-python /tmp/peers/bin/python [ROW ...]

The peer writes random weights, ours reads them through the tables of hf/. Both have a process of their own and
take turns (ours, peer, ours, peer); a turn is one new token (prefill), then `--new` of them, and the difference is
decoding. Ratios are medians over neighbouring turns, peer's time over ours: above 1 we are faster. CPU
seconds of all threads stand beside the wall clock, which another program on the machine falsifies. Compilation
is outside, in two turns before the first that counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.train_step import ROOT, Contestant

RESULTS = ROOT / "results" / "generate.json"
GOALS = {"decode": 1.5, "prefill": 1.0}
ROWS = {f"{kind}_{batch}": (kind, batch) for kind in ("gpt2", "llama") for batch in (1, 8)}


def step_fn(folder: str, batch: int, prompt: int, new: int) -> Callable[[], float]:
    """Ours: see benchmarks/peers/hf_generate.py, whose prompts these are."""
    import jax
    import numpy as np

    from bigmodel_jax import tree
    from bigmodel_jax.generate import Generator, Sampling
    from bigmodel_jax.hf import published

    opened = published.open_folder(folder, {"param_dtype": "float32", "dtype": "float32"})
    model = published.build(published.complete(opened.section))
    variables = {"params": tree.unflatten(dict(opened.parameters())), "stats": {}}
    generator, sampling = Generator(model, variables), Sampling(temperature=0.0)
    tokens = [[(7919 * (row * prompt + place) + 13) % 10_007 for place in range(prompt)] for row in range(batch)]
    sizes = itertools.cycle((1, new))

    def step() -> float:
        size = next(sizes)
        rows = generator(tokens, length=size, key=jax.random.key(0), sampling=sampling, piece=new)
        found = np.array([row.tokens for row in rows], np.float64)
        return float((found * np.arange(1, size + 1)).sum())

    return step


def turn(contestant: Contestant) -> dict[str, float]:
    """Costs of one turn: prefill and decoding, wall and CPU."""
    one, many = contestant.step(), contestant.step()
    return {
        "prefill_ms": one["wall_ms"], "prefill_cpu_ms": 1e3 * one["cpu_s"], "tokens": many["loss"],
        "decode_ms": many["wall_ms"] - one["wall_ms"], "decode_cpu_ms": 1e3 * (many["cpu_s"] - one["cpu_s"]),
        "peak_mb": many["peak_mb"],
    }  # fmt: skip


def measure(kind: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Alternate turns; medians, and median ratios of neighbours."""
    with tempfile.TemporaryDirectory() as folder:
        write = [args.peers_python, "-m", "benchmarks.peers.hf_generate", kind, folder]
        subprocess.run(write, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        options = {"folder": folder, "batch": batch, "prompt": args.prompt, "new": args.new}
        running = {
            "ours": Contestant(args.python, "benchmarks.generate", options),
            "hf": Contestant(args.peers_python, "benchmarks.peers.hf_generate", options),
        }
        try:
            version = {name: each.answer()["python"] for name, each in running.items()}["ours"]
            for _ in range(2):
                first = {name: turn(each) for name, each in running.items()}
            load = os.getloadavg()[0]
            seen: dict[str, list[dict[str, float]]] = {name: [] for name in running}
            for _ in range(args.turns):
                for name, each in running.items():
                    seen[name].append(turn(each))
        finally:
            for each in running.values():
                each.close()
    out: dict[str, Any] = {
        "batch": batch, "prompt": args.prompt, "new": args.new, "turns": args.turns, "load_before": round(load, 2),
        "cpus": os.cpu_count(), "python": version, "same_tokens": first["ours"]["tokens"] == first["hf"]["tokens"],
    }  # fmt: skip
    for name, turns in seen.items():
        middle = {key: statistics.median(t[key] for t in turns) for key in turns[0] if key != "tokens"}
        out[name] = {key: round(value, 1) for key, value in middle.items()}
        out[name]["decode_tokens_per_s"] = round(1e3 * batch * (args.new - 1) / middle["decode_ms"], 1)
    out["ratios"] = {
        key: round(statistics.median(b[key] / a[key] for a, b in zip(seen["ours"], seen["hf"], strict=True)), 3)
        for key in ("decode_ms", "decode_cpu_ms", "prefill_ms", "prefill_cpu_ms")
    }
    out["met"] = {what: out["ratios"][f"{what}_ms"] >= goal for what, goal in GOALS.items()}
    return out


def show(name: str, row: dict[str, Any]) -> None:
    for what, goal in GOALS.items():
        ours, theirs = (row[who][f"{what}_ms"] for who in ("ours", "hf"))
        wall, cpu = row["ratios"][f"{what}_ms"], row["ratios"][f"{what}_cpu_ms"]
        met = "met" if row["met"][what] else "missed"
        print(f"{name:9} {what:8} {ours:9.1f} {theirs:9.1f} {wall:6.2f} {goal:5.1f} {met:7} {cpu:6.2f}", flush=True)
    if not row["same_tokens"]:
        print(f"{'':9} the tokens differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {list(ROWS)}; default all")
    parser.add_argument("--python", default=sys.executable, help="interpreter of ours")
    parser.add_argument("--peers-python", default="", help="with torch; without it, print what is known")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=65, help="tokens of a long turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="do not write the result")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no rows {sorted(unknown)}, only {list(ROWS)}")
    results = json.loads(RESULTS.read_text()) if Path(RESULTS).exists() else {}
    print(f"{'row':9} {'what':8} {'ours ms':>9} {'peer ms':>9} {'ratio':>6} {'goal':>5} {'':7} {'CPU':>6}")
    for name in args.rows or ROWS:
        if args.peers_python:
            results[name] = measure(*ROWS[name], args)
            if not args.dry:
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        if name in results:
            show(name, results[name])


if __name__ == "__main__":
    main()
