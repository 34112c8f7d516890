"""Compile every full-scale config for eight simulated devices, from shapes alone.

    python benchmarks/lowered.py [NAME ...]

Writes results/lowered.json: parameters, state and temporary bytes per device as the CPU compiler
sees them, and CPU seconds. Argument bytes and shardings are exact; temporaries are those of the
CPU backend, an indication and not a plan for an accelerator. Resumable: a config with a result
under the same jax version and config hash is not compiled again.
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
from bigmodel_jax.programs import Programs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "lowered.json"
NAMES = [
    "gpt2.py:124m", "gpt2.py:350m", "gpt2.py:1.5b", "llama.py:1b", "llama.py:8b", "llama.py:70b",
    "bert.py:base", "bert.py:large",
    *(f"resnet_imagenet.py:{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"resnet_cifar10.py:{kind}{depth}" for kind in ("", "plain") for depth in (20, 56, 110)),
]  # fmt: skip


def measure(name: str, config: dict) -> dict:
    """Lower and compile one config on FSDP 8 with eight rows per device."""
    exp = experiment.build(config, load=False)
    programs = Programs(exp)
    began = time.process_time()
    lowered = programs.lower_step(exp.run.batch_size)
    lower_s = time.process_time() - began
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "jax": jax.__version__,
        "config_hash": experiment.config_hash(config),
        "parameters": tree.count(programs.state["params"]),
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temporary_bytes_per_device": memory.temp_size_in_bytes,
        "lower_cpu_s": round(lower_s, 2),
        "compile_cpu_s": round(time.process_time() - began - lower_s, 2),
    }


def main() -> None:
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    small = ["--config.batch_size=64", "--config.microbatch=0", "--config.eval.batch_size=64"]
    layout = ["--config.mesh.data=1", "--config.mesh.fsdp=8"]
    for name in sys.argv[1:] or NAMES:
        config = experiment.resolve(experiment.read(str(ROOT / "configs" / name)), [*small, *layout])
        key = {"jax": jax.__version__, "config_hash": experiment.config_hash(config)}
        if {k: results.get(name, {}).get(k) for k in key} != key:
            results[name] = measure(name, config)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        row = results[name]
        print(
            f"{name:28} {row['parameters'] / 1e6:10.1f} M  "
            f"state+batch {row['argument_bytes_per_device'] / 2**30:7.2f} GiB/device  "
            f"temporaries {row['temporary_bytes_per_device'] / 2**30:7.2f} GiB  "
            f"compile {row['compile_cpu_s']:6.1f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
