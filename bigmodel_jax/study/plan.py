"""What a study will cost, and whether its full-scale twin compiles: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigmodel_jax import experiment, status, tree
from bigmodel_jax.programs import Programs
from bigmodel_jax.study import runner
from bigmodel_jax.study.store import Cell, Store

# Memory and legality are asked of the compiler here, not speed.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def lines(store: Store, tuned: Sequence[Cell], cells: Sequence[Cell], processes: int) -> list[str]:
    """The cells, what they cost as far as finished ones tell, and the full-scale twin."""
    study = store.study
    out = [f"{study.title} ({study.source})"]
    if study.tune or study.search:
        out.append(f"tuning: {len(tuned)} cells, {len(store.rows(tuned, failed=False))} done")
    for variant, overrides in study.variants.items():
        mine = [cell for cell in cells if cell.variant == variant]
        changes = ", ".join(f"{leaf}={value}" for leaf, value in overrides.items()) or "as the base"
        done = len(store.rows(mine, failed=False))
        out.append(f"{variant}: {len(mine)} runs, {done} done; {changes}")
    finished = store.rows([*tuned, *cells], failed=False)
    left = runner.remaining_s(store, [*tuned, *cells], processes)
    spent = sum(row.wall_s for row in finished)
    out.append(f"{len(tuned) + len(cells)} cells, {len(finished)} done in {status.span(spent)}")
    if left is None:
        out.append(f"cost unknown before a first cell is done; budget {study.budget_minutes:g} min")
    else:
        whole = (spent / processes + left) / 60
        verdict = "within" if whole <= study.budget_minutes else "beyond"
        out.append(
            f"about {status.span(left)} to go with {processes} at a time; {whole:.0f} min in all, {verdict} "
            f"the budget of {study.budget_minutes:g} min"
        )
    out += [f"full scale{f' of {arm}' if arm else ''}: {full_scale(raw)}" for arm, raw in study.arms.items()]
    return out


def full_scale(raw: dict[str, Any]) -> str:
    """Compile the train step of the twin from shapes alone, on the devices that are here.

    Raises:
      InputError: it cannot be built.
    """
    config = experiment.resolve(raw)
    exp = experiment.build(config, load=False)
    programs = Programs(exp)
    size = exp.batch_sizes()[-1]
    compiled = programs.lower_step(size).compile(compiler_options=QUICK)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    examples = size * config["steps"]
    total = exp.work()["flops_per_example"] * examples
    return (
        f"{tree.count(programs.state['params']):,} parameters, {config['steps']:,} steps of {size}; "
        f"the train step compiles here and holds {held / 2**30:.1f} GiB on {exp.mesh.size} devices; "
        f"{total:.2g} FLOPs in all"
    )
