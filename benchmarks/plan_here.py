"""Predicted and measured time of a training step on this machine.

    python benchmarks/plan_here.py [NAME ...]

Each shipped config (the large ones in a small shape) is compiled for one device; its step is predicted from the
compiled program and rates measured here (planner/here.py), then run. Nothing is fitted to a config. Rates and steps are
measured in turns, `ROUNDS` times, in processor seconds (which other programs on the machine disturb little) and in wall
seconds; the median ratio counts. Writes results/plan_here.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from bigmodel_jax import experiment
from bigmodel_jax.parallel.feed import abstract_batch
from bigmodel_jax.planner.costs import costs
from bigmodel_jax.planner.here import CLOCKS, measure
from bigmodel_jax.planner.hlo import read
from bigmodel_jax.planner.roofline import predict
from bigmodel_jax.programs import Programs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "plan_here.json"
ROUNDS, STEPS = 3, 3
ONE = ["mesh.data=1", "mesh.fsdp=1"]
SMALL = ["model.dtype=float32", "microbatch=0"]
NAMES = {
    "lm_tiny.py": ["model.vocab_size=2048"],
    "mlm_tiny.py": ["model.vocab_size=2048"],
    "resnet_tiny.py": ["model.num_classes=10", "model.in_channels=1"],
    "gpt2.py:124m": [
        *SMALL, "batch_size=8", "model.num_layers=4", "model.embed_dim=256", "model.num_heads=4",
        "model.max_length=256", "data.length=256", "model.vocab_size=8192",
    ],
    "llama.py:1b": [
        *SMALL, "batch_size=4", "model.num_layers=3", "model.embed_dim=384", "model.num_heads=6",
        "model.num_kv_heads=2", "model.mlp_dim=1344", "model.max_length=256", "data.length=256",
        "model.vocab_size=4096", "objective.chunk=128",
    ],
    "bert.py:base": [
        *SMALL, "batch_size=8", "model.num_layers=4", "model.embed_dim=256", "model.num_heads=4",
        "model.max_length=128", "data.length=128", "model.vocab_size=8192",
    ],
    "resnet_imagenet.py:18": [*SMALL, "batch_size=8", "model.bn_group=8", "data.size=64"],
}  # fmt: skip


class Job:
    """One config, compiled, with a state and a batch of noise."""

    def __init__(self, name: str, overrides: list[str]):
        raw = experiment.read(str(ROOT / "configs" / name))
        config = experiment.resolve(raw, [f"--config.{o}" for o in [*overrides, *ONE]])
        exp = experiment.build(config, load=False)
        programs = Programs(exp)
        self.name = name
        self.step = programs.step(exp.run.batch_size)
        self.state, self.key = programs.init(jax.random.key(0)), jax.random.key(1)
        rng = np.random.default_rng(0)
        spec = abstract_batch(exp.spec, programs.batch_sharding, exp.cut(exp.run.batch_size))
        self.batch = {field: jax.device_put(_noise(rng, field, leaf), leaf.sharding) for field, leaf in spec.items()}
        self.costs = costs(read(self.step.as_text()), exp.mesh.shape)
        self.temporary = self.step.memory_analysis().temp_size_in_bytes
        self.ratios: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
        self.seconds: dict[str, list[float]] = {clock: [] for clock in CLOCKS}

    def run(self) -> dict[str, float]:
        """Fastest of some steps by each clock."""
        best = dict.fromkeys(CLOCKS, float("inf"))
        for _ in range(STEPS):
            began = {clock: now() for clock, now in CLOCKS.items()}
            self.state, _ = self.step(self.state, self.batch, self.key)
            jax.block_until_ready(self.state)
            best = {clock: min(best[clock], now() - began[clock]) for clock, now in CLOCKS.items()}
        return best


def _noise(rng, field: str, leaf) -> np.ndarray:
    if field == "positions":
        return np.broadcast_to(np.arange(leaf.shape[-1]), leaf.shape).astype(leaf.dtype)
    if np.issubdtype(leaf.dtype, np.integer):
        return np.ones(leaf.shape, leaf.dtype) if field == "segments" else rng.integers(0, 10, leaf.shape, leaf.dtype)
    return np.ones(leaf.shape, leaf.dtype) if "weights" in field else rng.normal(size=leaf.shape).astype(leaf.dtype)


def main() -> None:
    jobs = [Job(name, NAMES[name]) for name in sys.argv[1:] or NAMES]
    for job in jobs:
        job.run()
    chips: dict = {}
    parts: dict = {}
    for turn in range(ROUNDS):
        for clock in CLOCKS:
            chips[clock] = measure(clock)
        for job in jobs:
            took = job.run()
            for clock, seconds in took.items():
                said = predict(job.costs, chips[clock], temporary_bytes=job.temporary)
                job.seconds[clock].append(seconds)
                job.ratios[clock].append(said.step_s / seconds)
                parts[job.name, clock] = said
            print(f"round {turn + 1}  {job.name:24} cpu {took['cpu'] * 1e3:8.1f} ms  ratio {job.ratios['cpu'][-1]:.2f}"
                  f"   wall {took['wall'] * 1e3:8.1f} ms  ratio {job.ratios['wall'][-1]:.2f}", flush=True)  # fmt: skip
    record(jobs, chips, parts)


def record(jobs: list[Job], chips: dict, parts: dict) -> None:
    rows = {}
    for job in jobs:
        rows[job.name] = {"overrides": NAMES[job.name], "notes": list(parts[job.name, "cpu"].notes)}
        for clock in CLOCKS:
            measured, ratio = min(job.seconds[clock]), statistics.median(job.ratios[clock])
            said = parts[job.name, clock]
            rows[job.name][clock] = {
                "measured_ms": round(measured * 1e3, 2), "predicted_ms": round(measured * ratio * 1e3, 2),
                "error": round(ratio - 1, 3), "bound": said.bound,
                "parts_ms": {k: round(getattr(said, f"{k}_s") * 1e3, 2) for k in ("compute", "element", "memory")},
            }  # fmt: skip
        cpu = rows[job.name]["cpu"]
        print(f"{job.name:24} cpu measured {cpu['measured_ms']:8.1f} ms  predicted {cpu['predicted_ms']:8.1f} ms  "
              f"error {cpu['error']:+.0%}")  # fmt: skip
    machine = {
        "jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"),
        "rates": {clock: {"sustained": dict(c.sustained), "memory": c.memory_rate, "cache": c.cache_rate,
                          "elements": dict(c.element_rates), "launch_s": c.launch_s, "fresh_s": c.fresh_s,
                          "sources": dict(c.sources)} for clock, c in chips.items()},
    }  # fmt: skip
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"configs": {}}
    kept = {"machine": machine, "configs": kept["configs"] | rows}
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
