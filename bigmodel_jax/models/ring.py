"""Attention over a length that is cut over devices (parallel/context.py has the orders and exchanges).

Shapes: B batch, L queries, M keys, H heads, G key-value groups, R = H / G, K head dim; C devices of the context axis.

ring      keys and values travel around the devices while each attends with its own queries and merges what it finds
          (Liu et al. 2023). Each device holds L / C of everything, and one tile of scores at a time.
ulysses   length and heads change places before and after (Jacobs et al. 2023); between, any backend attends. Keys
          and values of fewer groups than devices are repeated, only as often as it takes.

The arithmetic of the ring is that of models/blockwise.py on every platform: jax's splash kernel for TPU does not
give the sums that partial results are merged by through its public interface, nor does cuDNN's in jax 0.10. Ulysses
runs both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from bigmodel_jax.models import blockwise
from bigmodel_jax.models.masks import Mask
from bigmodel_jax.models.scores import Part, Rule
from bigmodel_jax.parallel import context, rules

BACKENDS = ("auto", "blockwise")  # of those in attention.py, what the ring computes
HEADS = ("batch", "length", "heads", "head_dim")


def crossing(q: jax.Array, k: jax.Array, mask: Mask, has_bias: bool) -> str:
    """How these queries meet keys on other devices: "ring", "ulysses", or "" where each device can have all keys.

    "" is the answer without a context axis, for a length that it does not divide (a single query, evaluation of odd
    lengths), for keys of a cache that held some before, and in a ring for an array of biases, which is quadratic in
    the length anyway: the compiler then gathers keys and values.
    """
    way, devices = context.way(), context.size()
    if not way or mask.parts() & {"kv_length", "offset"} or q.shape[1] % devices or k.shape[1] % devices:
        return ""
    if way == "ulysses":
        return way if q.shape[2] % (devices * _cut(_places(q)[2])) == 0 else ""
    return "" if has_bias else way


def balances(mask: Mask, length: int, backend: str) -> bool:
    """Whether rows of this length are better stored in zigzag order: in a ring, under a causal mask without a window.

    With a window every query sees as much as the others, and in natural order few hops reach it all. A cache is in
    natural order, and so are the keys that a prefix shows to all.
    """
    if context.way() != "ring" or length % (2 * context.size()) or backend not in BACKENDS:
        return False
    return mask.parts() <= {"causal", "segments_q"} and mask.causal


def _places(x: jax.Array) -> list[Any]:
    """Mesh axes of each dimension of x [B, L, H, K]."""
    layout = rules.active()
    found = list(rules.spec(HEADS, x.shape, layout.mesh, layout.rules))
    return found + [None] * (4 - len(found))


def _cut(axes: Any) -> int:
    """Pieces that these mesh axes make."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(rules.active().size(name) for name in names)


def shared(k: jax.Array, heads: int, ways: int) -> jax.Array:
    """k [B, M, G, K] with each group repeated until `ways` divides them, no further."""
    groups = k.shape[2]
    each = heads // groups
    times = next(r for r in range(1, each + 1) if each % r == 0 and groups * r % ways == 0)
    return jnp.repeat(k, times, axis=2) if times > 1 else k


def ring(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, keys: jax.Array | None, rule: Rule) -> jax.Array:
    """Attention of q [B, L, H, K] over k, v [B, M, G, K], both lengths cut over the context axis.

    Everything that has a length is stored in zigzag order where the mask says so, else in natural order.
    """
    ways = _cut(_places(q)[2])
    return _ring(q, shared(k, q.shape[2], ways), shared(v, q.shape[2], ways), mask, keys, rule)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q, k, v, mask: Mask, keys, rule: Rule) -> jax.Array:
    return _forward(q, k, v, mask, keys, rule)[0]


def _forward(q, k, v, mask: Mask, keys, rule: Rule):
    heads = PartitionSpec(*_places(q))
    fn = functools.partial(_local_forward, _tour(q, k, mask), rule, q.shape[2])
    out, lse = _on_each_device(fn, q, (q, k, v), mask, keys, results=(heads, PartitionSpec(*heads[:3])))
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, mask, keys, out, lse)


def _backward(rule: Rule, saved, d_out):
    q, k, v, mask, keys, out, lse = saved
    heads = PartitionSpec(*_places(q))
    fn = functools.partial(_local_backward, _tour(q, k, mask), rule, q.shape[2])
    found = _on_each_device(fn, q, (q, k, v, out, lse, d_out), mask, keys, results=(heads, heads, heads))
    return *found, None, None


_ring.defvjp(_forward, _backward)


def _numbers(q: jax.Array) -> jax.Array:
    """Of the heads: cut like them, they tell a device which it has."""
    return jnp.arange(q.shape[2], dtype=jnp.int32)


def _on_each_device(fn, q: jax.Array, arrays: tuple, mask: Mask, keys, results) -> Any:
    """fn(numbers of the heads, mask, keys, *arrays), each device with its rows, length and heads of all."""
    places = _places(q)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: PartitionSpec(*places[: x.ndim]), tree)

    args = (_numbers(q), mask, keys, *arrays)
    ins = (PartitionSpec(places[2]), *(place(arg) for arg in args[1:]))
    mesh = rules.active().mesh
    return jax.shard_map(fn, mesh=mesh, in_specs=ins, out_specs=results, check_vma=False)(*args)


def _tour(q: jax.Array, k: jax.Array, mask: Mask) -> context.Round:
    """The way around the ring under this mask."""
    far = mask.window - 1 if mask.window else context.FAR
    low = 0 if mask.causal and mask.prefix is None else -far
    return context.Round(context.size(), mask.zigzag, q.shape[1], k.shape[1], low, far)


@dataclasses.dataclass(frozen=True)
class _Share:
    """What a device knows of the attention that all do together. heads: of the whole; head: the first one here."""

    tour: context.Round
    rule: Rule
    heads: int
    head: jax.Array
    mask: Mask
    keys: jax.Array | None

    def block(self, k: jax.Array, v: jax.Array) -> dict[str, Any]:
        """What travels: keys and values [B, G, M / C, K], and their segments."""
        segments = self.mask.segments_q if self.mask.segments_kv is None else self.mask.segments_kv
        return {"k": jnp.swapaxes(k, 1, 2), "v": jnp.swapaxes(v, 1, 2), "segments": segments}

    def piece(self, x: jax.Array, number: Any, axis: int) -> jax.Array:
        size = x.shape[axis] // (1 + self.tour.zigzag)
        return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)

    def replaced(self, x: jax.Array, piece: jax.Array, number: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, piece, number * piece.shape[axis], axis)

    def meeting(self, turn: context.Turn, hop: Any, block: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the arithmetic for the keys of a block that has come `hop` places."""
        tour, mask = self.tour, self.mask
        queries, keys = turn.chosen(hop)
        own = isinstance(hop, int) and hop == 0 and turn.fixed is not None and queries == keys
        me = context.index()
        i = tour.first(me, queries, tour.length)
        j = tour.first((me - hop) % tour.devices, keys, tour.memory)
        seen = {}
        if mask.segments_q is not None:
            seen["segments_q"] = self.piece(mask.segments_q, queries, 1)
            seen["segments_kv"] = self.piece(block["segments"], keys, 1)
        if not turn.whole or self.rule.alibi or mask.prefix is not None:
            seen |= {"causal": mask.causal, "window": mask.window, "offset": None if own else (i - j)[None]}
            seen["prefix"] = None if mask.prefix is None else mask.prefix - j
        k, v = (self.piece(block[name], keys, 2) for name in "kv")
        part = Part(self.heads, tour.memory, self.head, i, j)
        # Only against its own keys does what a query sees depend on where it is in the piece.
        unrolled = blockwise.UNROLLED // (1 + tour.zigzag) if own else 1
        return {"k": k, "v": v, "mask": Mask(**seen), "keys": self.keys, "part": part, "rule": self.rule,
                "unrolled": unrolled}  # fmt: skip


def _when(turn: context.Turn, hop: Any, fn: Callable[[Any], Any], state: Any) -> Any:
    """fn(state) on devices where the pieces of this turn meet."""
    return fn(state) if turn.always else jax.lax.cond(turn.here(hop), fn, lambda kept: kept, state)


def _local_forward(tour, rule, heads, numbers, mask, keys, q, k, v):
    """(out [B, L / C, H, K] in q's dtype, log-sum-exp of all scores [B, L / C, H])."""
    share = _Share(tour, rule, heads, numbers[0], mask, keys)
    high = jnp.promote_types(q.dtype, jnp.float32)
    q = blockwise.heads_first(q, k.shape[2])

    def visit(state: tuple, block: Any, hop: Any, hops: Sequence[int]) -> tuple:
        for turn in tour.turns(hops):

            def met(state: tuple, turn: context.Turn = turn) -> tuple:
                at = turn.chosen(hop)[0]
                found = blockwise.forward(share.piece(q, at, 3), dtype=high, **share.meeting(turn, hop, block))
                found = _merged([share.piece(x, at, 3) for x in state], found)
                return tuple(share.replaced(x, new, at, 3) for x, new in zip(state, found, strict=True))

            state = _when(turn, hop, met, state)
        return state

    block, (ahead, behind) = share.block(k, v), tour.hops()
    nothing = (jnp.zeros((*q.shape[:-1], v.shape[-1]), high), jnp.full(q.shape[:-1], -jnp.inf, high))
    state = visit(nothing, block, 0, [0])
    state = context.travel(visit, state, block, ahead)
    out, lse = context.travel(visit, state, block, behind, by=-1)
    return blockwise.heads_last(out).astype(q.dtype), blockwise.heads_last(lse[..., None])[..., 0]


def _merged(a: tuple, b: tuple) -> tuple:
    """(out [..., K], log-sum-exp [...]) of two sets of keys together."""
    top = jnp.maximum(a[1], b[1])
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    shares = [jnp.exp(lse - top) for _, lse in (a, b)]
    total = shares[0] + shares[1]
    some = jnp.where(total > 0, total, 1.0)
    out = sum(x * (share / some)[..., None] for (x, _), share in zip((a, b), shares, strict=True))
    return out, jnp.where(total > 0, jnp.log(some) + top, -jnp.inf)


def _local_backward(tour, rule, heads, numbers, mask, keys, q, k, v, out, lse, d_out):
    """Gradients of q, k and v. Those of a block's keys and values travel with it and come home."""
    share = _Share(tour, rule, heads, numbers[0], mask, keys)
    first = functools.partial(blockwise.heads_first, groups=k.shape[2])
    mine = [first(x) for x in (q, d_out, blockwise.correction(out, d_out))] + [first(lse[..., None])[..., 0]]
    high = lse.dtype

    def visit(state: tuple, block: Any, hop: Any, hops: Sequence[int]) -> tuple:
        for turn in tour.turns(hops):

            def met(state: tuple, turn: context.Turn = turn) -> tuple:
                at, of = turn.chosen(hop)
                own = [share.piece(x, at, 3) for x in mine]
                dq, *sums = blockwise.backward(*own, dtype=high, **share.meeting(turn, hop, block))
                new = zip(state, (dq, *sums), (at, of, of), strict=True)
                return tuple(share.replaced(x, share.piece(x, n, 3) + add, n, 3) for x, add, n in new)

            state = _when(turn, hop, met, state)
        return state

    def arriving(by: int) -> context.Visit:
        return lambda state, *where: visit((state[0], *context.rotate(state[1:], by)), *where)

    block, (ahead, behind) = share.block(k, v), tour.hops()
    nothing = [jnp.zeros((*x.shape[:2], *x.shape[:1:-1]), high) for x in (block["k"], block["v"])]
    state = visit((jnp.zeros(mine[0].shape, high), *nothing), block, 0, [0])
    dq, *sums = context.travel(arriving(1), state, block, ahead)
    sums = context.rotate(sums, -ahead)
    if behind:
        dq, *others = context.travel(arriving(-1), (dq, *nothing), block, behind, by=-1)
        sums = jax.tree.map(jnp.add, sums, context.rotate(others, behind))
    dk, dv = (jnp.transpose(x, (0, 3, 1, 2)).astype(k.dtype) for x in sums)
    return blockwise.heads_last(dq).astype(q.dtype), dk, dv


def ulysses(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, keys: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """attend(q, k, v, mask, bias, keys, part) of some heads over the whole length, on each device."""
    heads = _places(q)
    rows, over = PartitionSpec(heads[0]), context.also(heads[2])
    ways = _cut(over)
    k, v = shared(k, q.shape[2], ways), shared(v, q.shape[2], ways)

    def local(numbers, mask, keys, bias, *qkv):
        own = [context.heads_for_length(x) for x in qkv]
        head = numbers[0] + context.index() * own[0].shape[2]
        with rules.use(None):
            found = attend(*own, mask, bias, keys, Part(q.shape[2], k.shape[1], head))
        return context.length_for_heads(found)

    place = PartitionSpec(*heads)
    biased = None
    if bias is not None:
        rows_of, heads_of = (n > 1 for n in bias.shape[:2])
        biased = PartitionSpec(heads[0] if rows_of else None, over if heads_of else None)
    ins = (PartitionSpec(heads[2]), jax.tree.map(lambda _: rows, mask), rows, biased, place, place, place)
    mesh = rules.active().mesh
    return jax.shard_map(local, mesh=mesh, in_specs=ins, out_specs=place, check_vma=False)(
        _numbers(q), mask, keys, bias, q, k, v
    )
