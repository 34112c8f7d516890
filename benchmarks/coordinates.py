"""Coordinate check: do activations keep their size, and move as far in a few steps, whatever the width?

    python benchmarks/coordinates.py            # results/coordinates.json, results/coordinates.png

A decoder of two layers on random tokens, widths 32 to 512 in heads of 16, a few steps on one batch, with the standard
parametrisation (every matrix starts with deviation 1 / sqrt(fan in), one learning rate) and under mup of base 32. What
is printed is the steepest exponents in the width. Logits under mup shrink at first, towards a limit: their part that is
random at the start falls as 1 / sqrt(width), the learned one stays. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.learn import objectives, optim
from bigmodel_jax.models import decoder
from bigmodel_jax.models.coordinates import activations, sizes, slopes
from bigmodel_jax.mup import Ratio

BASE, HEAD, VOCAB, ROWS, LENGTH = 32, 16, 64, 4, 24
RATES = {"adamw": 4e-3, "muon": 4e-3, "sgd": 0.2}
RESULTS = Path(__file__).resolve().parent.parent / "results"


def model_of(width: int, mup: bool, layers: int = 2, **options):
    return decoder(
        vocab_size=VOCAB, num_layers=layers, embed_dim=width, num_heads=width // HEAD, positions="rotary",
        norm="rmsnorm", norm_bias=False, bias=False, init="fan_in", depth_scaled_init=False,
        mup_width=BASE if mup else 0, **options,
    )  # fmt: skip


class Probe:
    """One model: its activations before and after a few updates on one batch, by any optimizer."""

    def __init__(self, model, compiler=None):
        self.model, self.compiler = model, compiler
        self.tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        self.objective = objectives.causal_lm()
        self.init = self.jit(lambda key: model.init(key)["params"])
        self.grads = self.jit(jax.grad(self.loss))
        self.watch = self.jit(lambda p: activations(model, {"params": p, "stats": {}}, tokens=self.tokens[:, :-1]))

    def jit(self, fn):
        return jax.jit(fn, compiler_options=self.compiler)

    def loss(self, params):
        weights = np.ones((ROWS, LENGTH), np.float32)
        batch = {"tokens": self.tokens[:, :-1], "targets": self.tokens[:, 1:], "weights": weights}
        terms, _, _ = self.objective(self.model.apply, {"params": params, "stats": {}}, batch, None, True)
        return terms["loss"] / weights.sum()

    def sizes(self, optimizer: str, ratio: Ratio, steps: int = 3, seeds: int = 3) -> dict[str, float]:
        """Geometric means over seeds. ratio: what the optimizer is told of the width."""
        shapes, axes = self.model.abstract()
        rate = lambda step: jnp.float32(RATES[optimizer])  # noqa: E731
        tx = optim.make(shapes["params"], name=optimizer, lr=rate, axes=axes["params"], ratio=ratio)
        update, found = self.jit(lambda g, s, p: tx.update(g, s, p)), []
        for seed in range(seeds):
            params = start = self.init(jax.random.key(seed))
            state = tx.init(params)
            for _ in range(steps):
                change, state = update(self.grads(params), state, params)
                params = optim.apply(params, change)
            found.append(sizes(self.watch(params), self.watch(start)))
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
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axis.grid(alpha=0.3)
    for axis in grid[1]:
        axis.set_xlabel("width")
    for row in grid:
        row[0].set_ylabel("moved in 3 steps (RMS)")
    grid[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="32,64,128,256,512")
    parser.add_argument("--out", default=str(RESULTS / "coordinates.json"))
    args = parser.parse_args()
    results = {}
    for kind in ("standard", "mup"):
        probes = {width: Probe(model_of(width, kind == "mup")) for width in map(int, args.widths.split(","))}
        for optimizer in RATES:
            found = {width: probe.sizes(optimizer, probe.model.ratio) for width, probe in probes.items()}
            results[f"{kind}/{optimizer}"] = {"sizes": found, "slopes": slopes(found)}
            steepest = sorted(slopes(found).items(), key=lambda pair: -abs(pair[1]))[:3]
            print(f"{optimizer:8} {kind:9}", ", ".join(f"{name} {slope:+.2f}" for name, slope in steepest), flush=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    plot(json.loads(json.dumps(results)), Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
