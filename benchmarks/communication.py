"""Bytes that a step of every full-scale config sends, per kind and mesh axes, held against its recorded budget.

    python benchmarks/communication.py [NAME ...]            # compare; exit 1 where one departs
    python benchmarks/communication.py --record [NAME ...]   # and write what is found as the new budget

Two layers of each stack (a scan makes every layer the same), widths and vocabularies as shipped, compiled for eight
simulated CPU devices from shapes alone. Payload bytes per device and step; bfloat16 travels as float32 there, because
XLA's CPU compiler widens it. results/communication.json holds the budget. Resumable: a config that was compared under
the same jax version and config hash is not compiled again unless it is named.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

from bigmodel_jax import experiment, tree  # noqa: E402
from bigmodel_jax.planner import budget  # noqa: E402
from bigmodel_jax.planner.costs import costs  # noqa: E402
from bigmodel_jax.planner.hlo import read  # noqa: E402
from bigmodel_jax.programs import Programs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "communication.json"
TEXT = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.num_layers=2", "batch_size=16", "eval.batch_size=16"]
IMAGES = ["mesh.data=2", "mesh.fsdp=4", "mesh.tensor=1", "batch_size=256", "eval.batch_size=256"]
NAMES = {
    **{f"gpt2.py:{size}": TEXT for size in ("124m", "350m", "1.5b")},
    **{f"llama.py:{size}": TEXT for size in ("1b", "8b", "70b")},
    **{f"bert.py:{size}": TEXT for size in ("base", "large")},
    **{f"resnet_imagenet.py:{depth}": IMAGES for depth in (18, 34, 50, 101, 152)},
    **{f"resnet_cifar10.py:{kind}{depth}": IMAGES for kind in ("", "plain") for depth in (20, 56, 110)},
}  # fmt: skip
# Faster to compile, same collectives: they are placed before the passes that this leaves out.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def measure(config: dict) -> dict:
    began = time.process_time()
    exp = experiment.build(config, load=False)
    programs = Programs(exp)
    compiled = programs.lower_step(exp.run.batch_size).compile(compiler_options=QUICK)
    found = costs(read(compiled.as_text()), exp.mesh.shape)
    return {
        "jax": jax.__version__,
        "config_hash": experiment.config_hash(config),
        "mesh": {axis: size for axis, size in exp.mesh.shape.items() if size > 1},
        "parameter_bytes": tree.nbytes(programs.state["params"]),
        "payload_bytes": {key: round(value) for key, value in sorted(budget.table(found).items())},
        "wire_bytes": round(sum(c.wire_bytes for c in found.collectives)),
        "notes": list(found.notes),
        "cpu_s": round(time.process_time() - began, 1),
    }


def main() -> int:
    names = [name for name in sys.argv[1:] if name != "--record"]
    record, red = "--record" in sys.argv, []
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in names or NAMES:
        overrides = [f"--config.{leaf}" for leaf in (*NAMES[name], "microbatch=0")]
        config = experiment.resolve(experiment.read(str(ROOT / "configs" / name)), overrides)
        key = {"jax": jax.__version__, "config_hash": experiment.config_hash(config)}
        row = kept.get(name)
        if not row or names or {k: row[k] for k in key} != key:
            found = measure(config)
            lines = budget.departures(found["payload_bytes"], row["payload_bytes"]) if row else ["no budget yet"]
            red += [f"{name}: {line}" for line in lines] if not record else []
            if record:
                kept[name] = row = found
                RESULT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
            row = found
        parts = ", ".join(f"{key} {value / 1e6:.1f} MB" for key, value in row["payload_bytes"].items() if value > 1e5)
        print(f"{name:28} {parts}", flush=True)
    print("\n".join(red) if red else "all within their budget")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
