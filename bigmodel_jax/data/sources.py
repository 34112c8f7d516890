"""Where examples come from: anything with a length, a fingerprint and `gather(indices)`.

Every source is random-access and pure: gather(i) is the same on every host, now and after a restart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from bigmodel_jax.data.folders import ImageFolder
from bigmodel_jax.data.order import Order, RowRng, mix_ints
from bigmodel_jax.data.tfds import Tfds, tfds_documents
from bigmodel_jax.data.token_rows import TokenShards
from bigmodel_jax.errors import InputError

__all__ = [
    "Arrays", "ImageFolder", "Mixture", "Source", "SyntheticImages", "SyntheticTokens", "Tfds", "TokenShards",
    "tfds_documents",
]  # fmt: skip


@runtime_checkable
class Source(Protocol):
    """Random access to examples; `gather` takes int64 [n] in [0, len) and gives {name: [n, ...]}."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]: ...


class Arrays:
    """Examples held in memory: {name: array [n, ...]} of equal lengths.

    Errors: InputError when there are no arrays, no rows, or lengths differ.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = {name: np.asarray(value) for name, value in arrays.items()}
        lengths = {name: len(value) if value.ndim else 0 for name, value in self._arrays.items()}
        if not lengths or min(lengths.values()) == 0:
            raise InputError(f"in-memory data is empty: rows by name {lengths}")
        if len(set(lengths.values())) != 1:
            raise InputError(f"in-memory arrays differ in length: {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, types, shapes and values."""
        h = hashlib.sha256()
        for name, value in sorted(self._arrays.items()):
            h.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
            h.update(repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes())
        return h.hexdigest()

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value[index] for name, value in self._arrays.items()}


@dataclass(frozen=True)
class SyntheticTokens:
    """Endless-looking token rows with something to learn, for tests, smoke runs and timing.

    Row i counts upwards modulo the vocabulary with its own start and stride in 1..4; a share `noise` of
    the tokens is replaced at random. Fields as TokenShards in stream mode.
    """

    rows: int
    length: int
    vocab_size: int
    seed: int = 0
    noise: float = 0.05

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 1 or self.vocab_size < 2:
            raise InputError(f"synthetic tokens need rows, length >= 1 and vocab_size >= 2, not {self}")

    def __len__(self) -> int:
        return self.rows

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        rng, width = RowRng(self.seed, index), self.length + 1
        start, stride = rng.integers(self.vocab_size, salt="start"), 1 + rng.integers(4, salt="stride")
        row = (start[:, None] + stride[:, None] * np.arange(width)) % self.vocab_size
        noisy = rng.uniform(width, salt="noisy") < self.noise
        row = np.where(noisy, rng.integers(self.vocab_size, width, salt="noise"), row).astype(np.int32)
        weights = np.ones((len(row), self.length), np.float32)
        return {"tokens": row[:, :-1].copy(), "targets": row[:, 1:].copy(), "weights": weights}


@dataclass(frozen=True)
class SyntheticImages:
    """Images of `classes` fixed random patterns plus noise: image [n, H, W, C] f32, label [n] int32."""

    rows: int
    shape: tuple[int, int, int]
    classes: int
    seed: int = 0
    noise: float = 0.5

    def __post_init__(self) -> None:
        if self.rows < 1 or self.classes < 1 or len(self.shape) != 3 or min(self.shape) < 1:
            raise InputError(f"synthetic images need rows, classes >= 1 and a shape (H, W, C), not {self}")

    def __len__(self) -> int:
        return self.rows

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @cached_property
    def _patterns(self) -> np.ndarray:
        return RowRng(mix_ints(self.seed, 1), np.arange(self.classes)).normal(tuple(self.shape))

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        rng = RowRng(self.seed, index)
        label = rng.integers(self.classes, salt="label")
        image = self._patterns[label] + np.float32(self.noise) * rng.normal(tuple(self.shape), salt="noise")
        return {"image": image, "label": label.astype(np.int32)}


def whole_shares(weights: Sequence[float], most: int = 1 << 14) -> list[int]:
    """Integer shares proportional to the weights: exact where their common denominator is at most `most`,
    else rounded to a total of `most` by largest remainders, at least 1 each."""
    exact = [Fraction(str(w)) for w in weights]
    total = sum(exact)
    shares = [w / total for w in exact]
    common = math.lcm(*(s.denominator for s in shares))
    if common <= most:
        return [int(s * common) for s in shares]
    counts = [max(int(s * most), 1) for s in shares]
    for k in sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * most)[: max(most - sum(counts), 0)]:
        counts[k] += 1
    return counts


def interleave(counts: Sequence[int]) -> np.ndarray:
    """One period [sum(counts)] of source numbers: in every prefix each count is within one of its share.

    The chairman assignment rule (Tijdeman 1980): among the sources far enough behind, the one that would
    fall too far behind first; the deviation stays at or below 1 - 1 / (2K - 2). Integers throughout.
    """
    shares = [int(c) for c in counts]
    period, k = sum(shares), len(shares)
    if k == 1:
        return np.zeros(period, np.int64)
    scale = 2 * k - 2
    out, behind = np.empty(period, np.int64), [0] * k
    for place in range(period):
        best, soonest = -1, math.inf
        for i, share in enumerate(shares):
            behind[i] += share
            if scale * behind[i] >= period:
                deadline = (period * (scale - 1) - scale * behind[i]) / share
                if deadline < soonest:
                    best, soonest = i, deadline
        out[place] = best
        behind[best] -= period
    return out


@dataclass(frozen=True)
class Mixture:
    """Several sources in fixed proportions: which source serves a position is a pure function of it.

    Every source walks its own permutation at its own pace, so a small source with a large weight simply
    starts its next epoch earlier. Examples are numbered through all sources in turn (`split_index` tells
    which), and `len` is the sum: an unshuffled pipeline reads every source once, whatever the weights.

    Errors: InputError for no sources, a weight that is not positive, or sources with different fields.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    _fields: dict[str, tuple] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not self.sources or len(self.sources) != len(self.weights):
            raise InputError(f"mixture: {len(self.sources)} sources and {len(self.weights)} weights must match")
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise InputError(f"mixture: weights {self.weights} must all be above zero; leave a source out instead")
        for k, source in enumerate(self.sources):
            if not len(source):
                raise InputError(f"mixture: source {k} is empty")

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def _first(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(source) for source in self.sources])])

    @cached_property
    def fingerprint(self) -> str:
        parts = [[source.fingerprint for source in self.sources], self.shares.tolist()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def shares(self) -> np.ndarray:
        """Positions that each source serves out of every sum(shares), int64 [K]."""
        return np.array(whole_shares(self.weights), np.int64)

    @cached_property
    def _schedule(self) -> tuple[np.ndarray, np.ndarray]:
        turn = interleave(self.shares)
        before = np.zeros((len(self.sources), len(turn)), np.int64)
        for k in range(len(self.sources)):
            before[k, 1:] = np.cumsum(turn == k)[:-1]
        return turn, before[turn, np.arange(len(turn))]

    def orders(self, seed: int, block: int, window: int) -> tuple[Order, ...]:
        """Each source's own order."""
        return tuple(
            Order(len(source), mix_ints(seed, k), True, block, window) for k, source in enumerate(self.sources)
        )

    def place(self, positions: np.ndarray, orders: tuple[Order, ...]) -> np.ndarray:
        """Example numbers at global positions, int64 [n]."""
        turn, before = self._schedule
        cycle, at = np.divmod(positions, len(turn))
        which = turn[at]
        own = cycle * self.shares[which] + before[at]
        out = np.empty(len(positions), np.int64)
        for k in np.unique(which):
            here = np.flatnonzero(which == k)
            out[here] = self._first[k] + orders[k].index(own[here])
        return out

    def split_index(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source number, row inside it) of example numbers."""
        which = np.searchsorted(self._first, index, side="right") - 1
        return which, index - self._first[which]

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        which, inside = self.split_index(index)
        out: dict[str, np.ndarray] = {}
        for k in np.unique(which) if len(which) else [0]:
            here = np.flatnonzero(which == k)
            part = self.sources[k].gather(inside[here])
            self._same_fields(int(k), part)
            for name, value in part.items():
                if name not in out:
                    out[name] = np.empty((len(index), *value.shape[1:]), value.dtype)
                out[name][here] = value
        return out

    def _same_fields(self, k: int, part: dict[str, np.ndarray]) -> None:
        fields = {name: (value.shape[1:], value.dtype.str) for name, value in sorted(part.items())}
        known = self._fields.setdefault("fields", tuple(fields.items()))
        if known != tuple(fields.items()):
            raise InputError(f"mixture: source {k} gives {fields}, an earlier one {dict(known)}; they must agree")
