"""Time of a training step on CPU beside PyTorch peers, their steps alternating in one run.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install -r benchmarks/peers/requirements.txt
    python -m benchmarks.train_step --peers-python /tmp/peers/bin/python [ROW ...]

Ours is the product: a config, `experiment.build`, and the compiled step of `programs.Programs`, with
guard, metrics and AdamW. Every contestant has its own process; steps alternate ours, peer, ours, peer
(`OMP_WAIT_POLICY=PASSIVE`, so that who waits does not spin), and a ratio is the median over pairs of
neighbours: a machine that gets slower slows both. Memory is the largest resident set of the whole
process, compilation included. Rows are written to results/train_step.json one by one, so a run can
be cut and single rows repeated; `--reason` keeps the measured reason of a miss beside its row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "train_step.json"
GOAL_NAMES = {"wall": "wall_ms", "memory": "peak_mb"}


def adamw() -> dict[str, Any]:
    return {"name": "adamw", "lr": 3e-4, "weight_decay": 0.1, "b2": 0.95}


def gpt(layers: int, dim: int, heads: int, vocab: int, length: int, **more: Any) -> dict[str, Any]:
    """Raw config of GPT-2 with these sizes, batch 8; chunked loss where the vocabulary is large."""
    sizes = {"num_layers": layers, "embed_dim": dim, "num_heads": heads, "vocab_size": vocab}
    return {
        "batch_size": 8,
        "model": {"name": "decoder", "max_length": length, **sizes, **more},
        "objective": {"name": "causal_lm", "chunk": 64 if vocab > 10_000 else 0},
        "optimizer": adamw(),
        "schedule": {"name": "constant"},
        "data": {"name": "text", "length": length},
        "eval": {"batch_size": 8},
    }


def bert(layers: int, dim: int, heads: int, vocab: int, length: int) -> dict[str, Any]:
    """Raw config of BERT (post-norm, exact GELU, MLM head) without dropout."""
    config = gpt(layers, dim, heads, vocab, length)
    config["model"] |= {"name": "encoder", "dropout": 0.0, "attention_dropout": 0.0, "embed_dropout": 0.0}
    config["objective"] = {"name": "masked_lm"}
    config["data"]["name"] = "masked_text"
    return config


def resnet(depth: int, side: int, batch: int, classes: int) -> dict[str, Any]:
    """Raw config of ResNet v1.5 under Nesterov momentum with L2, as the peer has it."""
    stem = "cifar" if side <= 32 else "imagenet"
    return {
        "batch_size": batch,
        "model": {"name": "resnet", "depth": depth, "stem": stem, "num_classes": classes, "in_channels": 3},
        "objective": {"name": "classification"},
        "optimizer": {"name": "nesterov", "lr": 0.01, "decay": "l2", "weight_decay": 1e-4},
        "schedule": {"name": "constant"},
        "data": {"name": "tfds_images", "size": side},
        "eval": {"batch_size": batch},
    }


@dataclass(frozen=True)
class Peer:
    """A module, arguments of its step_fn, and the goals for our ratios to it."""

    module: str
    options: dict[str, Any]
    goals: dict[str, float]


@dataclass(frozen=True)
class Row:
    """Ours is step_fn(**options) of `module`."""

    options: dict[str, Any]
    peers: dict[str, Peer]
    steps: int = 15
    module: str = "benchmarks.train_step"


def sizes(layers: int, dim: int, heads: int, vocab: int, length: int, **more: Any) -> dict[str, Any]:
    return {
        "layers": layers, "dim": dim, "heads": heads, "vocab": vocab, "length": length, "batch": 8, **more
    }  # fmt: skip


def torch_gpt(*shape: int, goals: dict[str, float], **more: Any) -> Peer:
    return Peer("benchmarks.peers.torch_gpt", sizes(*shape, **more), goals)


def hf(kind: str, *shape: int, goals: dict[str, float], **more: Any) -> Peer:
    return Peer("benchmarks.peers.hf", sizes(*shape, kind=kind, **more), goals)


def images(depth: int, side: int, batch: int, classes: int, goal: float) -> Row:
    stem = "cifar" if side <= 32 else "imagenet"
    options = {"depth": depth, "side": side, "batch": batch, "num_classes": classes, "stem": stem}
    peer = Peer("benchmarks.peers.torch_resnet", options, {"wall": goal})
    return Row({"config": resnet(depth, side, batch, classes)}, {"torch_resnet": peer})


SIX, FOUR, LARGE = (6, 384, 6, 256, 256), (4, 256, 4, 256, 128), (6, 384, 6, 50304, 256)
BERT = (6, 384, 6, 30522, 256)
MATMUL = {"rows": 2048, "dim": 384}
BIG_VOCAB_GOALS = {"wall": 0.72, "memory": 0.75}
ROWS = {
    "gpt6_v256": Row(
        {"config": gpt(*SIX)},
        {"torch_gpt": torch_gpt(*SIX, goals={"wall": 0.95}), "hf": hf("gpt2", *SIX, goals={"wall": 0.85})},
    ),
    "gpt4_v256": Row(
        {"config": gpt(*FOUR)},
        {"torch_gpt": torch_gpt(*FOUR, goals={"wall": 0.90}), "hf": hf("gpt2", *FOUR, goals={"wall": 0.85})},
        steps=40,
    ),
    "gpt6_v50304": Row(
        {"config": gpt(*LARGE)},
        {"torch_gpt": torch_gpt(*LARGE, goals=BIG_VOCAB_GOALS), "hf": hf("gpt2", *LARGE, goals=BIG_VOCAB_GOALS)},
        steps=8,
    ),
    "gpt6_bf16": Row(
        {"config": gpt(*SIX, dtype="bfloat16")},
        {"torch_gpt": torch_gpt(*SIX, dtype="bfloat16", goals={"wall": 1.10})},
    ),
    "bert6": Row({"config": bert(*BERT)}, {"hf": hf("bert", *BERT, masked=39, goals={"wall": 0.65})}, steps=10),
    "bert6_v256": Row({"config": bert(*SIX)}, {"hf": hf("bert", *SIX, masked=39, goals={"wall": 1.0})}),
    "resnet50_64": images(50, 64, 8, 1000, 0.80),
    "resnet18_32": images(18, 32, 16, 10, 0.95),
    "matmul": Row(
        {"library": "jax", **MATMUL}, {"torch": Peer("benchmarks.ceiling", {"library": "torch", **MATMUL}, {})},
        module="benchmarks.ceiling",
    ),
}  # fmt: skip


def random_rows(config: dict[str, Any], spec: dict[str, Any], rows: int) -> dict[str, Any]:
    """Random rows with the fields of a training batch."""
    import numpy as np

    rng = np.random.default_rng(0)
    vocab = config["model"].get("vocab_size") or config["model"]["num_classes"]
    out = {}
    for name, (shape, dtype) in spec.items():
        if name == "masked_positions":
            order = rng.random((rows, config["data"]["length"])).argsort(1)
            out[name] = np.sort(order[:, : shape[0]], 1).astype(dtype)
        elif name == "image":
            out[name] = rng.standard_normal((rows, *shape)).astype(dtype)
        elif name in ("weights", "masked_weights", "segments", "bytes"):
            out[name] = np.ones((rows, *shape), dtype)
        else:
            out[name] = rng.integers(0, vocab, (rows, *shape)).astype(dtype)
    return out


def step_fn(config: dict[str, Any]) -> Callable[[], float]:
    """A closure that runs one training step of the compiled program and returns the loss."""
    import jax

    from bigmodel_jax import experiment
    from bigmodel_jax.parallel.feed import global_batch
    from bigmodel_jax.programs import Programs

    exp = experiment.build(experiment.resolve(config), load=False)
    programs, size = Programs(exp), exp.run.batch_size
    compiled, key = programs.step(size), jax.random.key(1)
    state = programs.init(jax.random.key(0))
    data = random_rows(exp.config, exp.spec, size)
    batch = global_batch(
        lambda rows: {name: leaf[rows] for name, leaf in data.items()}, programs.batch_sharding, exp.cut(size)
    )

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


class Contestant:
    """A worker process, asked for one step at a time."""

    def __init__(self, python: str, module: str, options: dict[str, Any]):
        env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", "benchmarks.worker", module, json.dumps(options)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contestant died with exit status {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        self.process.stdin.write("step\n")
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(row: Row, ours_python: str, peers_python: str, steps: int) -> dict[str, Any]:
    """Alternate the contestants' steps; medians, and median ratios of neighbours, ours over peer's."""
    entries = {"ours": (ours_python, row.module, row.options)}
    for name, peer in row.peers.items():
        entries[name] = (peers_python, peer.module, peer.options)
    running: dict[str, Contestant] = {}
    try:
        for name, entry in entries.items():
            running[name] = Contestant(*entry)
            version = running[name].answer()["python"]
            if name == "ours":
                python = version
        for _ in range(2):
            for contestant in running.values():
                contestant.step()
        load = os.getloadavg()[0]
        costs = {name: [] for name in running}
        for _ in range(steps):
            for name, contestant in running.items():
                costs[name].append(contestant.step())
    finally:
        for contestant in running.values():
            contestant.close()
    out = {"steps": steps, "load_before": round(load, 2), "cpus": os.cpu_count(), "python": python}
    for name, seen in costs.items():
        values = {k: statistics.median(s[k] for s in seen) for k in ("wall_ms", "cpu_s", "peak_mb")}
        out[name] = {k: round(v, 3 if k == "cpu_s" else 1) for k, v in values.items()}
        if name != "ours":
            out[name] |= compared(costs["ours"], seen, row.peers[name].goals)
    return out


def compared(ours: list[dict], peer: list[dict], goals: dict[str, float]) -> dict[str, Any]:
    """Median ratios of paired steps, and for each goal whether it is met."""
    ratios = {
        name: round(statistics.median(a[key] / b[key] for a, b in zip(ours, peer, strict=True)), 3)
        for name, key in (("wall", "wall_ms"), ("cpu", "cpu_s"), ("memory", "peak_mb"))
    }
    met = {name: ratios[name] <= goal for name, goal in goals.items()}
    return {"ratios": ratios, "goals": goals, "met": met}


def show(name: str, result: dict[str, Any]) -> None:
    for peer in ROWS[name].peers:
        ours, theirs = result["ours"], result[peer]
        ratios = theirs["ratios"]
        for what, goal in (theirs["goals"] or {"wall": None}).items():
            key = GOAL_NAMES[what]
            verdict = f"{goal:6.2f} {'met' if theirs['met'][what] else 'missed':7}" if goal else " " * 14
            print(
                f"{name:12} {peer:12} {what:7} {ours[key]:8.1f} {theirs[key]:8.1f} {ratios[what]:6.3f} "
                f"{verdict} {ratios['cpu']:6.3f} "
                f"{ratios['memory']:6.3f}",
                flush=True,
            )
    if "reason" in result:
        print(f"{'':12} {result['reason']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {list(ROWS)}; default all")
    parser.add_argument("--python", default=sys.executable, help="interpreter of ours")
    parser.add_argument("--peers-python", default="", help="with torch; without it, print what is known")
    parser.add_argument("--steps", type=int, default=0, help="pairs of steps; default: the row's own number")
    parser.add_argument("--reason", default="", help="text kept beside the rows: why a goal is missed")
    parser.add_argument("--dry", action="store_true", help="do not write the result")
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"no rows {sorted(unknown)}, only {list(ROWS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    print(
        f"{'row':12} {'peer':12} {'goal of':7} {'ours':>8} {'peer':>8} {'ratio':>6} {'goal':>6} "
        f"{'':7} {'CPU':>6} {'memory':>6}"
    )
    for name in args.rows or ROWS:
        if args.peers_python:
            row = ROWS[name]
            results[name] = measure(row, args.python, args.peers_python, args.steps or row.steps)
        if args.reason and name in results:
            results[name]["reason"] = args.reason
        if not args.dry:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        if name in results:
            show(name, results[name])


if __name__ == "__main__":
    main()
