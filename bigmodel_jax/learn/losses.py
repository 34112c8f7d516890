"""Cross-entropy as a sum, without ever holding all logits.

Training needs d loss / d hidden and d loss / d head, never the logits themselves. So the logits
of one chunk of positions are made, turned into that chunk's loss *and gradient*, and dropped; the
backward pass only scales what the forward pass left. Memory is rows x chunk x V instead of
rows x length x V, and the head matmul is not computed a second time as it would be under remat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigmodel_jax.parallel import rings, rules
from bigmodel_jax.parallel.pieces import Pieces, pieces

Head = Callable[[jax.Array], jax.Array]
Sums = dict[str, jax.Array]


def cross_entropy(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """Weighted sum of softmax cross-entropies, in float32 or better.

    With s = label_smoothing and Z = logsumexp(logits), a position costs
        (1 - s) (Z - logit[target]) + s (Z - mean(logits)) + z_loss Z^2
    (z-loss: PaLM, Chowdhery et al. 2022, section 5; smoothing: Szegedy et al. 2016).

    Args:
      hidden: [..., L, D], or [..., D] with one dimension in front (then it is one chunk).
      head: a pytree (`jax.tree_util.Partial`) whose call maps [..., D] to logits [..., V].
      targets: integers shaped like `hidden` without D. Any value where the weight is 0.
      weights: same shape; 0 leaves a position out.
      chunk: positions of L whose logits exist at a time, on each device of those that the length is cut
        over; 0 or >= L means all of them.

    Returns:
      loss_sum, and {"nll": sum of w (Z - logit[target]) in nats, "accuracy": sum of w where the
      target is the first largest logit, "z": sum of w Z^2}. Only loss_sum is differentiable, in
      `hidden` and in the float leaves of `head`.
    """
    if hidden.ndim == 2:
        hidden, targets, weights = hidden[:, None], targets[:, None], weights[:, None]
    length = hidden.shape[-2]
    flat = (hidden.reshape(-1, length, hidden.shape[-1]), targets.reshape(-1, length))
    weights = jax.lax.stop_gradient(weights).reshape(-1, length)
    size = length if chunk <= 0 else min(chunk, length)
    leaves, structure = jax.tree.flatten(head)
    return _cross_entropy((structure, size, z_loss, label_smoothing), flat[0], leaves, flat[1], weights)


def _sums(
    z_loss: float, smooth: float, logits: jax.Array, targets: jax.Array, w: jax.Array, hold: bool = False
) -> tuple:
    """Loss sums of one chunk, and d loss / d logits as a function that makes it (then `hold`)."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits, w = logits.astype(dtype), w.astype(dtype)
    vocab = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    e = jnp.exp(logits - top)
    if hold:
        # One exp for sum and gradient: on CPU a second one costs more than this buffer of [b, c, V].
        e = jax.lax.optimization_barrier(e)
    total = jnp.sum(e, axis=-1, keepdims=True)
    z = (jnp.log(total) + top)[..., 0]
    hit = jnp.arange(vocab) == targets[..., None]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    nll = z - chosen
    loss = nll
    if smooth:
        loss = (1 - smooth) * nll + smooth * (z - jnp.mean(logits, axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(z)
    # Equal to argmax == target, ties included, and several times faster on CPU.
    earlier = jnp.any((logits >= chosen[..., None]) & (jnp.arange(vocab) < targets[..., None]), -1)
    correct = (chosen >= top[..., 0]) & ~earlier
    aux = {
        "nll": jnp.sum(w * nll),
        "accuracy": jnp.sum(w * correct),
        "z": jnp.sum(w * jnp.square(z)),
    }

    def gradient() -> jax.Array:
        p = e * (((1 + 2 * z_loss * z) * w)[..., None] / total)
        return p - jnp.where(hit, ((1 - smooth) * w)[..., None], 0) - (smooth / vocab) * w[..., None]

    return (jnp.sum(w * loss), aux), gradient


def token_losses(hidden: jax.Array, head: Head, targets: jax.Array, *, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """(nats [B, L], whether the target is the most likely token [B, L]) per token, for evaluation.

    Logits of `chunk` positions are held at a time (0: of all). Ties count as in `cross_entropy`.
    """
    length = hidden.shape[1]
    size = length if chunk <= 0 else min(chunk, length)

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t = part
        logits = _wide(head(h))
        chosen = jnp.take_along_axis(logits, t[..., None], axis=-1, mode="clip")
        before = jnp.arange(logits.shape[-1]) < t[..., None]
        beaten = jnp.any((logits > chosen) | ((logits == chosen) & before), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0], ~beaten

    if size == length:
        return one((hidden, targets))
    cut = pieces(*targets.shape, rules.ROW_AXES)
    with rules.use(None):  # as in _loop
        found = jax.lax.map(one, (_split(hidden, cut, size), _split(targets, cut, size)))
    return tuple(_join(x, cut, length) for x in found)


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _chunk_loss(static: tuple, h: jax.Array, leaves: list, t: jax.Array, w: jax.Array) -> tuple:
    """Sums of one chunk: h [b, c, D] -> (loss, aux)."""
    structure, _, z_loss, smooth = static
    logits = jax.tree.unflatten(structure, leaves)(h)
    return _sums(z_loss, smooth, logits, t, w)[0]


def _chunk_loss_and_grads(static: tuple, h: jax.Array, leaves: list, t: jax.Array, w: jax.Array) -> tuple:
    """Sums of one chunk and its gradients: in `h`, and in the float leaves (None for others)."""
    structure, _, z_loss, smooth = static

    def logits_of(h: jax.Array, floats: list) -> jax.Array:
        merged = [x if f is None else f for x, f in zip(leaves, floats, strict=True)]
        return jax.tree.unflatten(structure, merged)(h)

    floats = [leaf if _is_float(leaf) else None for leaf in leaves]
    logits, pull = jax.vjp(logits_of, h, floats)
    sums, gradient = _sums(z_loss, smooth, logits, t, w, hold=True)
    dh, dleaves = pull(gradient().astype(logits.dtype))
    return sums, dh, dleaves


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _split(x: jax.Array, cut: Pieces, size: int) -> jax.Array:
    """[B, L, ...] -> [chunks, pieces, B / rows, size, ...], each piece's tail filled with zeros."""
    x = cut.split(x)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)


def _join(x: jax.Array, cut: Pieces, length: int) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 2)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    return cut.join(x[:, :, : length // cut.lengths])


def _loop(static: tuple, fn: Callable[..., tuple], hidden: jax.Array, leaves: list, *rest: jax.Array) -> tuple:
    """Run `fn` chunk by chunk; sums and head gradients are added up, hidden gradients joined.

    On a mesh every shard of the batch and of the length gets its own copy of the head, so that the head is
    gathered once before the loop and its gradient reduced once after it, not once per chunk.
    """
    rows, length, _ = hidden.shape
    if static[1] == length:
        sums, *grads = fn(static, hidden, leaves, *rest)
        return sums, grads
    cut = pieces(rows, length, rules.ROW_AXES)
    size = min(static[1], length // cut.lengths)
    width = hidden.shape[-1]
    own = [rings.spread(x, cut, width) for x in leaves]
    xs = tuple(_split(x, cut, size) for x in (hidden, *rest))

    def body(carry: tuple, x: tuple) -> tuple[tuple, Any]:
        with rules.use(None):  # the pieces are the batch sharding; inner names must not redo it
            sums, *grads = jax.vmap(fn, (None, 0, 0, 0, 0))(static, x[0], own, *x[1:])
        dh, dleaves = grads if grads else (None, [])
        added = jax.tree.map(lambda c, n: c + n.astype(c.dtype), carry, (sums, dleaves))
        return (added[0], cut.pin(added[1])), dh

    out = jax.eval_shape(lambda: _chunk_shapes(static, fn, own, xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), out)
    (sums, dleaves), dh = jax.lax.scan(body, (zeros[0], cut.pin(zeros[1])), xs)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    if dh is None:
        return sums, []
    pairs = zip(dleaves, leaves, strict=True)
    total = [None if g is None else rings.total(g, cut, width, x.dtype) for g, x in pairs]
    return sums, [_join(dh, cut, length), total]


def _chunk_shapes(static: tuple, fn: Callable[..., tuple], own: list, xs: tuple) -> tuple:
    """(sums, head gradients) of one chunk, for `jax.eval_shape`."""
    first = [x[0] for x in xs]
    sums, *grads = jax.vmap(fn, (None, 0, 0, 0, 0))(static, first[0], own, *first[1:])
    return sums, grads[1] if grads else []


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    static: tuple, hidden: jax.Array, leaves: list, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Sums]:
    def fn(*args: Any) -> tuple:
        return (_chunk_loss(*args),)

    return _loop(static, fn, hidden, leaves, targets, weights)[0]


def _forward(static: tuple, hidden: jax.Array, leaves: list, targets: jax.Array, weights: jax.Array) -> tuple:
    sums, (dh, dleaves) = _loop(static, _chunk_loss_and_grads, hidden, leaves, targets, weights)
    return sums, (dh, dleaves, leaves)


def _backward(static: tuple, residuals: tuple, cotangent: tuple) -> tuple:
    dh, dleaves, leaves = residuals
    scale = cotangent[0]

    def scaled(gradient: jax.Array | None, like: jax.Array) -> jax.Array | None:
        return None if gradient is None else (_wide(gradient) * scale).astype(like.dtype)

    return (
        scaled(dh, dh),
        [scaled(g, x) for g, x in zip(dleaves, leaves, strict=True)],
        None,
        None,
    )


_cross_entropy.defvjp(_forward, _backward)
