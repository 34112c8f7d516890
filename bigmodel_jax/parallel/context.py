"""The length cut over the context axis: who holds which piece, what travels, and what meets what.

Two orders of the length. Natural: device c of C holds piece c of C. Zigzag: the length is cut into 2 C pieces, and
device c holds pieces c and 2 C - 1 - c: under a causal mask every device then has the same work at every hop, half of
what there would be without a mask (Liu et al. 2023, ring attention; balanced as in Llama 3, Grattafiori et al. 2024,
section 3.3.2).

In a ring the blocks of keys and values go from device to device by collective-permute. With Ulysses (Jacobs et al.
2023) length and heads change places by all-to-all, and each device attends with some heads over the whole length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax.parallel.rules import active, spec

AXIS = "context"
FAR = 2**30  # no bound on a distance


def size() -> int:
    """Devices that the length is cut over; 1 without a layout."""
    layout = active()
    return 1 if layout is None else layout.size(AXIS)


def way() -> str:
    """How attention crosses the context axis: "ring" or "ulysses"; "" where the length is whole."""
    return active().context if size() > 1 else ""


def also(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of a dimension that the context axis cuts further."""
    return (*((axes,) if isinstance(axes, str) else axes or ()), AXIS)


def holdings(devices: int, zigzag: bool) -> np.ndarray:
    """Numbers of the pieces that each device holds, [C, 1] or, in zigzag order, [C, 2]."""
    first = np.arange(devices)
    return np.stack([first, 2 * devices - 1 - first], 1) if zigzag else first[:, None]


def order(length: int, devices: int) -> np.ndarray:
    """[L]: the index in the row of what zigzag order has at each place."""
    pieces = holdings(devices, True).reshape(-1)
    return np.arange(length).reshape(2 * devices, -1)[pieces].reshape(-1)


def index() -> jax.Array:
    """Number of this device on the context axis; inside shard_map, as all that follows but `zigzag` and `natural`."""
    return jax.lax.axis_index(AXIS)


def rotate(tree: Any, by: int) -> Any:
    """Each device's leaves, handed on to the device `by` places ahead."""
    devices = size()
    places = [(c, (c + by) % devices) for c in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, places), tree) if by % devices else tree


def heads_for_length(x: jax.Array) -> jax.Array:
    """[B, L / C, H, K] -> [B, L, H / C, K]: device c gets the c-th share of the heads."""
    return jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)


def length_for_heads(x: jax.Array) -> jax.Array:
    """The inverse of `heads_for_length`."""
    return jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, tiled=True)


def reordered(ids: jax.Array | None) -> jax.Array | None:
    """[B, L] that every device has whole, in zigzag order. Nothing is sent."""
    return None if ids is None else ids[:, order(ids.shape[1], size())]


def zigzag(x: jax.Array, rows: str = "batch") -> jax.Array:
    """[B, L, ...], cut in natural order, to zigzag order: each half of a device's length goes to one other device.

    rows: logical axis of B.
    """
    return _exchanged(x, rows, True)


def natural(x: jax.Array, rows: str = "batch") -> jax.Array:
    """The inverse of `zigzag`."""
    return _exchanged(x, rows, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _exchanged(x: jax.Array, rows: str, to_zigzag: bool) -> jax.Array:
    layout = active()
    where = spec((rows, "length", *[None] * (x.ndim - 2)), x.shape, layout.mesh, layout.rules)
    fn = _to_zigzag if to_zigzag else _to_natural
    return jax.shard_map(fn, mesh=layout.mesh, in_specs=where, out_specs=where, check_vma=False)(x)


def _exchanged_forward(x: jax.Array, rows: str, to_zigzag: bool) -> tuple[jax.Array, None]:
    return _exchanged(x, rows, to_zigzag), None


def _exchanged_backward(rows: str, to_zigzag: bool, _: None, g: jax.Array) -> tuple[jax.Array]:
    # That of shard_map would be the same, and add up over the axes that the states are whole over.
    return (_exchanged(g, rows, not to_zigzag),)


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _homes() -> list[list[tuple[int, int]]]:
    """Of the first and of the second halves of all devices' rows in natural order: (device, its holder in zigzag)."""
    devices = size()
    home = {int(piece): c for c, held in enumerate(holdings(devices, True)) for piece in held}
    return [[(c, home[2 * c + half]) for c in range(devices)] for half in (0, 1)]


def _to_zigzag(x: jax.Array) -> jax.Array:
    halves = jnp.split(x, 2, axis=1)
    # Even pieces come to even devices as their first piece and to odd devices as their second.
    even, odd = (jax.lax.ppermute(x, AXIS, places) for x, places in zip(halves, _homes(), strict=True))
    return jnp.concatenate(_swapped(even, odd), axis=1)


def _to_natural(x: jax.Array) -> jax.Array:
    halves = _swapped(*jnp.split(x, 2, axis=1))
    back = [[(there, here) for here, there in places] for places in _homes()]
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, p) for x, p in zip(halves, back, strict=True)], axis=1)


def _swapped(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) on devices of even number, (b, a) on those of odd number."""
    even = index() % 2 == 0
    return jnp.where(even, a, b), jnp.where(even, b, a)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One piece of queries against one piece of the visiting keys, on all devices at once but not on all the same.

    pieces: [C devices, C hops, 2], numbers of both among a device's own. meets: bool [C, C], whether they have anything
    to do with each other. always, whole, fixed: after all hops asked about and on all devices they have; every query
    sees every key wherever they have; it is the same two pieces.
    """

    pieces: np.ndarray
    meets: np.ndarray
    always: bool
    whole: bool
    fixed: tuple[int, int] | None

    def chosen(self, hop: Any) -> Sequence[Any]:
        """(piece of queries, piece of keys) of this device: integers where they are fixed."""
        return self.fixed or tuple(jnp.asarray(self.pieces, jnp.int32)[index(), hop % len(self.pieces)])

    def here(self, hop: Any) -> jax.Array:
        """Whether they meet on this device."""
        return jnp.asarray(self.meets)[index(), hop % len(self.meets)]


@dataclasses.dataclass(frozen=True)
class Round:
    """A tour of the blocks of keys around the ring.

    Query i sees key j when low <= i - j <= high (both from the static side of a mask: what else it says can only
    hide more). After hop s device c has the block of device c - s, modulo C.
    """

    devices: int
    zigzag: bool
    length: int
    memory: int
    low: int = -FAR
    high: int = FAR

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [C devices, C hops, P, P]: which pieces meet, and of which every query sees every key."""
        held = holdings(self.devices, self.zigzag)
        rows, cols = self.length // (self.devices * held.shape[1]), self.memory // (self.devices * held.shape[1])
        hop = np.arange(self.devices)
        visiting = held[(hop[:, None] - hop) % self.devices]
        i, j = held[:, None, :, None] * rows, visiting[:, :, None, :] * cols
        least, most = i - (j + cols - 1), i + rows - 1 - j
        return (most >= self.low) & (least <= self.high), (least >= self.low) & (most <= self.high)

    def hops(self) -> tuple[int, int]:
        """Hops forward and backward after which every device has met all it has to do with."""
        needed = self.tables()[0].any((0, 2, 3))
        forward = backward = 0
        while forward + 1 < self.devices and needed[forward + 1]:
            forward += 1
        while backward + forward + 1 < self.devices and needed[self.devices - 1 - backward]:
            backward += 1
        return forward, backward

    def turns(self, hops: Sequence[int]) -> list[Turn]:
        """What is computed after each of `hops`: as few turns as the device needs that meets most."""
        meets, whole = self.tables()
        asked = np.asarray(hops) % self.devices
        pairs = [pair for pair in np.ndindex(meets.shape[2:]) if meets[:, asked, *pair].any()]
        fixed = [pair for pair in pairs if meets[:, asked, *pair].all()]
        rest = [pair for pair in pairs if pair not in fixed]
        groups = [[pair] for pair in fixed]
        if rest:
            groups += [rest] * meets[:, asked][..., *zip(*rest, strict=True)].sum(-1).max()
        out = []
        for number, group in enumerate(groups):
            seen = np.stack([meets[..., *pair] for pair in group])
            own = seen & (np.cumsum(seen, 0) == max(number - len(fixed), 0) + 1)
            pieces = np.asarray(group)[own.argmax(0)]
            met, every = own.any(0), np.stack([whole[..., *pair] for pair in group])
            out.append(Turn(
                pieces, met, bool(met[:, asked].all()), bool((every | ~own)[:, :, asked].all()),
                group[0] if len(group) == 1 else None,
            ))  # fmt: skip
        return out

    def first(self, device: Any, piece: Any, length: int) -> jax.Array:
        """Index in a row of `length` of the first element of a device's piece."""
        held = holdings(self.devices, self.zigzag)
        return jnp.asarray(held * (length // held.size), jnp.int32)[device, piece]


# (state, visiting block, hop, the hops it may be) -> state
Visit = Callable[[Any, Any, Any, Sequence[int]], Any]


def travel(visit: Visit, state: Any, block: Any, hops: int, by: int = 1) -> Any:
    """The state after visits of the blocks of the `hops` devices behind this one (by=-1: ahead of it).

    While one block is visited the next is on its way.
    """
    if not hops:
        return state
    block = rotate(block, by)
    if hops > 1:
        shifts = [by * hop for hop in range(1, hops)]

        def body(carry: tuple, shift: jax.Array) -> tuple[tuple, None]:
            state, block = carry
            coming = rotate(block, by)
            return (visit(state, block, shift, shifts), coming), None

        (state, block), _ = jax.lax.scan(body, (state, block), jnp.asarray(shifts, jnp.int32))
    return visit(state, block, by * hops, [by * hops])
