"""`bigmodel plan`: what a config needs on hardware that is not here, before anything is paid for.

    bigmodel plan --config configs/llama.py:8b --target v5p:8x8x8
    bigmodel plan --config configs/llama.py:8b --target 2xv5e:16x16 --search --price 1.2 --out plans/8b

The step that training runs is compiled by the target's own compiler where it is on this machine (planner/compilers.py),
else by the CPU's for as many simulated devices, and is then called an estimate. Exit code 0: it fits; 79: it does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from bigmodel_jax import chips, experiment
from bigmodel_jax.errors import DoesNotFit, InputError
from bigmodel_jax.planner import advice, compilers, memory, picture, verdict
from bigmodel_jax.planner import search as layouts
from bigmodel_jax.planner.compile import compile_for
from bigmodel_jax.planner.targets import Target, parse
from bigmodel_jax.planner.verdict import Figure, Verdict
from bigmodel_jax.screen import count

TITLES = {"memory": "memory, per device", "time": "one step", "run": "the run"}


def plan(
    config: Mapping[str, Any],
    target: str,
    *,
    search: bool = False,
    price: float = 0.0,
    memory_gib: float = 0.0,
    out: str = "",
    limit_s: float = 1200.0,
    again: bool = False,
) -> Verdict:
    """Judge a resolved config on a target; show it, write plan.json and layout.png to `out`.

    Args:
      search: first look for its best layout there, and judge that one.
      price: dollars per device-hour. memory_gib: of a device, default the chip's. limit_s: wall seconds of one
        compilation. again: compile even what was compiled before.

    Raises:
      InputError: the target or the config cannot be planned.
      DoesNotFit: it does not fit; with advice that was compiled and fits, where some was found.
    """
    where, config = _prepared(target), sized(config)
    console = Console(highlight=False, soft_wrap=True)
    say(console, config, where)
    searched = None
    if search:
        searched = _search(console, config, where, memory_gib * 2**30, limit_s)
        config = experiment.resolve(config, searched.compiled[0][0].words)
    if where.devices:
        memory.estimate(config, where.devices, where.platform)  # what cannot be is said at once
    compiled = compile_for(config, where, limit_s=limit_s, again=again)
    found = verdict.judge(config, where, compiled, limit=memory_gib * 2**30, price=price)
    advised = None
    if found.fits is False:
        advised = _advise(console, config, where, found, limit_s)
    show(console, found)
    if out:
        write(Path(out), config, found, advised, searched)
        console.print(f"written: {out}", markup=False)
    if found.fits is False:
        raise DoesNotFit(f"{found.reason}; {_said(advised, where)}")
    return found


def _prepared(text: str) -> Target:
    # What is planned here is compiled elsewhere: this process needs no accelerator and must not take one.
    jax.config.update("jax_platforms", "cpu")
    return parse(text)


def sized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose model has the sizes that its data section asks for: nothing is loaded to plan."""
    data = {leaf: config["data"][leaf] for leaf in experiment.FROM_DATA if config["data"].get(leaf)}
    model = {leaf: data[leaf] for leaf, size in config["model"].items() if size == 0 and leaf in data}
    return {**config, "model": {**config["model"], **model}}


def say(console: Console, config: Mapping[str, Any], target: Target) -> None:
    """What is about to happen, and with which compiler."""
    found = compilers.version(target)
    devices = f"{target.devices} devices" if target.devices else "the devices of this machine"
    missing = compilers.MISSING.get(target.platform, "")
    how = f"compiling with {found}" if found else f"{missing}; an estimate by the CPU compiler"
    console.print(f"{config['model']['name']} on {target} ({devices}): {how}", markup=False)


def _search(console: Console, config: Mapping[str, Any], target: Target, limit: float, limit_s: float) -> layouts.Found:
    """The best layouts, shown as a table with the words that ask for them."""
    chip = chips.chip(target.kind)
    room = verdict.capacity(target, chip, limit)
    if room.value is None or not target.devices or not chip.peaks:
        raise InputError(f"--search needs a target whose rates and memory are known, not {target}")

    def compiled(changed: dict[str, Any], candidate: layouts.Candidate) -> tuple[float, Verdict] | None:
        console.print(f"compiling {candidate.text}", markup=False)
        found = verdict.judge(changed, target, compile_for(changed, target, limit_s=limit_s), limit=limit)
        return (found.time["step"].value, found) if found.fits else None

    found = layouts.search(
        config, target, chip, lambda mesh: verdict.links(target, mesh), room=room.value, compile=compiled
    )
    if not found.compiled:
        raise DoesNotFit(f"none of {found.tried} layouts fits {target} ({len(found.ranked)} do by arithmetic)")
    head = f"{found.tried} layouts, {len(found.ranked)} fit by arithmetic, the best {len(found.compiled)} compiled"
    table = Table(title=head, title_justify="left", box=None)
    for column in ("", "layout", "step", "by arithmetic", "needs"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for place, (candidate, said) in enumerate(found.compiled, 1):
        arithmetic = amount(Figure(candidate.step_s, "s", ""))
        table.add_row(str(place), candidate.text, amount(said.time["step"]), arithmetic, amount(said.memory["needs"]))
    console.print(table)
    console.print("the first is " + " ".join(found.compiled[0][0].words), markup=False)
    return found


def _advise(
    console: Console, config: Mapping[str, Any], target: Target, found: Verdict, limit_s: float
) -> advice.Advice | None:
    room, needs = found.memory["memory"].value, found.memory["needs"].value
    guess = memory.estimate(config, found.compiled.work["devices"], target.platform).total

    def check(changed: dict[str, Any], where: Target) -> bool | None:
        console.print(f"{found.reason}; trying {' '.join(verdict.overrides(config, changed))} on {where}", markup=False)
        try:
            compiled = compile_for(changed, where, limit_s=limit_s)
        except InputError:
            return False
        return verdict.judge(changed, where, compiled, limit=room).fits

    if not target.devices:
        return None
    return advice.advise(config, target, room=room, factor=needs / guess, check=check)


def _said(found: advice.Advice | None, target: Target) -> str:
    if found is None:
        return "no change that was tried fits"
    words = [*(["--target", found.target] if found.target != str(target) else []), *found.words]
    return f"this fits (compiled): {found.text}: {' '.join(words)}"


def show(console: Console, found: Verdict) -> None:
    """The verdict as tables."""
    compiled = found.compiled
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    for name, title in TITLES.items():
        figures: Mapping[str, Figure] = getattr(found, name)
        if not figures:
            continue
        table = Table(title=f"{title} ({mesh})" if name == "memory" else title, title_justify="left", box=None)
        for column, side in (("", "left"), ("", "right"), ("from", "left")):
            table.add_column(column, justify=side, no_wrap=column == "")
        before = ""
        for what, figure in figures.items():
            table.add_row(what, amount(figure), figure.source if figure.source != before else '"')
            before = figure.source
        console.print(table)
    if found.traffic:
        table = Table(title="communication per step, per device", title_justify="left", box=None)
        for column in ("kind", "mesh axes", "payload", "on the wire"):
            table.add_column(column, justify="left" if column in ("kind", "mesh axes") else "right")
        for row in found.traffic:
            sizes = (amount(Figure(row[key], "B", "")) for key in ("payload", "wire"))
            table.add_row(row["kind"], "+".join(row["axes"]), *sizes)
        console.print(table)
    if found.time and found.time["step"].value is not None:
        for note in found.assumptions:
            console.print(f"note: {note}", markup=False)
    console.print(
        f"compiled in {compiled.cpu_s:.0f} CPU s, {compiled.peak_rss / 2**30:.2f} GiB resident, by {compiled.compiler}",
        markup=False,
    )
    console.print(found.reason, markup=False, style="bold")


def amount(figure: Figure) -> str:
    """A figure for people."""
    value, unit = figure.value, figure.unit
    if value is None:
        return "n/a"
    if unit == "B":
        scale, name = next(((2**n, u) for n, u in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if value >= 2**n), (1, "B"))
        return f"{value / scale:.4g} {name}"
    if unit == "":
        return f"{value:.1%}" if 0 < value <= 1.5 else f"{value:,.4g}"
    if unit == "s":
        return f"{value:.4g} s"
    return f"{value:,.4g} {unit}" if unit != "$" else f"${value:,.0f}"


def write(
    out: Path,
    config: Mapping[str, Any],
    found: Verdict,
    advised: advice.Advice | None = None,
    searched: layouts.Found | None = None,
) -> None:
    """plan.json and layout.png in `out`, and overrides.txt of a search: one word of a command line a line."""
    out.mkdir(parents=True, exist_ok=True)
    plain = found.plain() | {"config": config, "advice": advised and vars(advised)}
    if searched:
        plain["search"] = [vars(c) | {"compiled_step_s": said.time["step"].value} for c, said in searched.compiled]
        (out / "overrides.txt").write_text("\n".join(searched.compiled[0][0].words) + "\n")
    (out / "plan.json").write_text(json.dumps(plain, indent=1) + "\n")
    compiled = found.compiled
    picture.draw(
        out / "layout.png", title=f"{config['model']['name']}, {count(compiled.work['parameters'])} parameters, on "
        f"{found.target}: {found.reason}", mesh=found.mesh, hosts=compiled.hosts, leaves=compiled.leaves,
    )  # fmt: skip
