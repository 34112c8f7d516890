"""A certificate for every layout, and for pairs of them on eight devices, of five kinds of models.

    python benchmarks/certify_all.py [decoder|encoder|encoder_decoder|moe|resnet ...] [--alone] [--again] [--minutes N]

Each case runs the same few steps of a small model on one device and in the layout (bigmodel_jax/certify.py) in float64
and float32. Layouts that a model cannot take must be refused by `experiment.build`, with the reason and what would be
legal: `refusal` says which. A control per model, rows of one shard exchanged, must be seen.

Resumable: results/certificates.json keeps each case, and a case with a result under the same jax, config and layout is
not run again. results/certificates.md is the table. --minutes stops after so many CPU minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np

from bigmodel_jax import agreement, certify, experiment, tree
from bigmodel_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RESULT, TABLE = ROOT / "results" / "certificates.json", ROOT / "results" / "certificates.md"
STEPS, DEVICES = 2, 8
CONTROL = "data=4,fsdp=2"  # the mesh of the negative control

SMALL = {"num_layers": 4, "embed_dim": 16, "num_heads": 8, "mlp_dim": 32, "vocab_size": 32, "max_length": 16}
TEXT = {"name": "text", "length": 16, "mode": "pack"}
MODELS = {
    "decoder": (
        {"name": "decoder", **SMALL, "num_kv_heads": 4, "positions": "rotary", "activation": "swiglu"},
        {"name": "causal_lm", "chunk": 8, "z_loss": 1e-3}, TEXT,
    ),
    "encoder": (
        {"name": "encoder", **SMALL},
        {"name": "masked_lm"}, {"name": "masked_text", "length": 16},
    ),
    "encoder_decoder": (
        {"name": "encoder_decoder", **SMALL, "dropout": 0.0},
        {"name": "seq2seq"}, {"name": "pairs", "length": 16, "source_length": 16},
    ),
    "moe": (
        {"name": "decoder", **SMALL, "activation": "swiglu", "bias": False, "positions": "rotary", "num_experts": 4,
         "shared_experts": 1, "expert_bias_rate": 0.01},
        {"name": "causal_lm", "balance_loss": 0.3, "router_z_loss": 0.1}, TEXT,
    ),
    "resnet": (
        {"name": "resnet", "depth": 18, "blocks": (1, 1), "channels": 8, "stem": "cifar", "bn_group": 4,
         "num_classes": 8, "in_channels": 1, "zero_init": False},
        {"name": "classification", "label_smoothing": 0.1}, {"name": "digits", "mixup": 0.2},
    ),
}  # fmt: skip

# What a layout adds to a mesh: {leaf: value}; a size of 0 takes what the others leave of the eight devices.
LAYOUTS = {
    "data": {"data": 0},
    "fsdp": {"fsdp": 0},
    "tensor": {"tensor": 0},
    "ring": {"context": 0},
    "ulysses": {"context": 0, "context_by": "ulysses"},
    "expert": {"expert": 0},
    "GPipe": {"stage": 0},
    "circular": {"stage": 0, "repeats": 2},
    "slices": {"data": 0, "slices": 2},
    "ZeRO-1": {"fsdp": 0, "zero": 1},
    "offload": {"fsdp": 0, "offload": "optimizer"},
    "rings": {"fsdp": 0, "weights_by": "rings"},
}
# Pairs that are one layout or contradict each other, and need no refusal: a mesh cannot say both.
ONE_AXIS = {
    ("data", "slices"): "slices are of the data axis",
    ("fsdp", "ZeRO-1"): "ZeRO-1 is a form of fsdp",
    ("fsdp", "offload"): "the layout offload has fsdp already",
    ("ring", "ulysses"): "one way across the context axis",
    ("GPipe", "circular"): "one schedule",
    ("fsdp", "rings"): "rings are a form of fsdp",
}  # fmt: skip
# Three at once, where XLA's partitioner was found wrong before, or several rooms of the house meet.
TRIPLES = [
    ("data", "fsdp", "tensor"), ("fsdp", "tensor", "ring"), ("tensor", "GPipe", "ZeRO-1"), ("fsdp", "tensor", "expert"),
]  # fmt: skip
# Sizes that keep four layers, eight heads and four experts whole.
MOST = {"circular": 2, "GPipe": 4, "expert": 4, "ring": 4}


def mesh_of(names: tuple[str, ...]) -> str:
    """The mesh of some layouts: "data=2,context=4,context_by=ulysses". Each axis has two devices and the last the
    rest, as far as it can take them; what is left then goes to an axis of the batch."""
    most: dict[str, int] = {}
    for name in names:
        axis = next(leaf for leaf, value in LAYOUTS[name].items() if value == 0)
        most[axis] = min(most.get(axis, DEVICES), MOST.get(name, DEVICES))
    leaves: dict[str, object] = {}
    left, order = DEVICES, sorted(most, key=lambda axis: (most[axis], axis))
    for axis in order:
        leaves[axis] = min(left if axis == order[-1] else 2, most[axis])
        left //= leaves[axis]
    for name in names:
        leaves |= {leaf: value for leaf, value in LAYOUTS[name].items() if value != 0}
    if left > 1:
        rest = "fsdp" if "data" in leaves else "data"
        leaves[rest] = leaves.get(rest, 1) * left
    return ",".join(f"{leaf}={value}" for leaf, value in leaves.items())


def cases() -> list[tuple[str, ...]]:
    """Every layout alone, every pair that a mesh can say, and some of three."""
    pairs = [pair for pair in itertools.combinations(LAYOUTS, 2) if pair not in ONE_AXIS]
    return [(name,) for name in LAYOUTS] + pairs + TRIPLES


def refusal(model: str, names: tuple[str, ...]) -> str:
    """Words of the refusal that this model must give this layout, "" where it must run."""
    if "rings" in names and not {"rings", "data", "slices", "offload"}.issuperset(names):
        return "mesh.weights_by rings gathers weights over fsdp beside data alone"
    none = f"this {model} has none; use mesh.fsdp instead"
    if "expert" in names and model != "moe":
        return none
    if model == "resnet" and {"GPipe", "circular", "ring", "ulysses"} & set(names):
        return none
    return ""


def config_of(model: str) -> dict:
    """Resolved, without a mesh."""
    options, objective, data = MODELS[model]
    optimizer = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip": 1.0}
    return experiment.resolve({
        "steps": 10, "batch_size": 16, "model": options, "objective": objective, "data": data, "optimizer": optimizer,
        "schedule": {"name": "constant"},
    })  # fmt: skip


class Model:
    """One kind of model in both precisions: what one device computes, found once."""

    def __init__(self, name: str):
        self.name, self.config = name, config_of(name)
        self.references: dict[str, tuple] = {}

    def reference(self, precision: str) -> tuple:
        """(initial state, the run on one device)."""
        if precision not in self.references:
            exp = certify.built(certify.in_precision(self.config, precision), certify.parse_mesh("one"))
            start = certify.initial(exp)
            self.references[precision] = start, certify.Side(exp).run(start, certify.made_up, STEPS)
        return self.references[precision]

    def judge(self, mesh: str, precision: str, batches=certify.made_up) -> agreement.Verdict:
        """A layout against one device."""
        with jax.enable_x64(True):
            _, exact = self.reference("float64")
        with jax.enable_x64(precision == "float64"):
            start, expected = self.reference(precision)
            config = certify.in_precision(self.config, precision)
            found = certify.Side(certify.built(config, certify.parse_mesh(mesh))).run(start, batches, STEPS)
        before, zeros = {"parameters": tree.flatten(start["params"])}, agreement.zero_gradients(exact)
        narrow = None if precision == "float64" else exact
        return agreement.compare(expected, found, precision, zeros, exact=narrow, start=before)

    def refused(self, mesh: str) -> str:
        """What `experiment.build` says against this layout, "" for nothing."""
        try:
            certify.built(self.config, certify.parse_mesh(mesh))
        except InputError as error:
            return str(error)
        return ""


def exchanged(exp: experiment.Experiment, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The control: the inputs of two rows of one shard change places, their targets do not."""
    batch = dict(certify.made_up(exp, step, rows))
    for name in {"tokens", "image", "source"} & batch.keys():
        batch[name] = batch[name][[1, 0, *range(2, len(rows))]]
    return batch


def measure(model: Model, names: tuple[str, ...], mesh: str, precision: str) -> dict:
    """One row of the result."""
    began = time.process_time()
    wanted, said = refusal(model.name, names), model.refused(mesh)
    row: dict = {"mesh": mesh, "jax": jax.__version__, "config_hash": experiment.config_hash(model.config)}
    if wanted or said:
        good = bool(wanted) and wanted in said
        return row | {"good": good, "refused": said, **({} if good else {"expected": wanted or "no refusal"})}
    try:
        verdict = model.judge(mesh, precision)
    except Exception as error:  # a layout that does not compile is a finding, and the others go on
        return row | {"good": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    worst = verdict.rows[0]
    return row | {
        "good": verdict.agreed, "worst": f"{worst.part} {worst.leaf}", "relative_error": worst.error,
        "allowed": worst.allowed, "leaves": len(verdict.rows), "moved": round(verdict.moved, 6),
        "cpu_s": round(time.process_time() - began, 1),
    } | ({} if verdict.agreed else {"reason": verdict.reason()})  # fmt: skip


def control(model: Model) -> dict:
    """One row: rows of one shard exchanged must be seen."""
    verdict = model.judge(CONTROL, "float64", exchanged)
    return {
        "mesh": CONTROL, "jax": jax.__version__, "config_hash": experiment.config_hash(model.config),
        "good": not verdict.agreed and verdict.rows[0].error > 1e-3, "relative_error": verdict.rows[0].error,
    }  # fmt: skip


def table(results: dict) -> str:
    """results as Markdown: a line per layout, a column per model."""
    models = list(MODELS)
    lines = [
        "# Layout certificates", "",
        f"Written by `python benchmarks/certify_all.py`: {STEPS} steps of small models on eight simulated CPU devices "
        "against one device, loss, gradients, parameters and running statistics leaf by leaf. A cell is the error of "
        f"the worst leaf in float64 (allowed {agreement.TOLERANCES['float64']:.0e}) and in float32 (allowed "
        f"{agreement.TOLERANCES['float32']:.0e}, or {agreement.FARTHER:g} times the distance of one device's float32 "
        "from float64); `refused` is refused by the config with its reason (below); **bold** is wrong; `-` has not "
        "been run.", "",
        "| layout | mesh | " + " | ".join(models) + " |", "|---" * (len(models) + 2) + "|",
    ]  # fmt: skip
    for names in cases():
        found = [_cell(results, model, names) for model in models]
        lines.append(f"| {' + '.join(names)} | `{mesh_of(names)}` | " + " | ".join(found) + " |")
    controls = [results.get(f"{model}/control/float64") for model in models]
    lines.append(f"| control: two rows exchanged | `{CONTROL}` | " + " | ".join(map(_seen, controls)) + " |")
    lines += ["", "## Refused", ""]
    said = sorted({(key.split("/")[0], row["refused"]) for key, row in results.items() if row.get("refused")})
    lines += [f"- {model}: {text}" for model, text in said]
    lines += ["", "## Not pairs", "", *(f"- {a} and {b}: {why}" for (a, b), why in ONE_AXIS.items()), ""]
    wrong = {key: row for key, row in results.items() if not row["good"]}
    lines += ["## Wrong", "", *(f"- {key}: {row}" for key, row in wrong.items()), ""] if wrong else []
    return "\n".join(lines)


def _cell(results: dict, model: str, names: tuple[str, ...]) -> str:
    rows = [results.get(f"{model}/{'+'.join(names)}/{precision}") for precision in ("float64", "float32")]
    if rows[0] is not None and rows[0].get("refused"):
        return "refused" if rows[0]["good"] else "**refused**"
    return ", ".join(_number(row) for row in rows)


def _number(row: dict | None) -> str:
    if row is None:
        return "-"
    text = f"{row['relative_error']:.0e}" if "relative_error" in row else "error"
    return text if row["good"] else f"**{text}**"


def _seen(row: dict | None) -> str:
    return "-" if row is None else f"seen, {row['relative_error']:.0e}" if row["good"] else "**not seen**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--again", action="store_true", help="run what has a result, too")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--precision", default="", help="float64 or float32, default both")
    parser.add_argument("--alone", action="store_true", help="each layout alone, no pairs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, at most")
    args = parser.parse_args()
    certify.simulate(DEVICES)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    precisions = [args.precision] if args.precision else ["float64", "float32"]
    for precision, name in itertools.product(precisions, args.models or MODELS):
        model = Model(name)
        todo = [("control",)] * (precision == "float64") + cases()
        for names in todo:
            key = f"{name}/{'+'.join(names)}/{precision}"
            mesh = CONTROL if names == ("control",) else mesh_of(names)
            same = {"mesh": mesh, "jax": jax.__version__, "config_hash": experiment.config_hash(model.config)}
            known = {leaf: results.get(key, {}).get(leaf) for leaf in same} == same and results[key]["good"]
            if args.only not in key or (known and not args.again) or (args.alone and len(names) > 1):
                continue
            if time.process_time() > 60 * args.minutes:
                print("time is up; the same command goes on")
                sys.exit(1)
            row = control(model) if names == ("control",) else measure(model, names, mesh, precision)
            results[key] = row
            RESULT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            TABLE.write_text(table(results))
            error = f"{row['relative_error']:.1e} {row.get('worst', '')}" if "relative_error" in row else "not refused"
            said = row.get("refused") or row.get("error") or error
            print(f"{'ok   ' if row['good'] else 'WRONG'} {key:45} {mesh:45} {said[:120]}", flush=True)
    TABLE.write_text(table(results))
    wrong = [key for key, row in results.items() if not row["good"]]
    print(f"{len(results)} cases, {len(wrong)} wrong: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
