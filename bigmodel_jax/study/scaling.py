"""`bigmodel scaling plan|run|fit|target STUDY --workdir W`: a scaling law of a ladder, and the run it leads to.

plan    the rungs with their sizes, or variants to put into the study's file (--tokens-per-parameter, --flops)
run     every rung but those held out, then the prediction of these, to results/<study>_prediction.json;
        with --held-out the held-out runs themselves, once the prediction is committed
fit     the law of what has been run, against the held-out runs where they are there; draws law.png, and isoflop.png
        where each budget has several sizes, into the workdir
target  a config file for the best run at --flops
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bigmodel_jax.errors import InputError, RunError
from bigmodel_jax.measures.plots import figure
from bigmodel_jax.study import ladder, law, law_plots, runner, spec
from bigmodel_jax.study.ladder import Point
from bigmodel_jax.study.store import Cell, Store, repository


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("action", choices=("plan", "run", "fit", "target"))
    parser.add_argument("study", help="FILE.py with get_study(): sizes and lengths of a language model")
    parser.add_argument("--workdir", required=True, help="directory of the study")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time on this machine")
    parser.add_argument("--record", action="store_true", help="keep finished rows in results/studies, and count them")
    parser.add_argument("--held-out", action="store_true", help="run: what the study holds out, after its prediction")
    parser.add_argument("--flops", default="", help="budgets with commas between; target: one")
    parser.add_argument("--tokens-per-parameter", default="", help="ratios with commas between")
    parser.add_argument("--out", default="", help="the prediction's file, or target's, default beside the results")


def carry_out(args: argparse.Namespace) -> None:
    """The verb.

    Raises:
      InputError: a study, an option or the order of steps that does not fit. RunError: cells failed.
    """
    study = spec.read(args.study)
    store = Store(study, args.workdir, record=args.record)
    {"plan": _plan, "run": _run, "fit": _fit, "target": _target}[args.action](args, store)


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word]
    except ValueError:
        found = [0.0]
    if any(x <= 0 for x in found):
        raise InputError(f"{option} {text!r} should be positive numbers with commas between, such as 1e12,3e12")
    return found


def _plan(args: argparse.Namespace, store: Store) -> None:
    ratios, budgets = _numbers(args.tokens_per_parameter, "--tokens-per-parameter"), _numbers(args.flops, "--flops")
    if ratios or budgets:
        for name, leaves in ladder.proposed(store.study, ratios=ratios, budgets=budgets).items():
            print(f"{name!r}: {leaves!r},")
        return
    planned, held = ladder.points(store.study), store.study.held_out
    for point in planned:
        print(
            f"{point.variant}: {ladder.short(point.parameters)} parameters, {ladder.short(point.tokens)} tokens "
            f"({point.tokens / point.parameters:.3g} each), {point.flops:.3g} FLOPs"
            f"{', held out' if point.variant in held else ''}"
        )
    left = runner.remaining_s(store, store.cells(), args.processes)
    print("cost unknown before a first cell is done" if left is None else f"about {left / 60:.0f} min to go")


def _divided(store: Store) -> tuple[list[Point], list[Cell], list[Cell]]:
    """(points of all variants, cells to fit, cells held out)."""
    planned = ladder.points(store.study)
    held, cells = store.study.held_out, store.cells()
    return planned, [c for c in cells if c.variant not in held], [c for c in cells if c.variant in held]


def _fitted(store: Store, planned: Sequence[Point], cells: Sequence[Cell]) -> tuple[law.Fitted, list[Point]]:
    rows = store.rows(cells)
    spec.check_comparable(store.study, rows)
    made = ladder.measured(planned, rows, store.study.metric)
    lost = [f"{row.variant} ({row.status})" for row in rows if row.status != "done"]
    if lost:
        print(f"not part of the fit: {', '.join(lost)}")
    if not made:
        told = "" if store.recorded else "; --record counts those in results/studies"
        raise InputError(f"study '{store.study.name}' has no finished run in {store.workdir}: run it first{told}")
    return law.fit_with_intervals(*zip(*[(p.parameters, p.tokens, p.loss) for p in made], strict=True)), made


def _run(args: argparse.Namespace, store: Store) -> None:
    _, cells, held = _divided(store)
    path = _prediction_path(args, store)
    if args.held_out:
        if not held:
            raise InputError(f"the file of study '{store.study.name}' names no held_out variants")
        _check_predicted(path, [cell.variant for cell in held])
        cells = held
    work = runner.Runner(store, args.processes)
    work.run(cells)
    if work.failed:
        raise RunError(f"{len(work.failed)} cells failed; their logs are in {store.workdir}/cells/*/log.txt")
    fitted, made = _fitted(store, *_divided(store)[:2])
    if not args.held_out:
        write_prediction(store, path, fitted, made)
    _tell(store, fitted, made)


def _prediction_path(args: argparse.Namespace, store: Store) -> Path:
    if args.out and args.action != "target":
        return Path(args.out)
    return repository(store.study.file) / "results" / f"{store.study.name}_prediction.json"


def write_prediction(store: Store, path: Path, fitted: law.Fitted, made: Sequence[Point]) -> None:
    """Write what the held-out runs will give, by the law of the rungs `made`.

    Raises:
      InputError: a held-out run has been started: what is written after it is no prediction.
    """
    planned, _, held = _divided(store)
    by_name = {point.variant: point for point in planned}
    value = {
        "study": store.study.name, "metric": store.study.metric, "level": 0.95,
        "law": {name: [getattr(fitted.law, name), *fitted.interval(name)] for name in law.NAMES},
        "predicted": {cell.variant: _prediction(fitted, by_name[cell.variant]) for cell in held},
        "fitted_to": [ladder.as_json(point) for point in made],
    }  # fmt: skip
    old = json.loads(path.read_text()) if path.exists() else None
    if old is not None and json.loads(json.dumps(value)) == old:
        return
    begun = [cell.variant for cell in held if store.attempts(cell) or store.rows([cell])]
    if begun:
        raise InputError(f"'{begun[0]}' has been started already: what is written to {path} now predicts nothing")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _prediction(fitted: law.Fitted, point: Point) -> dict[str, Any]:
    loss, low, high = fitted.predict(point.parameters, point.tokens)
    return {"parameters": point.parameters, "tokens": point.tokens, "loss": loss, "low": low, "high": high}


def _check_predicted(path: Path, held: Sequence[str]) -> None:
    """The prediction is there, of these runs, and committed where it lies in a repository.

    Raises:
      InputError: it is not.
    """
    if not path.exists() or set(json.loads(path.read_text())["predicted"]) != set(held):
        raise InputError(f"no prediction of {', '.join(held)} in {path}: `scaling run` without --held-out comes first")
    git = ["git", "-C", str(path.resolve().parent)]
    inside = subprocess.run([*git, "rev-parse", "--is-inside-work-tree"], capture_output=True, check=False)
    if inside.returncode:
        return
    status = [*git, "status", "--porcelain", "--ignored", "--", path.name]
    said = subprocess.run(status, capture_output=True, text=True, check=False)
    if said.stdout.strip() or said.returncode:
        raise InputError(f"commit {path} first: a prediction is one that was there before the run")


def _fit(args: argparse.Namespace, store: Store) -> None:
    planned, cells, _ = _divided(store)
    _tell(store, *_fitted(store, planned, cells))


def _tell(store: Store, fitted: law.Fitted, made: Sequence[Point]) -> None:
    planned, _, held = _divided(store)
    metric = store.study.metric
    print(f"{len(made)} runs, {metric} = E + A / N^alpha + B / D^beta")
    for name in law.NAMES:
        low, high = fitted.interval(name)
        print(f"  {name:6} {getattr(fitted.law, name):10.4g}   [{low:.4g}, {high:.4g}]")
    try:
        valleys, exponent = law.isoflop(*zip(*[(p.flops, p.parameters, p.loss) for p in made], strict=True))
        print(f"best size grows as FLOPs^{exponent:.2f}: " + ", ".join(
            f"{v.flops:.2g} -> {ladder.short(v.parameters)}{'' if v.inside else ' (outside)'}" for v in valleys
        ))  # fmt: skip
        _draw(store, "isoflop.png", partial(law_plots.budgets, valleys, made, metric))
    except InputError as error:
        print(f"no parabolas: {error}")
    seen = {p.variant: p for p in ladder.measured(planned, store.rows(held), metric)}
    ahead = [point for point in planned if point.variant in {cell.variant for cell in held}]
    for point in ahead:
        loss, low, high = fitted.predict(point.parameters, point.tokens)
        text = f"{point.variant}: predicted {loss:.4f} [{low:.4f}, {high:.4f}], {(high - low) / loss:.1%} wide"
        if point.variant in seen:
            found = seen[point.variant].loss
            text += f"; measured {found:.4f}, off by {loss / found - 1:+.2%}"
        print(text)
    _draw(store, "law.png", partial(law_plots.lengths, fitted, made, ahead, seen, metric))


def _draw(store: Store, name: str, draw: Callable[[Any], None]) -> None:
    path = store.workdir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figure(draw, (6.4, 4.6)))
    print(f"drawn: {path}")


def _target(args: argparse.Namespace, store: Store) -> None:
    budgets = _numbers(args.flops, "--flops")
    if len(budgets) != 1:
        raise InputError("scaling target needs one budget: --flops 1e15")
    planned, cells, held = _divided(store)
    fitted, _ = _fitted(store, planned, [*cells, *held])
    raw, point, (loss, low, high) = ladder.target(store.study, fitted, budgets[0])
    said = f"{store.study.metric} {loss:.4f}, 95% interval [{low:.4f}, {high:.4f}]"
    text = (
        f'"""{point.variant}: {ladder.short(point.parameters)} parameters, {ladder.short(point.tokens)} tokens.\n\n'
        f"The best size at {budgets[0]:g} FLOPs by the law fitted to the study '{store.study.name}', which predicts\n"
        f'{said}.\n"""\n\n\ndef get_config():\n    return {raw!r}\n'
    )
    path = Path(args.out or repository(store.study.file) / f"{store.study.name}_target.py")
    path.write_text(text)
    print(f"{path}: {point.variant}, {said}")
