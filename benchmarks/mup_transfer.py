"""Does the best learning rate stay where it is as the width grows? Under mup, and in the standard parametrisation.

    python benchmarks/mup_transfer.py                 # what is missing, smallest first; kill and restart as you like
    python benchmarks/mup_transfer.py --widths 64,128 --limit-minutes 10
    python benchmarks/mup_transfer.py --kinds mup     # beside a process of --kinds standard, once width 64 is there
    python benchmarks/mup_transfer.py --report        # results/mup_transfer.json and .png from what is there

Decoders of two layers, widths 64 to 512 in heads of 32, on 1M bytes of Python's standard library (488 steps of
16 x 128), AdamW, warm-up over a tenth and then linearly to zero, 3 seeds. The rates are a grid of sqrt(2); at every
width it is walked from the best rate of the width before until the best mean loss has two rates on either side. The
optimum is that of a parabola in log rate through those five; "by_seed" are the parabolas of single seeds. The base of
mup is 64, where both parametrisations are one and share their runs.

Every finished cell is a line of results/mup_transfer.jsonl. Goal: best rates within 1.5x under mup; where those of the
standard parametrisation lie within 3x, the comparison is undecided.

Cost, from ten steps of each on quiet cores: a cell of width 64 takes about 28 CPU seconds, one of width 512 some 420,
and on a busy machine up to twice that; with six rates a width 6 CPU hours in all, two thirds of them at width 512.
Seeds of widths up to 128 are lanes of one program, the wide ones run alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.learn import objectives, optim, schedules
from bigmodel_jax.models import decoder

BASE, HEAD, LENGTH, ROWS, STEPS, SEEDS, EVAL_ROWS = 64, 32, 128, 16, 488, (0, 1, 2), 256
START = 2.0**-7.5
REACH = 2
"""Rates on either side of the best that a parabola is laid through."""
RESULTS = Path(__file__).resolve().parent.parent / "results"


@functools.cache
def data(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """({field: [STEPS, ROWS, LENGTH]}, held-out rows, vocabulary)."""
    text = DATASETS["text"](corpus="stdlib", tokenizer="bytes", length=LENGTH, validation_fraction=0.02)
    loaded = text.load(seed=seed, batch_size=ROWS, eval_batch_size=EVAL_ROWS)
    steps = [loaded.train.batch(step) for step in range(STEPS)]
    fields = ("tokens", "targets", "weights")
    held = loaded.evals["validation"].batch(0)
    train = {name: np.stack([batch[name] for batch in steps]) for name in fields}
    return train, {name: held[name] for name in fields}, loaded.vocab_size


def model_of(width: int, kind: str, vocab: int):
    return decoder(
        vocab_size=vocab, num_layers=2, embed_dim=width, num_heads=width // HEAD, positions="rotary", norm="rmsnorm",
        norm_bias=False, bias=False, init="fan_in", depth_scaled_init=False, mup_width=BASE if kind == "mup" else 0,
    )  # fmt: skip


@functools.cache
def program(width: int, kind: str, lanes: int):
    """(keys [lanes], peak, batches [lanes, STEPS, ROWS, LENGTH], held out) -> held-out nats per byte [lanes]."""
    model = model_of(width, kind, data(0)[2])
    shapes, axes = model.abstract()
    objective = objectives.causal_lm()

    def loss(params, batch):
        terms, _, _ = objective(model.apply, {"params": params, "stats": {}}, batch, None, True)
        return terms["loss"] / objective.weights(batch)["loss"]

    def run(key, peak, batches, held):
        shape = schedules.make("linear", 1.0, STEPS // 10, STEPS)
        tx = optim.make(
            shapes["params"], name="adamw", lr=lambda step: peak * shape(step), axes=axes["params"], ratio=model.ratio,
            b2=0.95, clip=1.0,
        )  # fmt: skip

        def one(carry, batch):
            params, state = carry
            change, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optim.apply(params, change), state), None

        params = model.init(key)["params"]
        (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), batches)
        return loss(params, held)

    return jax.jit(jax.vmap(run, (0, None, 0, None)))


def measured(width: int, kind: str, k: int, seeds: tuple[int, ...]) -> list[dict]:
    """Cells of one rate, START * sqrt(2)^k, its seeds as lanes of one program."""
    compiled = program(width, kind, len(seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    batches = {name: np.stack([data(seed)[0][name] for seed in seeds]) for name in data(0)[0]}
    began, cpu = time.monotonic(), time.process_time()
    losses = np.asarray(compiled(keys, jnp.float32(rate(k)), batches, data(0)[1]))
    spent = {"wall_s": (time.monotonic() - began) / len(seeds), "cpu_s": (time.process_time() - cpu) / len(seeds)}
    return [
        {"width": width, "kind": kind, "k": k, "lr": rate(k), "seed": seed, "loss": float(loss) if loss < 1e3 else None,
         **{name: round(value, 2) for name, value in spent.items()}}
        for seed, loss in zip(seeds, losses, strict=True)
    ]  # fmt: skip


def rate(k: int) -> float:
    return START * 2 ** (k / 2)


class Cells:
    """What has been run, by (width, kind, k): {seed: loss}; a run that diverged has loss inf."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def at(self, width: int, kind: str) -> dict[int, dict[int, float]]:
        kind = "standard" if width == BASE else kind  # at the base they are one
        out: dict[int, dict[int, float]] = {}
        for row in self.rows:
            if (row["width"], row["kind"]) == (width, kind):
                out.setdefault(row["k"], {})[row["seed"]] = np.inf if row["loss"] is None else row["loss"]
        return out

    def next(self, width: int, kind: str, start: int) -> tuple[int, tuple[int, ...]] | None:
        """(rate to run next, its missing seeds); None when the best has its neighbours."""
        found = self.at(width, kind)
        for k in sorted(found, key=lambda k: abs(k - start)):
            if len(found[k]) < len(SEEDS):
                return k, tuple(seed for seed in SEEDS if seed not in found[k])
        if not found:
            return start, SEEDS
        best = self.best(width, kind)
        for step in range(1, REACH + 1):
            for k in (best - step, best + step):
                if k not in found:
                    return k, SEEDS
        return None

    def best(self, width: int, kind: str) -> int:
        found = self.at(width, kind)
        return min((k for k in found if len(found[k]) == len(SEEDS)), key=lambda k: np.mean(list(found[k].values())))

    def optimum(self, width: int, kind: str) -> dict | None:
        """Best rate, by a parabola through the mean losses around the best, and by one for each seed."""
        if not self.at(width, kind) or self.next(width, kind, 0) is not None:
            return None
        found, best = self.at(width, kind), self.best(width, kind)
        near = [k for k in range(best - REACH, best + REACH + 1) if all(np.isfinite(list(found[k].values())))]

        def bottom(losses: list[float]) -> float:
            a, b, _ = np.polyfit(near, losses, 2)
            return float(np.clip(-b / (2 * a), near[0], near[-1])) if a > 0 else float(near[int(np.argmin(losses))])

        each = [rate(bottom([found[k][seed] for k in near])) for seed in SEEDS]
        mean = [float(np.mean(list(found[k].values()))) for k in near]
        return {"lr": rate(bottom(mean)), "by_seed": each, "loss": min(mean), "rates": [rate(k) for k in near]}


def run(cells: Cells, widths: list[int], kinds: list[str], stop: float) -> bool:
    """Run what is missing, narrow widths first; False when the time is up before the end."""
    for width in widths:
        for kind in kinds:
            before = [w for w in widths if w < width and cells.at(w, kind)]
            start = cells.best(before[-1], kind) if before else 0
            while (todo := cells.next(width, kind, start)) is not None:
                if time.monotonic() > stop:
                    return False
                k, seeds = todo
                own = "standard" if width == BASE else kind
                # Wide runs gain nothing from sharing a program, and lose more when killed.
                for group in [seeds] if width <= 128 else [(seed,) for seed in seeds]:
                    rows = measured(width, own, k, group)
                    cells.add(rows)
                    losses = ", ".join(str(row["loss"]) for row in rows)
                    print(f"{own} {width} lr {rate(k):.2e}: {losses}; {rows[0]['cpu_s']:.0f} CPU s each", flush=True)
    return True


def verdict(optima: dict[str, dict[int, dict]], widths: list[int]) -> dict:
    """Spread of the best rates over widths, and what follows."""
    spread = {}
    for kind, found in optima.items():
        if set(found) == set(widths):
            best = [found[w]["lr"] for w in widths]
            spread[kind] = max(best) / min(best)
    if len(spread) < 2:
        return {"spread": spread, "verdict": "unfinished"}
    if spread["standard"] < 3:
        said = "undecided: the standard parametrisation's best rate hardly moved"
    else:
        said = "transfers" if spread["mup"] <= 1.5 else "does not transfer"
    return {"spread": spread, "verdict": said}


def report(cells: Cells, widths: list[int], out: Path) -> None:
    optima = {kind: {w: cells.optimum(w, kind) for w in widths} for kind in ("standard", "mup")}
    optima = {kind: {w: best for w, best in found.items() if best} for kind, found in optima.items()}
    said = verdict(optima, widths)
    out.write_text(json.dumps({**said, "optima": optima}, indent=1) + "\n")
    for kind, found in optima.items():
        for width, best in found.items():
            print(f"{kind:9} {width:4}: best lr {best['lr']:.3e}, loss {best['loss']:.4f}")
    print(said)
    _plot(cells, widths, out.with_suffix(".png"))


def _plot(cells: Cells, widths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, kind in zip(axes, ("standard", "mup"), strict=True):
        for width in widths:
            found = {k: v for k, v in sorted(cells.at(width, kind).items()) if np.isfinite(list(v.values())).all()}
            losses = [list(by_seed.values()) for by_seed in found.values()]
            rates, means = [rate(k) for k in found], [np.mean(each) for each in losses]
            axis.errorbar(rates, means, [np.std(each) for each in losses], fmt="o-", label=str(width))
        axis.set(xscale="log", title=kind, xlabel="peak learning rate")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out nats per byte")
    axes[0].legend(title="width")
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--kinds", default="standard,mup")
    parser.add_argument("--limit-minutes", type=float, default=0.0, help="start no further cell after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", default=str(RESULTS / "mup_transfer.jsonl"))
    args = parser.parse_args()
    widths = [int(w) for w in args.widths.split(",")]
    stop = time.monotonic() + 60 * args.limit_minutes if args.limit_minutes else np.inf
    if args.report or run(Cells(Path(args.out)), widths, args.kinds.split(","), stop):
        # Read again: another process may have added the other kind.
        report(Cells(Path(args.out)), widths, Path(args.out).with_suffix(".json"))
    else:
        print("out of time; the same command goes on")


if __name__ == "__main__":
    main()
