"""From a source to batches: `batch(step, rows)` is a pure function of (seed, step, data).

Its only state is the step. Positions run on through epochs, so the last short batch of an epoch is filled
by the next, and every example comes once per epoch. A host asks for the rows its devices hold; two
hosts may ask for the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from bigmodel_jax.data.order import BatchRamp, Order, RowRng, mix_ints
from bigmodel_jax.data.sources import Mixture, Source
from bigmodel_jax.data.tfds import tensorflow
from bigmodel_jax.errors import InputError

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, RowRng], Batch]
Rows = Any
T = TypeVar("T")
_ENDLESS = 1 << 62


def describe(value: Any) -> str:
    """A stable text for a transform and its settings, for fingerprints: no addresses, arrays by hash."""
    if hasattr(value, "fingerprint"):
        return f"{type(value).__name__}:{value.fingerprint}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ",".join(f"{f.name}={describe(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
        return f"array:{value.dtype.str}{value.shape}:{content}"
    if isinstance(value, functools.partial):
        return f"{describe(value.func)}({describe(value.args)},{describe(dict(sorted(value.keywords.items())))})"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(describe(v) for v in value) + "]"
    if callable(value) and hasattr(value, "__qualname__"):
        held = [describe(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
        return f"{value.__module__}.{value.__qualname__}({','.join(held)})"
    if isinstance(value, str | int | float | bool | bytes | type(None) | np.generic):
        return repr(value)
    raise TypeError(
        f"a transform holds a {type(value).__name__}, which has no stable description; give it `fingerprint`"
    )


@dataclass(frozen=True)
class Pipeline:
    """Batches of a source.

    Attributes:
      source: examples by number; a Mixture is read in its proportions when shuffled.
      batch_size: global rows per step, or a ramp of them.
      seed: of the order and of every random number in transforms.
      transforms: fn(batch, rng) -> batch, pure and row by row. One with the attribute `partners = True`
        is called fn(batch, rng, other): row r of a step of S rows gets as `other` row S - 1 - r as it is
        at that point (for mixing pairs), whoever asks for it.
      shuffle: False reads in order.
      block, window: rows per block and blocks per window of the shuffle; block 1 is a full permutation.
      repeat: endless epochs; None means `shuffle`. Without it the data is read once, and rows past its
        end are padding: fields called weights or *_weights, and bytes, are 0, ids -1.

    Errors: InputError for an empty source, impossible sizes, and rows outside the step's batch.
    """

    source: Source
    batch_size: int | BatchRamp
    seed: int = 0
    transforms: tuple[Transform, ...] = ()
    shuffle: bool = True
    block: int = 1
    window: int = 64
    repeat: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))
        if not len(self.source):
            raise InputError("the data source is empty")
        if not isinstance(self.batch_size, BatchRamp):
            if self.batch_size < 1:
                raise InputError(f"batch size {self.batch_size} must be at least 1")
        elif not self.repeats:
            raise InputError("a batch ramp needs endless data; evaluation takes one batch size")

    def __len__(self) -> int:
        """Examples in one epoch."""
        return len(self.source)

    @property
    def repeats(self) -> bool:
        return self.shuffle if self.repeat is None else self.repeat

    @cached_property
    def ramp(self) -> BatchRamp:
        return self.batch_size if isinstance(self.batch_size, BatchRamp) else BatchRamp(((0, self.batch_size),))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which numbers a position holds; batch sizes are not among them."""
        order = [self.seed, self.shuffle, self.block, self.window if self.block > 1 else 0, 1]
        parts = [self.source.fingerprint, *map(str, order), *map(describe, self.transforms)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def size(self, step: int) -> int:
        """Global rows of this step."""
        return self.ramp.size(step)

    def steps(self, epochs: float) -> int:
        """Steps after which this many epochs have been read, the last maybe in part."""
        return self.ramp.step_at(-int(-epochs * len(self) // 1))

    @property
    def num_eval_batches(self) -> int:
        """Batches that read the data once, the last padded."""
        return -(-len(self) // self.ramp.size(0))

    @cached_property
    def _order(self) -> Callable[[np.ndarray], np.ndarray]:
        if isinstance(self.source, Mixture) and self.shuffle:
            orders = self.source.orders(self.seed, self.block, self.window)
            return lambda positions: self.source.place(positions, orders)
        return Order(len(self), self.seed, self.shuffle, self.block, self.window).index

    def _rows(self, step: int, rows: Rows) -> np.ndarray:
        size = self.size(step) if step >= 0 else 0
        if step < 0:
            raise InputError(f"step {step} is before the first, 0")
        if rows is None:
            return np.arange(size)
        rows = np.arange(size)[rows] if isinstance(rows, slice) else np.asarray(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise InputError(f"rows of a batch must be a list of numbers, not {rows.dtype} {rows.shape}")
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < size:
            raise InputError(f"rows {int(rows.min())} to {int(rows.max())} asked of step {step}, which has {size}")
        return rows.astype(np.int64)

    def _examples(self, positions: np.ndarray) -> np.ndarray:
        """Example numbers, -1 past the end of data that is read once."""
        if self.repeats:
            return self._order(positions)
        inside = positions < len(self)
        return np.where(inside, self._order(np.where(inside, positions, 0)), -1)

    def ids(self, step: int, rows: Rows = None) -> np.ndarray:
        """Example numbers [n] int64 of these rows; -1 is padding."""
        return self._examples(self.ramp.offset(step) + self._rows(step, rows))

    def batch(self, step: int, rows: Rows = None) -> Batch:
        """These rows (all, a slice, or numbers [n]) of the global batch of `step`: {name: [n, ...]}."""
        rows = self._rows(step, rows)
        batch, ids = self._made(step, rows, len(self.transforms))
        weights = [name for name in batch if name == "weights" or name.endswith("_weights")]
        if not weights:
            weights = ["weights"]
            batch["weights"] = np.ones(len(rows), np.float32)
        padding = () if self.repeats else np.flatnonzero(ids < 0)
        if len(padding):
            for name in [*weights, *({"bytes"} & set(batch))]:
                batch[name] = batch[name].copy()
                batch[name][padding] = 0
        return batch

    def _made(self, step: int, rows: np.ndarray, count: int) -> tuple[Batch, np.ndarray]:
        """The rows after the first `count` transforms, and their example numbers."""
        positions = self.ramp.offset(step) + rows
        ids = self._examples(positions)
        shown = ids if self.repeats else np.maximum(ids, 0)
        batch = dict(self.source.gather(shown))
        rng = RowRng(self.seed_of_rows, positions, shown)
        for turn, transform in enumerate(self.transforms[:count]):
            if getattr(transform, "partners", False):
                other, _ = self._made(step, self.size(step) - 1 - rows, turn)
                batch = transform(batch, rng, other)  # type: ignore[call-arg]
            else:
                batch = transform(batch, rng)
        return batch, ids

    @cached_property
    def seed_of_rows(self) -> int:
        return mix_ints(self.seed, 0x7472616E73)

    def tfdata(
        self,
        start_step: int = 0,
        rows: Rows = None,
        prefetch: int = 2,
        parallel: int = 4,
        stop_step: int | None = None,
    ) -> Any:
        """The same batches as a tf.data.Dataset of {name: tensor}, from `start_step` on, in order.

        Endless for repeating data, else ends with the data. Seeking costs nothing at any step: the data set
        is a range of steps, mapped. Imports tensorflow, with accelerators hidden from it.
        """
        tf = tensorflow()
        stop = stop_step if stop_step is not None else _ENDLESS if self.repeats else self.num_eval_batches
        probe = self.batch(start_step, rows)
        names = sorted(probe)
        varies = rows is None and len(self.ramp.sizes) > 1
        shapes = [(None if varies else probe[n].shape[0], *probe[n].shape[1:]) for n in names]
        types = [tf.as_dtype(probe[n].dtype) for n in names]

        def fetch(step: np.ndarray) -> list[np.ndarray]:
            batch = self.batch(int(step), rows)
            return [batch[n] for n in names]

        def load(step: Any) -> dict[str, Any]:
            values = tf.numpy_function(fetch, [step], types)
            for value, shape in zip(values, shapes, strict=True):
                value.set_shape(shape)
            return dict(zip(names, values, strict=True))

        steps = tf.data.Dataset.range(start_step, stop)
        return steps.map(load, num_parallel_calls=parallel, deterministic=True).prefetch(prefetch)


class Prefetch(Generic[T]):
    """fn(start), fn(start + 1), ... computed ahead by background threads, in order.

    An error in fn is raised by the `next` that would have returned its value. Close it (or leave its
    `with` block): calls not yet begun are dropped, those under way are waited for.
    """

    def __init__(self, fn: Callable[[int], T], start: int, depth: int = 2, stop: int | None = None, workers: int = 1):
        self._fn, self._step, self._stop, self._depth = fn, start, stop, depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if depth > 0 else None
        self._ahead: deque[Future[T]] = deque()
        self._closed = False
        self._fill()

    def _ended(self) -> bool:
        return self._stop is not None and self._step >= self._stop

    def _fill(self) -> None:
        while self._pool is not None and len(self._ahead) < self._depth and not self._ended():
            self._ahead.append(self._pool.submit(self._fn, self._step))
            self._step += 1

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        if self._pool is None:
            if self._ended():
                raise StopIteration
            self._step += 1
            return self._fn(self._step - 1)
        if not self._ahead:
            raise StopIteration
        try:
            value = self._ahead.popleft().result()
        except BaseException as error:
            self.close()
            if isinstance(error, StopIteration):
                raise RuntimeError("the prefetched function raised StopIteration") from error
            raise
        self._fill()
        return value

    def close(self) -> None:
        """Stop; safe to call twice."""
        self._closed = True
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def prefetch(
    fn: Callable[[int], T], start: int, depth: int = 2, stop: int | None = None, workers: int = 1
) -> Prefetch[T]:
    """Iterate fn(start), fn(start + 1), ... up to `depth` calls ahead; depth 0 computes on demand."""
    return Prefetch(fn, start, depth, stop, workers)
