"""Tokens per second of the input pipeline beside a minimal memmap loader, in one run.

    python benchmarks/data.py [--batch 12 --length 1024 --steps 200 --rounds 15]

The peer is the loader that small trainers use: per batch, open the file as a memmap, draw random
offsets, slice row by row, widen to int64, stack, and put inputs and targets on the device. Ours put every
field of the batch on the device, packed rows with segments and positions too. `device_put` costs about
30 us per array in Python; a jitted identity does the same for all arrays of a batch in one call, so
both loaders are shown with both ("put", "jit"). All take turns in every round; medians over rounds, the
ratio is the median of the rounds' ratios to the peer with device_put. Writes results/data.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np

from bigmodel_jax.data.pipeline import Pipeline, prefetch
from bigmodel_jax.data.sources import TokenShards

RESULTS = Path(__file__).resolve().parent.parent / "results" / "data.json"


def write_shards(folder: str, tokens: int) -> None:
    """One shard of random documents, lengths log-normal around 400 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1.2, tokens // 700).astype(np.int64), 2, 100_000)
    ends = np.cumsum(lengths) + 1
    stream = rng.integers(3, 50_000, int(ends[-1])).astype("<u2")
    stream[0] = 0
    stream[ends - 1] = 0
    stream.tofile(f"{folder}/train-00000.bin")
    ends.astype("<u8").tofile(f"{folder}/train-00000.idx")
    shard = {
        "file": "train-00000.bin", "tokens": len(stream), "documents": len(ends), "bytes": 4 * len(stream),
        "sha256": hashlib.sha256(stream).hexdigest(),
    }  # fmt: skip
    meta = {
        "version": 1, "dtype": "uint16", "vocab_size": 50_257, "tokenizer": "bytes", "eos": 0, "pad": 1,
        "splits": {"train": {"shards": [shard]}}, "fingerprint": shard["sha256"],
    }  # fmt: skip
    Path(folder, "meta.json").write_text(json.dumps(meta))


def memmap_loader(path: str, batch: int, length: int) -> Callable[[int], Any]:
    """The peer, up to the device."""
    rng = np.random.default_rng(0)

    def load(step: int) -> Any:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = rng.integers(0, len(data) - length, batch)
        x = np.stack([data[i : i + length].astype(np.int64) for i in starts])
        y = np.stack([data[i + 1 : i + 1 + length].astype(np.int64) for i in starts])
        return x, y

    return load


def contestants(folder: str, batch: int, length: int, steps: int) -> dict[str, Callable[[int], Any]]:
    """Name -> function of a start step that runs `steps` batches."""
    stream = Pipeline(TokenShards(folder, "train", length, "stream"), batch, seed=1)
    pack = Pipeline(TokenShards(folder, "train", length, "pack"), batch, seed=1)
    peer = memmap_loader(f"{folder}/train-00000.bin", batch, length)

    jitted = jax.jit(lambda arrays: arrays)

    def each(load: Callable[[int], Any], place: Callable[[Any], Any] = lambda arrays: arrays) -> Callable[[int], None]:
        def run(start: int) -> None:
            for step in range(start, start + steps):
                jax.block_until_ready(place(load(step)))

        return run

    def ahead(start: int) -> None:
        with prefetch(lambda step: jitted(pack.batch(step)), start, stop=start + steps) as batches:
            for value in batches:
                jax.block_until_ready(value)

    def tensorflow(start: int) -> None:
        data = pack.tfdata(start, stop_step=start + steps, prefetch=4)
        for value in data.as_numpy_iterator():
            jax.block_until_ready(jitted(value))

    return {
        "memmap loader, put": each(peer, jax.device_put),
        "memmap loader, jit": each(peer, jitted),
        "stream, put": each(stream.batch, jax.device_put),
        "stream, jit": each(stream.batch, jitted),
        "packed, put": each(pack.batch, jax.device_put),
        "packed, jit": each(pack.batch, jitted),
        "packed, jit, prefetch thread": ahead,
        "packed, jit, tf.data": tensorflow,
        "memmap loader, host only": each(peer),
        "stream, host only": each(stream.batch),
        "packed, host only": each(pack.batch),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=30_000_000)
    args = parser.parse_args()
    tokens = args.batch * args.length * args.steps
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, args.tokens)
        runs = contestants(folder, args.batch, args.length, args.steps)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for run in runs.values():
            run(0)
        for turn in range(args.rounds):
            for name, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run(turn * args.steps)
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    peer = np.array(seconds["memmap loader, put"])
    rows = {}
    print(f"{'batch of ' + str((args.batch, args.length)):32s} {'Mtok/s':>8s} {'ratio':>7s} {'CPU ratio':>10s}")
    for name, values in seconds.items():
        wall, cpu = np.array(values).T
        row = {
            "mtok_per_s": round(tokens / float(np.median(wall)) / 1e6, 1),
            "ratio": round(float(np.median(peer[:, 0] / wall)), 2),
            "cpu_ratio": round(float(np.median(peer[:, 1] / cpu)), 2),
        }
        rows[name] = row
        print(f"{name:32s} {row['mtok_per_s']:8.1f} {row['ratio']:7.2f} {row['cpu_ratio']:10.2f}")
    RESULTS.parent.mkdir(exist_ok=True)
    setting = {**vars(args), "cpus": os.cpu_count(), "jax": jax.__version__, "numpy": np.__version__}
    RESULTS.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
