"""Which example comes when, and which random numbers it gets: pure functions of integers.

The whole state of the data order is a global sample position p: epoch p // n, place p % n. A place is
mapped to an example by a permutation that is computed, not stored: a Feistel network over Z_a x Z_b with
a * b just above n, walked until it lands inside [0, n) (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains"). Random numbers are counters through the same 64-bit mixer (SplitMix64, Steele et al.
2014), keyed by row, so that a row's numbers depend on nothing but the row.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from bigmodel_jax.errors import InputError

_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_ROUNDS = 8
_CHUNK = 4096
# Keys of permutations and of random numbers must never meet for equal (seed, number).
_ORDER, _WINDOW, _ROWS = 0x6F72646572, 0x77696E646F77, 0x726F7773


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser, elementwise on uint64: a bijection that flips half of the bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(_M1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_M2)
    x ^= x >> np.uint64(31)
    return x


def mix_ints(*numbers: int) -> int:
    """Hash Python integers (any sign or size) to one uint64, order-sensitive."""
    h = 0
    for number in numbers:
        x = (h + _GOLDEN ^ number & _MASK) & _MASK
        if not 0 <= number <= _MASK:
            x ^= mix_ints(number >> 64 & _MASK, 1 if number < 0 else 2)
        x = (x ^ x >> 30) * _M1 & _MASK
        x = (x ^ x >> 27) * _M2 & _MASK
        h = x ^ x >> 31
    return h


def _keyed(key: int, numbers: np.ndarray) -> np.ndarray:
    """One uint64 key per entry of `numbers`."""
    return mix(mix(numbers.astype(np.uint64) + np.uint64(_GOLDEN)) ^ np.uint64(key))


def _factors(n: int) -> tuple[int, int]:
    a = math.isqrt(n - 1) + 1
    return a, -(-n // a)


def _add(x: np.ndarray, n: int, other: np.ndarray, key: np.ndarray, back: bool) -> np.ndarray:
    """x plus (or minus) a keyed random function of `other`, modulo n; n < 2**32."""
    shift = (mix(other ^ key) >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)
    if back:
        shift = np.uint64(n) - shift
    x = x + shift
    # Where x < n the subtraction wraps to something huge, and the minimum keeps x.
    return np.minimum(x, x - np.uint64(n))


def _network(x: np.ndarray, n: int, keys: np.ndarray, back: bool) -> np.ndarray:
    """The Feistel network over [0, a * b), keys broadcastable to x."""
    a, b = _factors(n)
    left = x // np.uint64(b)
    right = x - left * np.uint64(b)
    for turn in reversed(range(_ROUNDS)) if back else range(_ROUNDS):
        key = mix(keys + np.uint64((turn + 1) * _GOLDEN & _MASK))
        if turn % 2 == 0:
            left = _add(left, a, right, key, back)
        else:
            right = _add(right, b, left, key, back)
    return left * np.uint64(b) + right


def _permute(x: np.ndarray, n: int, keys: np.ndarray, back: bool = False) -> np.ndarray:
    """Keyed permutation of [0, n), elementwise; walks on while the network leaves [0, n)."""
    x = _network(x, n, keys, back)
    while True:
        outside = np.flatnonzero(x >= np.uint64(n))
        if not len(outside):
            return x
        x[outside] = _network(x[outside], n, keys if keys.size == 1 else keys[outside], back)


def shuffled(n: int, seed: int, epochs: np.ndarray, places: np.ndarray, block: int = 1, window: int = 64) -> np.ndarray:
    """Example at each place of each epoch: int64, a bijection of [0, n) for every (seed, epoch).

    block = 1 permutes all rows. block > 1 permutes blocks of `block` consecutive rows, then the rows
    inside every window of `window` blocks, so that reads stay near each other. n < 2**62.
    """
    x, keys = places.astype(np.uint64), _keyed(mix_ints(_ORDER, seed), epochs)
    if block <= 1 or n <= block:
        return _permute(x, n, keys).astype(np.int64)
    span = block * window
    if span < n:
        room = x // np.uint64(span)
        inner = mix(_keyed(mix_ints(_WINDOW, seed), epochs) ^ _keyed(_WINDOW, room))
        low, last = room * np.uint64(span), n // span
        for size, here in ((span, room < last), (n - last * span, room == last)):
            at = np.flatnonzero(here)
            if len(at):
                x[at] = low[at] + _permute(x[at] - low[at], size, inner[at])
    else:
        x = _permute(x, n, _keyed(mix_ints(_WINDOW, seed), epochs))
    blocks, rest = -(-n // block), n % block
    if rest:
        # The short block moves with the others; every place after it slips by what it lacks.
        at = _permute(np.full(len(x), blocks - 1, np.uint64), blocks, keys, back=True)
        x += np.uint64(block - rest) * (x >= at * np.uint64(block) + np.uint64(rest))
    slot = x // np.uint64(block)
    return (_permute(slot, blocks, keys) * np.uint64(block) + x % np.uint64(block)).astype(np.int64)


def _check(n: int, block: int, window: int) -> None:
    if not 0 < n < 1 << 62:
        raise InputError(f"cannot order {n} examples; there must be between 1 and 2**62")
    if block < 1 or window < 1:
        raise InputError(f"shuffle block {block} and window {window} must be at least 1")


@dataclass(frozen=True)
class Permutation:
    """The order of one epoch: `index(places)` is a bijection of [0, n) in O(1) memory."""

    n: int
    seed: int
    epoch: int
    block: int = 1
    window: int = 64

    def __post_init__(self) -> None:
        _check(self.n, self.block, self.window)

    def index(self, places: np.ndarray) -> np.ndarray:
        """Examples at these places of the epoch, int64; places must lie in [0, n)."""
        places = np.asarray(places, np.int64)
        if places.size and not 0 <= places.min() <= places.max() < self.n:
            raise InputError(f"place outside the epoch's {self.n} examples")
        flat = places.reshape(-1)
        epochs = np.full(len(flat), self.epoch, np.int64)
        return shuffled(self.n, self.seed, epochs, flat, self.block, self.window).reshape(places.shape)


@dataclass(frozen=True)
class Order:
    """The endless order: global sample position -> example, epoch after epoch, no gap between them.

    Positions come in runs, and numpy calls on a dozen numbers cost as much as on thousands, so whole
    chunks of positions are mapped and the last few kept; what is returned does not depend on that.
    """

    n: int
    seed: int
    shuffle: bool = True
    block: int = 1
    window: int = 64
    _chunks: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.n, self.block, self.window)

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Examples (int64 [m]) at global positions (int64 [m], >= 0)."""
        if not self.shuffle:
            return positions % self.n
        if not len(positions):
            return np.zeros(0, np.int64)
        first, last = int(positions.min()) // _CHUNK, int(positions.max()) // _CHUNK
        if (last - first) * _CHUNK > 4 * len(positions) + _CHUNK:
            return self._map(positions)
        chunks = [self._chunk(c) for c in range(first, last + 1)]
        table = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        return table[positions - first * _CHUNK]

    def _map(self, positions: np.ndarray) -> np.ndarray:
        epochs = positions // self.n
        return shuffled(self.n, self.seed, epochs, positions - epochs * self.n, self.block, self.window)

    def _chunk(self, c: int) -> np.ndarray:
        found = self._chunks.get(c)
        if found is None:
            found = self._map(np.arange(c * _CHUNK, (c + 1) * _CHUNK))
            # Several threads may fetch batches: each works on what it found, the dict only spares work.
            for old in list(self._chunks)[:-3]:
                self._chunks.pop(old, None)
            self._chunks[c] = found
        return found


@lru_cache(maxsize=256)
def _salt(salt: str | int) -> int:
    return int.from_bytes(hashlib.sha256(repr(salt).encode()).digest()[:8], "little")


@dataclass(frozen=True)
class RowRng:
    """Random numbers for rows: row i's depend on (seed, positions[i], salt) and nothing else.

    positions [n] int64: global sample positions, so numbers differ in every epoch. `ids` [n]: example
    ids; `fixed` is a generator keyed by them, the same in every epoch. Two draws with one salt are equal.
    """

    seed: int
    positions: np.ndarray
    ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def keys(self) -> np.ndarray:
        """One uint64 per row."""
        return _keyed(mix_ints(_ROWS, self.seed), np.asarray(self.positions))

    @property
    def fixed(self) -> RowRng:
        """The generator keyed by example id. Errors: ValueError when there are no ids."""
        if self.ids is None:
            raise ValueError("this RowRng was made without example ids")
        return RowRng(mix_ints(self.seed, 1), self.ids)

    def bits(self, shape: tuple[int, ...] | int = (), salt: str | int = 0) -> np.ndarray:
        """[n, *shape] uint64, all bits uniform."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(shape)
        start = mix(self.keys ^ np.uint64(_salt(salt)))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return mix(start[:, None] + steps).reshape(len(start), *shape)

    def uniform(
        self, shape: tuple[int, ...] | int = (), salt: str | int = 0, low: float = 0.0, high: float = 1.0
    ) -> np.ndarray:
        """[n, *shape] float32 in [low, high), multiples of 2**-24 of the span."""
        u = (self.bits(shape, salt) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return u if (low, high) == (0.0, 1.0) else np.float32(low) + np.float32(high - low) * u

    def integers(self, high: int, shape: tuple[int, ...] | int = (), salt: str | int = 0) -> np.ndarray:
        """[n, *shape] int64 in [0, high), high <= 2**32; bias below high / 2**32."""
        if not 0 < high <= 1 << 32:
            raise ValueError(f"integers(high={high}): high must be in [1, 2**32]")
        return ((self.bits(shape, salt) >> np.uint64(32)) * np.uint64(high) >> np.uint64(32)).astype(np.int64)

    def normal(self, shape: tuple[int, ...] | int = (), salt: str | int = 0) -> np.ndarray:
        """[n, *shape] float32 standard normal (Box & Muller 1958)."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        u = (self.bits((2, *shape), salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log1p(-u[:, 0]))
        return (radius * np.cos(2.0 * np.pi * u[:, 1])).astype(np.float32)


@dataclass(frozen=True)
class BatchRamp:
    """Global batch sizes by step: ((0, 32), (1000, 64)) is 32 until step 999, then 64.

    `offset` is closed-form, so batch(step) stays a pure function of the step under a ramp.
    """

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        stages = tuple((int(start), int(size)) for start, size in self.stages)
        object.__setattr__(self, "stages", stages)
        starts = [start for start, _ in stages]
        if not stages or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
            raise InputError(f"batch ramp {stages} must be (start_step, size) pairs from step 0 with rising starts")
        if min(size for _, size in stages) < 1:
            raise InputError(f"batch ramp {stages} has a size below 1")

    def size(self, step: int) -> int:
        """Global batch (rows) at this step."""
        return [size for start, size in self.stages if start <= step][-1]

    def offset(self, step: int) -> int:
        """Global sample position at which this step starts: rows of all steps before it."""
        total = 0
        for (start, size), end in zip(self.stages, [s for s, _ in self.stages[1:]] + [step], strict=True):
            total += size * max(min(end, step) - start, 0)
        return total

    def step_at(self, position: int) -> int:
        """First step whose offset is at or past this position."""
        done = 0
        for (start, size), end in zip(self.stages, [s for s, _ in self.stages[1:]] + [None], strict=True):
            steps = -(-(position - done) // size)
            if end is None or start + steps <= end:
                return start + max(steps, 0)
            done += size * (end - start)
        raise AssertionError("the last stage has no end")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Distinct batch sizes, in order of appearance: one compilation each."""
        return tuple(dict.fromkeys(size for _, size in self.stages))
