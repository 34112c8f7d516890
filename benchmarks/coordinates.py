"""Coordinate check: do activations keep their size, and move as far in a few steps, whatever the width?

    python benchmarks/coordinates.py            # results/coordinates.json, results/coordinates.png

A decoder of two layers on random tokens, widths 32 to 512 in heads of 16, a few steps on one batch, with the standard
parametrisation (every matrix starts with deviation 1 / sqrt(fan in), one learning rate) and under mup of base 32. What is
printed is the exponent of each size in the width. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.learn import objectives, optim
from bigmodel_jax.models import decoder
from bigmodel_jax.models.coordinates import activations, sizes, slopes

BASE, HEAD, VOCAB, ROWS, LENGTH, SEEDS = 32, 16, 64, 4, 24, 3
RATES = {"adamw": 4e-3, "muon": 4e-3, "sgd": 0.2}
RESULTS = Path(__file__).resolve().parent.parent / "results"


def model_of(width: int, mup: bool, layers: int = 2, **options):
    return decoder(
        vocab_size=VOCAB, num_layers=layers, embed_dim=width, num_heads=width // HEAD, positions="rotary", norm="rmsnorm",
        norm_bias=False, bias=False, init="fan_in", depth_scaled_init=False, mup_width=BASE if mup else 0, **options,
    )  # fmt: skip


def program(model, optimizer: str, steps: int):
    """(key) -> (activations at the start, after `steps` updates on one batch)."""
    shapes, axes = model.abstract()
    tx = optim.make(
        shapes["params"], name=optimizer, lr=lambda step: jnp.float32(RATES[optimizer]), axes=axes["params"],
        ratio=model.ratio,
    )  # fmt: skip
    objective = objectives.causal_lm()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = np.ones((ROWS, LENGTH), np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def loss(params):
        terms, _, _ = objective(model.apply, {"params": params, "stats": {}}, batch, None, True)
        return terms["loss"] / weights.sum()

    def run(key):
        params = model.init(key)["params"]
        watch = functools.partial(activations, model, tokens=tokens[:, :-1])

        def one(_, carry):
            change, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return optim.apply(carry[0], change), state

        after, _ = jax.lax.fori_loop(0, steps, one, (params, tx.init(params)))
        return watch({"params": params, "stats": {}}), watch({"params": after, "stats": {}})

    return run


def measured(width: int, mup: bool, optimizer: str, steps: int = 3, seeds: int = SEEDS, compiler=None, **options):
    """Sizes at one width, their geometric mean over seeds."""
    run = jax.jit(program(model_of(width, mup, **options), optimizer, steps), compiler_options=compiler)
    found = [sizes(after, before) for before, after in (run(jax.random.key(seed)) for seed in range(seeds))]
    return {name: float(np.exp(np.mean([np.log(one[name]) for one in found]))) for name in found[0]}


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = ("moved/0/attn", "moved/0/mlp", "moved/1/attn", "moved/1/mlp", "moved/1/stream", "moved/logits")
    fig, grid = plt.subplots(2, len(RATES), figsize=(4 * len(RATES), 6), sharex=True, sharey="col")
    for column, optimizer in enumerate(RATES):
        for row, kind in enumerate(("standard", "mup")):
            by_width, axis = results[f"{kind}/{optimizer}"]["sizes"], grid[row][column]
            for name in shown:
                axis.plot([int(w) for w in by_width], [s[name] for s in by_width.values()], "o-", label=name[6:])
            axis.set(xscale="log", yscale="log", title=f"{optimizer}, {kind}")
            axis.set_xticks([int(w) for w in by_width], by_width)
            axis.grid(alpha=0.3)
    for axis in grid[1]:
        axis.set_xlabel("width")
    for row in grid:
        row[0].set_ylabel("moved in 3 steps (RMS)")
    grid[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="32,64,128,256,512")
    parser.add_argument("--out", default=str(RESULTS / "coordinates.json"))
    args = parser.parse_args()
    results = {}
    for optimizer in RATES:
        for kind in ("standard", "mup"):
            found = {int(w): measured(int(w), kind == "mup", optimizer) for w in args.widths.split(",")}
            results[f"{kind}/{optimizer}"] = {"sizes": found, "slopes": slopes(found)}
            steepest = sorted(slopes(found).items(), key=lambda pair: -abs(pair[1]))[:3]
            print(f"{optimizer:8} {kind:9}", ", ".join(f"{name} {slope:+.2f}" for name, slope in steepest), flush=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    plot(json.loads(json.dumps(results)), Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
