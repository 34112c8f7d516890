"""Bytes each device sends in a step, from 8 to 4,096 devices: compiled where that is quick, closed form everywhere.

    python -m benchmarks.scaling_bytes [--compile N,N,...]

Strong scaling keeps the batch of 4096 rows of 1,024 tokens, weak scaling 8 rows a device; the model is Llama 3.2 1B
(configs/llama.py:1b) in float32, fully sharded (fsdp), in replicas of 256 shards (data x fsdp), or over 8 devices by
features (fsdp x tensor). Compiled points are steps on simulated devices, of two and of three layers: what the third
adds is taken for all others. Weights are gathered and gradients scattered explicitly (mesh.weights_by=rings), but not
with tensor, where the CPU compiler moreover has 8 sums of activations a layer instead of 6 (queries, keys and values
each their own). Writes results/scaling_bytes.json and .png; points that are there are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from bigmodel_jax import experiment
from bigmodel_jax.planner import memory, search, targets
from bigmodel_jax.planner.compile import compile_for
from bigmodel_jax.planner.costs import costs
from bigmodel_jax.planner.hlo import read

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "scaling_bytes.json"
DEVICES = tuple(8 * 2**n for n in range(10))
LENGTH, ROWS, EACH, LAYERS = 1024, 4096, 8, 16
SHARDS = 256
MODES = ("strong", "weak")
LAYOUTS = ("fsdp", "data x fsdp", "fsdp x tensor")


def words(devices: int, mode: str, layout: str, layers: int = LAYERS) -> list[str]:
    """The experiment of one point, as overrides of llama.py:1b."""
    mesh = {"data": 1, "fsdp": devices, "tensor": 1}
    if layout == "data x fsdp":
        mesh = {"data": max(devices // SHARDS, 1), "fsdp": min(devices, SHARDS), "tensor": 1}
    elif layout == "fsdp x tensor":
        mesh = {"data": 1, "fsdp": devices // 8, "tensor": 8}
    rows = ROWS if mode == "strong" else EACH * devices
    out = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    return [
        *out, f"--config.batch_size={rows}", "--config.microbatch=0", f"--config.data.length={LENGTH}",
        f"--config.model.num_layers={layers}", "--config.objective.chunk=256", "--config.model.dtype=float32",
        f"--config.mesh.weights_by={'compiler' if 'tensor' in layout else 'rings'}",
    ]  # fmt: skip


def resolved(devices: int, mode: str, layout: str, layers: int = LAYERS) -> dict:
    raw = experiment.read(str(ROOT / "configs" / "llama.py:1b"))
    return experiment.resolve(raw, words(devices, mode, layout, layers))


def by_form(devices: int, mode: str, layout: str) -> float:
    """GB (1e9) on the wire per device and step, closed form."""
    config = resolved(devices, mode, layout)
    spent = search.closed_form(config, memory.traced(config, "cpu"), memory.sizes(config, devices))
    return sum(c.wire_bytes for c in spent.collectives) / 1e9


def by_compiler(devices: int, mode: str, layout: str) -> dict[str, float]:
    """The same from compiled programs of two and three layers."""
    sums = []
    for layers in (2, 3):  # a loop of one turn is unrolled, and gathers less
        compiled = compile_for(resolved(devices, mode, layout, layers), targets.parse(f"cpu:{devices}"), limit_s=3600)
        spent = costs(read(compiled.text), compiled.mesh)
        sums.append(sum(c.wire_bytes for c in spent.collectives) / 1e9)
    two, three = sums
    return {"wire_gb": two + (LAYERS - 2) * (three - two), "cpu_s": compiled.cpu_s, "peak_rss": compiled.peak_rss}


def draw(points: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for ax, mode in zip(axes, MODES, strict=True):
        for layout, colour, line in zip(LAYOUTS, ("#54a24b", "#4c78a8", "#e45756"), ("-", "--", "-"), strict=True):
            form = [points["closed form"][f"{mode} {layout} {n}"] for n in DEVICES]
            width = 4 if layout == "fsdp" else 1.5  # the same as its replicas up to 256 devices
            ax.plot(DEVICES, form, line, color=colour, linewidth=width, label=f"{layout}, closed form")
            dots = {n: points["compiled"].get(f"{mode} {layout} {n}") for n in DEVICES}
            found = [(n, dot["wire_gb"]) for n, dot in dots.items() if dot]
            if found:
                ax.plot(
                    *zip(*found, strict=True), "o", color=colour, markersize=9 if layout == "fsdp" else 5,
                    label=f"{layout}, compiled",
                )  # fmt: skip
        what = f"{ROWS} rows" if mode == "strong" else f"{EACH} rows a device"
        ax.set(xscale="log", yscale="log", xlabel="devices", title=f"{mode} scaling: {what} of {LENGTH} tokens")
        ax.set_xticks(DEVICES, [str(n) for n in DEVICES], rotation=45)
        ax.grid(alpha=0.3)
        ax.minorticks_off()
    axes[0].set_ylabel("GB sent per device and step")
    axes[1].legend(fontsize=8)
    figure.suptitle("Llama 1B: communicated bytes per device (ring model)", x=0.01, ha="left", weight="bold")
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", default="8,16,32,64", help="numbers of devices to compile for")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    points = json.loads(RESULT.read_text()) if RESULT.exists() else {"closed form": {}, "compiled": {}}
    for mode in MODES:
        for layout in LAYOUTS:
            for n in DEVICES:
                points["closed form"][f"{mode} {layout} {n}"] = by_form(n, mode, layout)
    for n in filter(None, args.compile.split(",")):
        for layout in LAYOUTS:
            for mode in MODES:
                name = f"{mode} {layout} {n}"
                if name not in points["compiled"]:
                    points["compiled"][name] = by_compiler(int(n), mode, layout)
                    RESULT.write_text(json.dumps(points, indent=1, sort_keys=True) + "\n")
                found, form = points["compiled"][name]["wire_gb"], points["closed form"][name]
                print(f"{name}: compiled {found:.2f} GB, closed form {form:.2f} GB ({found / form:.2f})", flush=True)
    RESULT.write_text(json.dumps(points, indent=1, sort_keys=True) + "\n")
    draw(points)


if __name__ == "__main__":
    main()
