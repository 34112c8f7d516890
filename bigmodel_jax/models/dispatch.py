"""Dropless experts on several devices: each choice travels to the device that holds its expert, and back.

Shapes: T tokens of this device, k experts per token, E experts, S devices that share them out, R room for the
choices of one device on another, D model.

bounded  one all-to-all of fixed shape [S, R, D] each way; runs everywhere
ragged   jax.lax.ragged_all_to_all: only what was chosen travels, into a buffer of S R rows; TPU only

With R = T k no choice is ever dropped, and the result does not depend on the layout. A smaller R (the layout's
`room`) drops the choices that find none, and says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bigmodel_jax.models import routing
from bigmodel_jax.parallel.expert import Exchange

Act = Callable[[jax.Array | None, jax.Array], jax.Array]


def grouped(x: jax.Array, ids: jax.Array, weights: Sequence[jax.Array], act: Act) -> jax.Array:
    """Each row of x [n, D] through its expert ids [n]; a row of no expert (ids = E) gives 0.

    Args:
      weights: (gate,) up [E, D, F] and out [E, F, D].
      act: (gate or None, up) -> hidden.
    """
    slot, back, sizes = routing.sorted_places(ids, weights[0].shape[0])
    x = routing.permute(x[None], back[None], slot[None])[0]
    h = [product(x, weight, sizes) for weight in weights[:-1]]
    y = product(act(*([None] * (2 - len(h)) + h)), weights[-1], sizes)
    return routing.permute(y[None], slot[None], back[None])[0]


def _batched(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """fn under any number of vmaps: batches of one are taken off, others become one batch.

    XLA has kernels for grouped products without a batch, and jax (0.10 to 0.12) cannot batch one twice.
    """
    one, many = jax.custom_batching.custom_vmap(fn), jax.custom_batching.custom_vmap(jax.vmap(fn))

    def whole(size: int, batched: Sequence[bool], args: Sequence[jax.Array]) -> list[jax.Array]:
        return [x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(args, batched, strict=True)]

    @one.def_vmap
    def _(size, batched, *args):
        args = whole(size, batched, args)
        return (one(*(x[0] for x in args))[None] if size == 1 else many(*args)), True

    @many.def_vmap
    def _(size, batched, *args):
        args = whole(size, batched, args)
        y = many(*(x.reshape(-1, *x.shape[2:]) for x in args))
        return y.reshape(size, -1, *y.shape[1:]), True

    return one


_TO_WEIGHTS = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
_product = _batched(lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes))
_gradient = _batched(lambda x, g, sizes: jax.lax.ragged_dot_general(x, g, sizes, _TO_WEIGHTS))


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [n, D], the first sizes[0] rows times w[0], the next sizes[1] times w[1], ...; w [E, D, F], sizes [E]."""
    return _product(x, w, sizes)


def _product_forward(x, w, sizes):
    return _product(x, w, sizes), (x, w, sizes)


def _product_backward(saved, g):
    x, w, sizes = saved
    return _product(g, jnp.swapaxes(w, 1, 2), sizes), _gradient(x, g, sizes), None


product.defvjp(_product_forward, _product_backward)


def dispatched(
    exchange: Exchange, rows: Sequence[jax.Array], weights: Sequence[jax.Array], *, act: Act, number: int
) -> tuple[jax.Array, jax.Array]:
    """(what the experts give for this device's tokens [b, l, D], how many of its choices each token got [b, l]).

    Args:
      rows: x [b, l, D], experts [b, l, k], their weights [b, l, k], real [b, l] (0 at padding, which stays).
      weights: of this device's experts, as `grouped` takes them.
      number: E.
    """
    x, experts, shares, real = rows
    (b, length, dim), k = x.shape, experts.shape[-1]
    tokens = b * length
    x, experts = x.reshape(tokens, dim), experts.reshape(tokens, k)
    experts = jnp.where(real.reshape(tokens, 1) > 0, experts, number)
    travel = _ragged if exchange.kind == "ragged" else _bounded
    y, kept = travel(exchange, x, experts, weights, act, number // exchange.size, exchange.room(tokens * k))
    y = jnp.einsum("tkd,tk->td", y.reshape(tokens, k, dim), shares.reshape(tokens, k))
    kept = jnp.sum(kept.reshape(b, length, k), axis=-1, dtype=real.dtype)
    return exchange.join(y).reshape(b, length, dim), kept


def _bounded(exchange: Exchange, x, experts, weights, act: Act, own: int, room: int) -> tuple[jax.Array, jax.Array]:
    """(results of all choices [T k, D], 0 where dropped; which were served [T k])."""
    size, (tokens, k) = exchange.size, experts.shape
    real = experts[:, :1] < own * size
    slot, back = routing.places((experts // own)[None], real[:, 0][None], size, room)
    copies = jnp.repeat(x, k, axis=0)[None]
    sent = routing.permute(copies, back, slot)[0].reshape(size, room, -1)
    flat = jnp.append(experts.reshape(-1) % own, own)
    ids = flat[jnp.minimum(back[0], tokens * k)].reshape(size, room)
    got = exchange.swap(sent).reshape(size * room, -1)
    y = grouped(got, exchange.swap(ids).reshape(-1), weights, act)
    home = exchange.swap(y.reshape(size, room, -1)).reshape(1, size * room, -1)
    return routing.permute(home, slot, back)[0], slot[0] < size * room


def _ragged(exchange: Exchange, x, experts, weights, act: Act, own: int, room: int) -> tuple[jax.Array, jax.Array]:
    """As `_bounded`; R bounds what a device receives from all together, S R rows."""
    size, k, limit = exchange.size, experts.shape[1], exchange.size * room
    slot, back, counts = routing.sorted_places(experts, own * size)
    sorted_rows = routing.permute(jnp.repeat(x, k, axis=0)[None], back[None], slot[None])[0]
    counts = exchange.all(counts)  # [from, E]
    asked = counts.reshape(size, size, own).sum(-1)  # [from, to]
    first = _before(asked, 0)  # where on `to` the rows of `from` begin
    fits = jnp.clip(limit - first, 0, asked)
    taken = _before(asked, 1)  # where among the rows of `from` those for `to` begin
    me = exchange.index()
    into = jnp.zeros((limit, x.shape[1]), x.dtype)
    got = exchange.ragged(sorted_rows, into, taken[me], fits[me], jnp.minimum(first[me], limit), fits[:, me])
    ids = _ids(jnp.take(counts.reshape(size, size, own), me, axis=1), fits[:, me], first[:, me], limit)
    y = grouped(got, ids, weights, act)
    begin = jnp.minimum(first[:, me], limit)
    home = exchange.ragged(y, jnp.zeros_like(sorted_rows), begin, fits[:, me], taken[:, me], fits[me])
    flat = experts.reshape(-1)
    to = jnp.minimum(flat // own, size - 1)
    served = (flat < own * size) & (slot - taken[me][to] < fits[me][to])
    return routing.permute(home[None], slot[None], back[None])[0], served


def _before(x: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(x, axis=axis) - x


def _ids(counts: jax.Array, fits: jax.Array, first: jax.Array, limit: int) -> jax.Array:
    """This device's expert of each received row [limit]; own for a row that nobody sent.

    Args:
      counts: choices of each of this device's experts by sender [S, own], in whose order a sender's rows come.
      fits, first: how many rows of each sender came, and where they begin [S].
    """
    at = jnp.arange(limit)
    sender = jnp.minimum(jnp.searchsorted(jnp.cumsum(fits), at, side="right"), len(fits) - 1)
    ends = jnp.cumsum(counts, axis=1)[sender]
    expert = jnp.sum(ends <= (at - first[sender])[:, None], axis=1)
    return jnp.where(at < jnp.sum(fits), expert, counts.shape[1])
