"""Pipeline parallelism: a stack of equal layers, cut over the stage axis of the mesh, inside one jit.

The schedules are GPipe (Huang et al. 2019, arXiv:1811.06965) and its circular form, in which each stage has
several pieces of the stack and every microbatch goes around as often (Narayanan et al. 2021, arXiv:2104.04473,
section 2.2). All stages run one program: what they work on is a buffer whose first dimension, S, is pinned to
the stage axis; a tick applies every stage to its row of the buffer (`jax.vmap`) and moves the rows on by one,
which the compiler makes a collective-permute. The backward pass is that loop in reverse.

Letters: S stages, M microbatches (a multiple of S), R pieces of the stack on each stage, N layers, n = N / (R S) of
a piece, B rows, G groups of batch shards, T ticks.

    tick t, stage s: turn t - s; turn r M + m is microbatch m in piece r S + s of the stack
    T = R M + S - 1, of which each stage idles for S - 1: a share of (S - 1) / (R M + S - 1)

Outside the stack (embedding, head, loss) rows are cut over the stages too, so that no stage repeats another's work.
From there microbatches reach the first stage through a stream: a second buffer [S, M / S, ...] that moves towards
it by one stage per tick, and takes what the last stage has finished. With M > S a circular schedule has a third, in
which microbatches wait for their next round.

Costs, per stage beside the layers themselves: a tick sends a microbatch's activations, and everything that travels
with them, twice (three times where they wait). Parameters stay [N, ...] in the state, cut into runs of N / S layers,
so that a checkpoint knows nothing of stages; a circular schedule needs them in turns and deals them out anew in each
pass: R collective-permutes send all but some 1 / S of a stage's share, and as much comes back as gradients.

Gradients are summed over the data axis once, after all ticks: each of the G groups of batch shards on which weights
are whole has a copy of its own (no more memory: a copy per device is what there is anyway). With ZeRO-3 a tick gathers
its layers' weights over the fsdp axes and sums their gradients over them, T times in all; with ZeRO-1 both happen once.

Weak spots: all stages run one program, so a model whose layers differ (some with a window) computes both kinds of
attention in every layer and keeps one; idle ticks compute too, on rows whose results nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigmodel_jax.parallel.mesh import BATCH_AXES, batch_shards
from bigmodel_jax.parallel.rules import ROW_AXES, Layout, active, use

AXIS = "stage"


@dataclass(frozen=True)
class Schedule:
    """How many turns the stages take, and how long that lasts."""

    stages: int
    microbatches: int
    repeats: int = 1

    @property
    def ticks(self) -> int:
        """Applications of a piece of the stack, one after the other, until the last microbatch is through."""
        return self.repeats * self.microbatches + self.stages - 1

    @property
    def idle(self) -> float:
        """Share of ticks in which a stage has nothing to do."""
        return (self.stages - 1) / self.ticks


def schedule(layout: Layout) -> Schedule:
    """The schedule that a layout asks for."""
    stages = layout.size(AXIS)
    return Schedule(stages, layout.microbatches or stages, layout.repeats)


def planned(layers: int, rows: int, together: int = 1) -> Schedule | None:
    """The schedule of a stack under the active layout.

    None where the stack has to be scanned, each layer's weights gathered from their stage: no stage axis, or
    layers or rows that it does not divide (`legal.check` refuses those for training).

    Args:
      together: rows that follow each other and must stay in one microbatch.
    """
    layout = active()
    if layout is None or layout.size(AXIS) == 1:
        return None
    plan = schedule(layout)
    pieces = plan.stages * plan.repeats
    shares = plan.microbatches * batch_shards(layout.mesh) * together
    fits = together and layers % pieces == 0 and rows % shares == 0 and plan.microbatches % plan.stages == 0
    return plan if fits else None


def run(
    apply: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any, Any]],
    stacked: Any,
    x: jax.Array,
    context: Any,
    plan: Schedule,
    unroll: int = 1,
) -> tuple[jax.Array, Any, Any]:
    """x after all layers of the stack, and what each layer says beside it.

    Args:
      apply: (one layer's leaves, x, context) -> (x, leaves by row [rows, ...], leaves by microbatch [...]), of any
        number of rows. Names of axes in it (`rules.constrain`) mean what they mean without a pipeline.
      stacked: leaves [N, ...]: parameters, and whatever else differs between layers, such as their number.
      x: [B, ...]. Its sharding, shape and dtype are those of the result.
      context: leaves [B, ...] travel with their rows of x; others, such as those [1, ...], all rows share.
      unroll: layers of a piece that are one body of its loop.

    Returns:
      (x [B, ...], by row [N, B, ...], by microbatch [N, ...] as the mean over microbatches).
    """
    rows = _Rows(active(), plan, x.shape[0])
    leaves, structure = jax.tree.flatten(context)
    moving = [i for i, leaf in enumerate(leaves) if leaf.shape[:1] == x.shape[:1]]
    given = [x, *(leaves[i] for i in moving)]
    shared = [leaf for i, leaf in enumerate(leaves) if i not in moving]

    def layer(layer_leaves: Any, values: list[jax.Array], shared: list[jax.Array]) -> tuple[jax.Array, Any, Any]:
        y, *own = [_typed(value, like) for value, like in zip(values, given, strict=True)]
        rest = iter(shared)
        told = jax.tree.unflatten(structure, [own.pop(0) if i in moving else next(rest) for i in range(len(leaves))])
        return apply(layer_leaves, y, told)

    each = jax.vmap(jax.vmap(layer, spmd_axis_name=rows.apart or None), spmd_axis_name=AXIS)
    each = _under(rows.layout.within(rows.apart), each)
    pieces, shared = jax.tree.map(rows.dealt, stacked), [rows.everywhere(leaf) for leaf in shared]

    def work(turn: jax.Array, values: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        """All stages apply the piece of their turn to their rows."""

        def one(y: jax.Array, layer_leaves: Any) -> tuple[jax.Array, Any]:
            y, *said = each(layer_leaves, [y, *values[1:]], shared)
            return y, tuple(said)

        piece = jax.tree.map(lambda leaf: _chosen(leaf, turn), pieces)
        y, said = jax.lax.scan(one, values[0], piece, unroll=min(unroll, jax.tree.leaves(piece)[0].shape[0]))
        return [y, *values[1:]], said

    if plan.repeats > 1:
        # Or every tick would keep the weights that it took, for the backward pass.
        work = jax.checkpoint(work, policy=_all_but_taken_from(pieces), prevent_cse=False)
    y, said = _loop(work, [rows.cut(_plain(leaf)) for leaf in given], plan, rows)
    by_row, by_batch = jax.tree.map(rows.collected, said)
    by_batch = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=(1, 2)).astype(leaf.dtype), by_batch)
    y = rows.ordered(y.reshape(1, plan.microbatches, *y.shape[2:]))[0]
    return rows.spread(y), jax.tree.map(rows.ordered, by_row), by_batch


def _under(layout: Layout, fn: Callable) -> Callable:
    """fn with `layout` active, also where its gradient is made, which is long after `fn` has returned."""

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        with use(layout):
            return fn(*args)

    def forward(*args: Any) -> tuple[Any, Callable]:
        with use(layout):
            return jax.vjp(fn, *args)

    def backward(pull: Callable, cotangent: Any) -> Any:
        with use(layout):
            return pull(cotangent)

    run.defvjp(forward, backward)
    return run


def _loop(work: Callable, values: list, plan: Schedule, rows: _Rows) -> tuple[jax.Array, Any]:
    """All ticks: (x as a stream [S, M / S, ...] in its first order, what was said in each tick [T, n, S, ...]).

    A microbatch waits M - S ticks between its rounds: as long as a buffer of M / S - 1 columns takes to move it
    over S stages.
    """
    columns = plan.microbatches // plan.stages
    held = columns - 1 if plan.repeats > 1 else 0
    number = jnp.arange(plan.stages)

    def at_stage(wanted: jax.Array | int, new: list, old: list) -> list:
        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where((number == wanted).reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(chosen, new, old)

    def read(stream: list, column: jax.Array) -> list:
        return [buffer[:, column] for buffer in stream]

    def moved(stream: list, column: jax.Array, done: list) -> list:
        """The stream with one column a stage nearer to the first, and in it at the last stage what that has done."""
        nearer = [jnp.roll(values, -1, axis=0) for values in read(stream, column)]
        added = at_stage(plan.stages - 1, done, nearer)
        return [rows.pinned(b.at[:, column].set(new), 2) for b, new in zip(stream, added, strict=True)]

    def tick(carry: tuple, t: jax.Array) -> tuple[tuple, Any]:
        state, stream, waiting = carry
        entering = at_stage(jnp.where(t < plan.microbatches, 0, -1), read(stream, t % columns), state)
        state = [rows.pinned(values, 1) for values in entering]
        turn = jnp.clip((t - number) // plan.microbatches, 0, plan.repeats - 1)
        done, said = work(turn, state)
        stream = moved(stream, t % columns, done)
        state = [jnp.roll(values, 1, axis=0) for values in done]
        if held:
            state = at_stage(0, read(waiting, t % held), state)
            waiting = moved(waiting, t % held, done)
        return ([rows.pinned(values, 1) for values in state], stream, waiting), said

    # Idle stages work on real rows too, whose results nobody reads: finite numbers, also in the backward pass.
    start = [value[:, 0] for value in values]
    waiting = [value[:, :held] for value in values] if held else []
    (_, stream, _), said = jax.lax.scan(tick, (start, values, waiting), jnp.arange(plan.ticks))
    return jnp.roll(stream[0], 1 - plan.stages, axis=1), said


def _chosen(leaf: jax.Array, turn: jax.Array) -> jax.Array:
    """leaf [R, n, S, G, ...] at `turn` [S] of each stage: [n, S, G, ...]."""
    if leaf.shape[0] == 1:
        return leaf[0]
    return jnp.take_along_axis(leaf, turn.reshape(1, 1, -1, *[1] * (leaf.ndim - 3)), axis=0)[0]


def _all_but_taken_from(pieces: Any) -> Callable[..., bool]:
    """A remat policy: keep everything but what `_chosen` reads."""
    all_turns = {leaf.shape for leaf in jax.tree.leaves(pieces)}
    steps = {"gather": all_turns, "squeeze": {(1, *rest) for _, *rest in all_turns}}
    return lambda primitive, *read, **_: primitive.name not in steps or read[0].shape not in steps[primitive.name]


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: jax.Array) -> jax.Array:
    """Random keys as the integers they are."""
    return jax.random.key_data(x) if _is_key(x) else x


def _typed(x: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if _is_key(like) else x


@dataclass(frozen=True)
class _Rows:
    """Which rows and layers lie where. Nothing moves when rows are cut: each batch shard cuts its own."""

    layout: Layout
    plan: Schedule
    number: int

    def axes(self, among: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in among if self.layout.size(axis) > 1)

    @property
    def apart(self) -> tuple[str, ...]:
        """Mesh axes on which weights are whole: their G groups of batch shards work apart."""
        return self.axes(("data", "fsdp") if self.layout.zero == 1 else ("data",))

    @property
    def groups(self) -> int:
        return math.prod(self.layout.size(axis) for axis in self.apart)

    def placed(self, x: jax.Array, *axes: Any) -> jax.Array:
        """x with its first dimensions pinned; the others stay free."""
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, PartitionSpec(*axes, *free)))

    def pinned(self, x: jax.Array, front: int) -> jax.Array:
        """x [S, ..., G, rows, ...] with `front` dimensions before G."""
        together = tuple(axis for axis in self.axes(BATCH_AXES) if axis not in self.apart)
        return self.placed(x, AXIS, *[None] * (front - 1), self.apart or None, together or None)

    def spread(self, x: jax.Array) -> jax.Array:
        """x [B, ...] with its rows cut over the stages as well."""
        return self.placed(x, self.axes(ROW_AXES))

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [S, M / S, G, B / (M G), ...]: microbatch s M / S + j is (s, j)."""
        shards, (s, m) = batch_shards(self.layout.mesh), (self.plan.stages, self.plan.microbatches)
        x = jnp.moveaxis(x.reshape(shards, s, m // s, -1, *x.shape[1:]), 0, 2)
        return self.pinned(x.reshape(s, m // s, self.groups, -1, *x.shape[4:]), 2)

    def ordered(self, x: jax.Array) -> jax.Array:
        """[N, M, G, B / (M G), ...] -> [N, B, ...]: `cut` undone."""
        x = x.reshape(*x.shape[:2], batch_shards(self.layout.mesh), -1, *x.shape[4:])
        return jnp.moveaxis(x, 2, 1).reshape(x.shape[0], self.number, *x.shape[4:])

    def collected(self, x: jax.Array) -> jax.Array:
        """What was said in each tick, [T, n, S, G, ...], as [N, M, G, ...]: idle ticks left out."""
        s, m, r = self.plan.stages, self.plan.microbatches, self.plan.repeats
        own = jax.vmap(
            lambda said, first: jax.lax.dynamic_slice_in_dim(said, first, r * m), (2, 0), spmd_axis_name=AXIS
        )(x, jnp.arange(s))
        own = jnp.moveaxis(own.reshape(s, r, m, *own.shape[2:]), (1, 0, 3, 2), range(4))
        return own.reshape(-1, *own.shape[3:])

    def dealt(self, x: jax.Array) -> jax.Array:
        """Leaves [N, ...] of a stack, N / S layers on each stage, as [R, n, S, G, ...]: the pieces of each stage."""
        s, r = self.plan.stages, self.plan.repeats
        x = x.reshape(s * r, -1, *x.shape[1:])
        if r > 1:
            x = _dealt(x, s, r, self.layout.mesh)
        return self.copied(jnp.moveaxis(x.reshape(s, r, *x.shape[1:]), 0, 2), front=2)

    def everywhere(self, x: jax.Array) -> jax.Array:
        """A copy of x for each stage and group, [S, G, ...]."""
        return self.copied(jnp.broadcast_to(x, (self.plan.stages, *x.shape)), front=0)

    def copied(self, x: jax.Array, front: int) -> jax.Array:
        """A copy of x [..., S, ...] for each group, [..., S, G, ...], with `front` dimensions before S.

        Its gradient stays where it is made until it is summed over the copies, once, after all ticks.
        """
        copies = (*x.shape[: front + 1], self.groups, *x.shape[front + 1 :])
        x = jnp.broadcast_to(jnp.expand_dims(x, front + 1), copies)
        return self.placed(x, *[None] * front, AXIS, self.apart or None)


def rounds(s: int, r: int) -> list[list[int]]:
    """How R pieces on each of S stages change places: [round][stage] is the piece that this stage sends.

    Stage q holds pieces q R to q R + R - 1 and gets q, q + S, ...: in each round every stage sends one piece and
    receives one. Piece p travels in round (p + p // lcm(R, S)) mod R. Of one sender these are R numbers in a row; of
    one receiver R / gcd(R, S) that are equal modulo gcd(R, S), moved on by one from one run of lcm(R, S) pieces to
    the next.
    """
    out = [[-1] * s for _ in range(r)]
    for p in range(s * r):
        out[(p + p // math.lcm(r, s)) % r][p // r] = p
    return out


def _dealt(x: jax.Array, s: int, r: int, mesh: Mesh) -> jax.Array:
    """Pieces [S R, ...] in the order of the stack, to place q R + k the piece k S + q: to stage q its turns.

    Written out, because the compiler would gather all of them.
    """

    def deal(own: jax.Array, stage: jax.Array) -> jax.Array:
        out = own
        for sent in rounds(s, r):
            piece = jax.lax.dynamic_index_in_dim(own, jnp.asarray([p % r for p in sent])[stage[0]])
            got = jax.lax.ppermute(piece, AXIS, [(sender, p % s) for sender, p in enumerate(sent)])
            turn = jnp.asarray([p // s for p in sorted(sent, key=lambda p: p % s)])[stage[0]]
            out = jax.lax.dynamic_update_slice_in_dim(out, got, turn, 0)
        return out

    where = PartitionSpec(AXIS)
    return jax.shard_map(deal, mesh=mesh, in_specs=(where, where), out_specs=where, axis_names={AXIS}, check_vma=False)(
        x, jnp.arange(s)
    )
