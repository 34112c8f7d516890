"""`bigmodel study run|status|plan|report STUDY --workdir W`: carry it out, how far it is, its cost, what came out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bigmodel_jax import status
from bigmodel_jax.errors import EXIT_INPUT, InputError, RunError, nearest
from bigmodel_jax.study import array, runner, spec, tuning
from bigmodel_jax.study.store import Cell, Store


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("action", choices=("run", "status", "plan", "report"))
    parser.add_argument("study", help="FILE.py with get_study()")
    parser.add_argument("--workdir", required=True, help="directory of the study, shared by all who run it")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time on this machine")
    parser.add_argument("--together", type=int, default=1, help="runs as lanes of one program, where they fit")
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT", help="may be given several times")
    parser.add_argument("--pilot", type=int, default=0, metavar="N", help="only the first N seeds of each variant")
    parser.add_argument("--out", default="", help="report: folder of page, tables and plots, default WORKDIR/report")
    parser.add_argument("--mixed", action="store_true", help="report: also rows that cannot be compared, and say so")
    parser.add_argument("--record", action="store_true", help="keep finished rows in results/studies, and count them")
    array.arguments(parser)


def carry_out(args: argparse.Namespace) -> None:
    """The verb.

    Raises:
      InputError: a study or an option that does not fit. RunError: cells failed. Preempted: asked to stop.
    """
    study = spec.read(args.study)
    if study.held_out and args.action == "run":
        raise InputError(f"'{study.held_out[0]}' is to be predicted first: bigmodel scaling run {args.study}")
    if args.pilot:
        if not 0 < args.pilot <= len(study.seeds):
            raise InputError(f"--pilot {args.pilot}: study '{study.name}' has {len(study.seeds)} seeds")
        study = dataclasses.replace(study, seeds=study.seeds[: args.pilot])
    for variant in args.only:
        if variant not in study.variants:
            raise InputError(f"study '{study.name}' has no variant '{variant}'{nearest(variant, study.variants)}")
    store = Store(study, args.workdir, record=args.record)
    {"run": _run, "status": _status, "plan": _plan, "report": _report}[args.action](args, store)


def _variants(args: argparse.Namespace, store: Store) -> list[str]:
    return args.only or list(store.study.variants)


def _run(args: argparse.Namespace, store: Store) -> None:
    if args.slurm:
        array.run(args, store)
        return
    study, variants = store.study, _variants(args, store)
    work = runner.Runner(store, args.processes, together=args.together)
    choices: dict[str, tuning.Choice] = {}
    if study.tune or study.search:
        choices = tuning.tune(store, variants, work.run)
        store.keep("tuned.json", tuning.plain(choices))
        print("\n".join(["tuned:", *tuning.lines(choices, study.metric)]), flush=True)
    cells = _cells(store, [v for v in variants if v in choices or not (study.tune or study.search)], choices)
    rows = work.run(cells)
    spec.check_comparable(study, rows)
    print("\n".join(summary(store, cells)))
    if work.failed:
        # A scheduler tries a RunError again, and there is no use in that for what cannot be used as given.
        kind = InputError if set(work.failed.values()) == {EXIT_INPUT} else RunError
        raise kind(f"{len(work.failed)} cells failed; their logs are in {store.workdir}/cells/*/log.txt")


def _cells(store: Store, variants: Sequence[str], choices: dict[str, tuning.Choice]) -> list[Cell]:
    chosen = {variant: choice.overrides for variant, choice in choices.items()}
    return [cell for cell in store.cells(chosen) if cell.variant in variants]


def known(store: Store, variants: Sequence[str]) -> tuple[list[Cell], list[Cell], dict[str, tuning.Choice]]:
    """(cells of tuning met so far, cells of the table, choices), from the store alone; nothing is run."""
    study, met = store.study, []
    choices: dict[str, tuning.Choice] = {}
    if study.tune or study.search:

        def look(cells: Sequence[Cell]) -> list[spec.Row]:
            met.extend(cells)
            return store.rows(cells)

        choices = tuning.tune(store, variants, look)
    ready = [v for v in variants if v in choices or not (study.tune or study.search)]
    return met, _cells(store, ready, choices), choices


def summary(store: Store, cells: Sequence[Cell]) -> list[str]:
    """One line per variant: how many runs are done, their mean and spread."""
    study = store.study
    each = f"{len(study.repeats)} runs" if study.folds else f"{len(study.seeds)} seeds"
    lines = []
    for variant in dict.fromkeys(cell.variant for cell in cells):
        rows = store.rows([cell for cell in cells if cell.variant == variant])
        values = [row.values[study.metric] for row in rows if row.status == "done"]
        text = f"{variant}: {len(values)} of {each}"
        if values:
            mean = sum(values) / len(values)
            spread = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
            text += f", {study.metric} {mean:.5g}" + (f", sd {spread:.2g}" if spread is not None else "")
        others = [row.status for row in rows if row.status != "done"]
        lines.append(text + "".join(f", {others.count(kind)} {kind}" for kind in sorted(set(others))))
    return lines


def _status(args: argparse.Namespace, store: Store) -> None:
    from bigmodel_jax.study import report

    tuned, cells, choices = known(store, _variants(args, store))
    if tuned:
        print(f"tuning: {len(store.rows(tuned, failed=False))} of {len(tuned)} cells asked for so far are done")
        print("\n".join(tuning.lines(choices, store.study.metric)))
    print("\n".join([*report.first_stage(store, cells), *summary(store, cells)]))
    for cell in [*tuned, *cells]:
        line = progress(store, cell)
        if line:
            print(line)
    forgotten = store.forgotten([*tuned, *cells])
    if forgotten:
        print(f"{len(forgotten)} cells in {store.workdir}/cells are of no variant any more, such as {forgotten[0]}")
    left = runner.remaining_s(store, cells, args.processes)
    if left:
        print(f"about {status.span(left)} to go with {args.processes} at a time")


def progress(store: Store, cell: Cell) -> str:
    """A line on a cell that is under way or has failed, "" for any other."""
    if store.row(cell) is not None:
        return ""
    owner, failure = store.owner(cell), store.failure(cell)
    if owner:
        try:
            found = status.read(str(store.folder(cell)))
            return f"running on {owner}: {runner.name([cell])}, step {found['step']} of {found['steps']}"
        except InputError:
            return f"running on {owner}: {runner.name([cell])}, starting"
    if failure is not None:
        log = runner.last_lines(store.folder(cell) / "log.txt", 2)
        return f"failed: {runner.name([cell])} in {store.folder(cell)}\n{log}"
    return ""


def _plan(args: argparse.Namespace, store: Store) -> None:
    from bigmodel_jax.study import plan

    tuned, cells, _ = known(store, _variants(args, store))
    print("\n".join(plan.lines(store, tuned, cells, args.processes)))


def _report(args: argparse.Namespace, store: Store) -> None:
    from bigmodel_jax.study import report

    _, cells, choices = known(store, _variants(args, store))
    rows = store.rows(cells)
    made_with = [*report.environment(store, rows), *report.first_stage(store, cells)]
    found = report.of_rows(store.study, rows, choices, mixed=args.mixed, environment=made_with)
    folder = Path(args.out) if args.out else store.workdir / "report"
    report.write(found, folder)
    print(report.summary(found, folder))
