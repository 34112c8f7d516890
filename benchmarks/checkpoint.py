"""Saving and restoring 524 MB of float32: ours (checked) beside plain Orbax, alternating, medians.

    python -m benchmarks.checkpoint [--megabytes 524] [--repeats 5] [--out results/checkpoint.json]

Goals: blocking at most 0.1 s plus one fingerprint pass, a verified restore in at most 0.9 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bigmodel_jax.checkpoint import Checkpointer

ARRAYS = 24


def state_of(megabytes: float) -> dict[str, jax.Array]:
    rows = round(megabytes * 1e6 / 4 / ARRAYS / 1024)
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    return {f"w{i:02d}": jax.random.normal(key, (rows, 1024), jnp.float32) for i, key in enumerate(keys)}


def timed(fn) -> tuple[float, object]:
    began = time.perf_counter()
    out = fn()
    return time.perf_counter() - began, out


def ours(directory: Path, state: dict[str, jax.Array], step: int) -> dict[str, float]:
    with Checkpointer(directory / "ours", keep_last=1) as saver:
        call, _ = timed(lambda: saver.save(step, state))
        blocked, fingerprint = saver.blocked_s, saver.fingerprint_s
        rest, _ = timed(saver.wait)
        restore, found = timed(lambda: jax.block_until_ready(saver.restore(state)[0]))
        assert bool((found["w00"] == state["w00"]).all())
    return {"blocking_s": blocked, "fingerprint_s": fingerprint, "save_s": call + rest, "restore_s": restore}


def plain(directory: Path, state: dict[str, jax.Array], step: int, compressed: bool) -> dict[str, float]:
    place = directory / "plain" / str(step)
    handler = ocp.PyTreeCheckpointHandler(use_compression=compressed)
    with ocp.AsyncCheckpointer(handler) as saver:
        call, _ = timed(lambda: saver.save(place, args=ocp.args.PyTreeSave(state)))
        rest, _ = timed(saver.wait_until_finished)
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), state)
        wanted = ocp.args.PyTreeRestore(item=state, restore_args=arguments)
        restore, _ = timed(lambda: jax.block_until_ready(saver.restore(place, args=wanted)))
    shutil.rmtree(place)
    return {"blocking_s": call, "save_s": call + rest, "restore_s": restore}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=524)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="results/checkpoint.json")
    parser.add_argument("--directory", help="where to write, default a temporary directory")
    options = parser.parse_args()
    state = jax.block_until_ready(state_of(options.megabytes))
    forms = {
        "ours": ours,
        "orbax": lambda *a: plain(*a, compressed=True),
        "orbax_uncompressed": lambda *a: plain(*a, compressed=False),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        for repeat in range(options.repeats + 1):  # the first one warms up
            for name, form in forms.items():
                row = form(Path(temporary), state, repeat)
                if repeat:
                    rows[name].append(row)
    table = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in rows.items()}
    print(f"{'median of ' + str(options.repeats):22}" + "".join(f"{k:>16}" for k in table["ours"]))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{row[k]:16.3f}" if k in row else f"{'-':>16}" for k in table["ours"]))
    pairs = zip(rows["ours"], rows["orbax_uncompressed"], rows["orbax"], strict=True)
    ratios = [
        (a["restore_s"] / b["restore_s"], a["save_s"] / b["save_s"], a["save_s"] / c["save_s"]) for a, b, c in pairs
    ]
    names = ("restore / uncompressed orbax", "save / uncompressed orbax", "save / orbax")
    paired = {name: statistics.median(values) for name, values in zip(names, zip(*ratios, strict=True), strict=True)}
    print("paired ratios: " + "  ".join(f"{name} {value:.2f}" for name, value in paired.items()))
    goals = {
        "blocking_s <= 0.1": table["ours"]["blocking_s"] <= 0.1,
        "restore_s <= 0.9": table["ours"]["restore_s"] <= 0.9,
    }
    print("  ".join(f"{goal}: {'met' if met else 'MISSED'}" for goal, met in goals.items()))
    result = {
        "megabytes": options.megabytes, "repeats": options.repeats,
        "median": table, "paired_ratios": paired, "all": rows, "goals": goals,
        "device": jax.devices()[0].device_kind, "cpus": os.cpu_count(), "load": os.getloadavg()[0],
        "jax": jax.__version__, "orbax": ocp.__version__, "python": platform.python_version(),
    }  # fmt: skip
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
