"""One optimizer step, and one evaluation step, as pure functions of values.

    loss = sum over terms of coefficient * (sum over all microbatches) / weight of the whole batch

A step whose loss or gradient is not finite, or spikes, changes nothing but the guard's counters:
the new state is selected leaf by leaf inside the same program, so the run continues bitwise as if
that batch had not existed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bigmodel_jax import tree as trees
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import layers, noise, optim
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn.objectives import Objective
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel.rules import Layout, use

State = dict[str, Any]
Batch = dict[str, jax.Array]
StepMetrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Guard:
    """When a step counts as bad.

    spike: loss or gradient norm above `spike` times the median of the last admitted steps (as
      many as the state's window holds) is bad; 0 judges finiteness only.
    noise_scale: decay of the averages of the noise meter (noise.py), for a state that has them.
    skip: leave the state as it was on a bad step. False applies spikes and non-finite updates
      alike and only reports them; a caller that stops at bad_streak 1 may want that.
    """

    spike: float = 0.0
    skip: bool = True
    noise_scale: float = 0.0


def make_train_step(
    apply: Callable[..., Any],
    merge: Callable[[Any, Any], Any],
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    *,
    lr: Callable[[jax.Array], jax.Array] | None = None,
    guard: Guard = Guard(),
    ema: float = 0.0,
    layout: Layout | None = None,
    gradients: Any = None,
    frozen: frozenset[str] = frozenset(),
    frozen_rows: Mapping[str, int] = MappingProxyType({}),
    norms: int = 0,
) -> Callable[[State, Batch, jax.Array], tuple[State, StepMetrics]]:
    """Build train_step(state, batch, key) -> (state, metrics), not yet jitted (see `jit_train_step`).

    batch leaves are [A, M, ...]: A accumulation steps of M global rows, row r = a * M + m. Dropout
    keys are fold_in(fold_in(key, state["step"]), r), so they do not depend on A or the mesh.

    Args:
      apply, merge: the model's; merge(stats, mean of the microbatches' updates) once per step.
      tx: from `optim.make`; it leaves its own state alone when told that the step is bad.
      lr: only to report it.
      ema: decay of the averaged parameters, for a state that has them.
      layout: under which the model is traced; None for one device.
      gradients: tree of shardings that gradients are pinned to (see state.gradients).
      frozen: paths of parameters that get neither gradient nor update. frozen_rows: {path: leading rows} of
        stacked layers that get no gradient (tx leaves them alone).
      norms: depth of parameter path at which gradient, parameter and update norms are reported as
        "norm/grad/<prefix>", "norm/param/...", "norm/update/..."; 0 leaves them out.

    Metrics are scalars: loss, grad_norm, lr, finite, skipped (this step), bad_streak,
    skipped_total, weight/<term>, and each of the objective's metrics as sum / weight; with the noise meter also
    noise/scale (rows) and, where the step accumulates, its estimates noise/signal and noise/trace.

    Raises:
      InputError: A > 1 for an objective that is not a sum over examples.
    """
    offloaded = layout is not None and layout.offload == "optimizer"

    def train_step(state: State, batch: Batch, key: jax.Array) -> tuple[State, StepMetrics]:
        with use(layout):
            trained, fixed = _split(state["params"], frozen)
            run = _accumulate(
                apply, objective, state, fixed, frozen_rows, batch, key, _pin(gradients), guard.noise_scale > 0
            )
            loss, grads, metrics, updates = run(trained)
            grad_norm = optim.global_norm(grads)
            counters, verdict = _judged(state["guard"], guard, loss, grad_norm)
            keep = ~verdict["skipped"] if guard.skip else None
            if offloaded:
                state = state | {"opt": jax.device_put(state["opt"], jax.memory.Space.Device)}
            new, change = _updated(state, grads, updates, merge, tx, ema, keep)
            new["guard"] = counters
            if guard.noise_scale:
                new["guard"]["noise"], said = _metered(state, batch, guard, metrics, grad_norm, verdict)
                metrics |= said
            if norms:
                metrics |= _group_norms(norms, grads, state["params"], change)
        metrics |= {"loss": loss, "grad_norm": grad_norm} | verdict
        if lr is not None:
            metrics["lr"] = lr(state["step"])
        return new, metrics

    return train_step


def _split(params: Any, frozen: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    flat = trees.flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return trained, {path: leaf for path, leaf in flat.items() if path in frozen}


def _pin(gradients: Any) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Keep gradients where their optimizer slots live: a reduce-scatter instead of an all-reduce."""
    if gradients is None:
        return lambda flat: flat
    places = trees.flatten(gradients)
    return lambda flat: {path: jax.lax.with_sharding_constraint(leaf, places[path]) for path, leaf in flat.items()}


def _row_keys(key: jax.Array, step: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    base = jax.random.fold_in(key, step)
    return jax.vmap(lambda r: jax.random.fold_in(base, r))(first + jnp.arange(rows))


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, and 0 where nothing had weight."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def _accumulate(
    apply: Callable, objective: Objective, state: State, fixed: dict[str, Any],
    rows_kept: Mapping[str, int], batch: Batch, key: jax.Array, pin: Callable, metered: bool,
) -> Callable[[dict[str, Any]], tuple]:  # fmt: skip
    """trained parameters -> (loss, gradients, metrics, mean updates) of the whole batch.

    metered: the metrics have "noise/micro", the mean square norm of the microbatches' own gradients.
    """
    steps, rows = jax.tree.leaves(batch)[0].shape[:2]
    if steps > 1 and not objective.additive:
        raise InputError(
            f"{steps} accumulation steps, but the objective is not a sum over examples; "
            "set the microbatch to the whole batch"
        )
    weights = objective.weights(batch)

    def micro(trained: dict[str, Any], a: jax.Array, part: Batch) -> tuple:
        trained = layers.keep_rows(trained, rows_kept)
        variables = states.variables({**state, "params": trees.unflatten(trained | fixed)})
        rngs = {"dropout": _row_keys(key, state["step"], a * rows, rows)}
        terms, metrics, updates = objective(apply, variables, part, rngs, True)
        shares = {t: objective.coefficients[t] * _mean(s, weights[t]) for t, s in terms.items()}
        return sum(shares.values()), (metrics, updates)

    def gradients(trained: dict[str, Any], a: jax.Array, part: Batch) -> tuple:
        (loss, (metrics, updates)), grads = jax.value_and_grad(micro, has_aux=True)(trained, a, part)
        grads = pin(grads)
        if metered and steps > 1:
            # Gradients of microbatches are shares of the whole's mean: their own are `steps` times as large.
            metrics = metrics | {"noise/micro": (jnp.square(steps * optim.global_norm(grads)), jnp.ones(()))}
        return loss, grads, metrics, updates

    def run(trained: dict[str, Any]) -> tuple:
        def body(carry: tuple, x: tuple) -> tuple[tuple, None]:
            one = gradients(trained, *x)
            return jax.tree.map(lambda c, n: c + n.astype(c.dtype), carry, one), None

        first = jax.tree.map(lambda leaf: leaf[0], batch)
        if steps == 1:
            loss, grads, metrics, updates = gradients(trained, jnp.int32(0), first)
        else:
            shapes = jax.eval_shape(gradients, trained, jnp.int32(0), first)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, optim.wide(s.dtype)), shapes)
            zeros = (zeros[0], pin(zeros[1]), *zeros[2:])
            total, _ = jax.lax.scan(body, zeros, (jnp.arange(steps), batch))
            loss, grads, metrics, updates = total
            updates = jax.tree.map(lambda x: x / steps, updates)
        means = {name: _mean(*pair) for name, pair in metrics.items()}
        means |= {f"weight/{term}": weight for term, weight in weights.items()}
        return loss, grads, means, updates

    return run


def _updated(
    state: State, grads: dict[str, Any], updates: Any, merge: Callable,
    tx: optax.GradientTransformationExtraArgs, ema: float, good: jax.Array | None,
) -> tuple[State, dict[str, Any]]:  # fmt: skip
    """(state after the update, {path: parameter change}); the old state where not `good`."""
    change, opt = tx.update(trees.unflatten(grads), state["opt"], state["params"], good=good)
    new = {"params": optim.apply(state["params"], change), "step": state["step"] + 1}
    new["stats"] = merge(state["stats"], updates) if jax.tree.leaves(updates) else state["stats"]
    if "ema" in state:
        new["ema"] = jax.tree.map(lambda e, p: (ema * e + (1 - ema) * p).astype(e.dtype), state["ema"], new["params"])
    if good is not None:
        old = {key: state[key] for key in new}
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    # The optimizer has made its own choice: selecting its slots again would be one more pass.
    return state | new | {"opt": opt}, trees.flatten(change)


def _judged(
    books: dict[str, jax.Array], guard: Guard, loss: jax.Array, grad_norm: jax.Array
) -> tuple[dict[str, jax.Array], StepMetrics]:
    """(the guard's books after this step, what the metrics say of it)."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good = finite
    if guard.spike:
        full = books["admitted"] >= books["losses"].shape[0]
        for value, seen in ((loss, books["losses"]), (grad_norm, books["norms"])):
            good &= ~(full & (value > guard.spike * jnp.median(seen)))
    # Only good values enter the window: one NaN in it would condemn every later step.
    at = books["admitted"] % books["losses"].shape[0]

    def admit(seen: jax.Array, value: jax.Array) -> jax.Array:
        return seen.at[at].set(jnp.where(good, value.astype(seen.dtype), seen[at]))

    left_out = ~good if guard.skip else jnp.zeros((), bool)
    counters = {
        "losses": admit(books["losses"], loss),
        "norms": admit(books["norms"], grad_norm),
        "admitted": books["admitted"] + good,
        "bad_streak": jnp.where(good, 0, books["bad_streak"] + 1),
        "skipped": books["skipped"] + left_out,
    }
    verdict = {"finite": finite, "skipped": left_out}
    verdict |= {"bad_streak": counters["bad_streak"], "skipped_total": counters["skipped"]}
    return counters, verdict


def _metered(
    state: State, batch: Batch, guard: Guard, metrics: StepMetrics, grad_norm: jax.Array, verdict: StepMetrics
) -> tuple[jax.Array, StepMetrics]:
    """(averages of the noise meter after this step, what the metrics say of it)."""
    books, said = state["guard"]["noise"], {}
    steps, rows = jax.tree.leaves(batch)[0].shape[:2]
    if steps > 1:
        found = noise.estimates(metrics.pop("noise/micro"), jnp.square(grad_norm), rows, steps)
        books = noise.averaged(books, guard.noise_scale, found, verdict["finite"] & ~verdict["skipped"])
        said = dict(zip(("noise/signal", "noise/trace"), found, strict=True))
    return books, said | {"noise/scale": noise.scale(books)}


def _group_norms(depth: int, grads: dict[str, Any], params: Any, change: dict[str, Any]) -> StepMetrics:
    out = {}
    for kind, flat in (("grad", grads), ("param", trees.flatten(params)), ("update", change)):
        groups: dict[str, list] = {}
        for path, leaf in flat.items():
            groups.setdefault("/".join(path.split("/")[:depth]), []).append(leaf)
        for group, leaves in groups.items():
            out[f"norm/{kind}/{group}"] = optim.global_norm(leaves)
    return out


def jit_train_step(
    train_step: Callable[[State, Batch, jax.Array], tuple[State, StepMetrics]],
    shardings: State,
    mesh: Mesh,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[State, Batch, jax.Array], tuple[State, StepMetrics]]:
    """Jit with the state donated, and pinned to the same layout on both sides.

    An unpinned output layout may differ from the input's, and the second call would then compile
    the step again.
    """
    whole = meshes.replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, meshes.batch_sharding(mesh), whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def make_eval_step(
    apply: Callable[..., Any],
    objective: Objective,
    *,
    layout: Layout | None = None,
    ema: bool = False,
) -> Callable[[State, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Build eval_step(state, batch) -> {metric: (sum, weight)}, to be added up over batches.

    batch leaves are [M, ...]; rows of weight 0 are padding. Every term of the objective appears
    under its own name beside its metrics. The state is only read.

    Args:
      ema: evaluate state["ema"] instead of state["params"].
    """

    def eval_step(state: State, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        variables = states.variables(state, ema)
        with use(layout):
            terms, metrics, _ = objective(apply, variables, batch, None, False)
            weights = objective.weights(batch)
        return metrics | {term: (total, weights[term]) for term, total in terms.items()}

    return eval_step


def make_record_step(
    apply: Callable[..., Any],
    objective: Objective,
    *,
    layout: Layout | None = None,
    ema: bool = False,
) -> Callable[[State, Batch], dict[str, jax.Array]]:
    """Build record_step(state, batch) -> {name: [M, ...]}, the objective's record of each row."""

    def record_step(state: State, batch: Batch) -> dict[str, jax.Array]:
        variables = states.variables(state, ema)
        with use(layout):
            return objective.records(apply, variables, batch)

    return record_step


def jit_eval_step(
    eval_step: Callable[[State, Batch], Any], shardings: State, mesh: Mesh
) -> Callable[[State, Batch], Any]:
    """Jit `eval_step` or `record_step`; the state keeps its layout and is not donated, and every process
    gets the whole result."""
    rows = meshes.batch_sharding(mesh, accumulated=False)
    return jax.jit(eval_step, in_shardings=(shardings, rows), out_shardings=meshes.replicated(mesh))
