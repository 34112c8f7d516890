"""Text transforms: what turns rows of tokens into what an objective reads. Pure, vectorised over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigmodel_jax.data.order import RowRng
from bigmodel_jax.errors import InputError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class NextToken:
    """tokens [B, L + 1] -> tokens, targets [B, L] int32, weights [B, L] f32 (0 where the target is `pad`)."""

    pad: int = -1

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        row = batch["tokens"].astype(np.int32)
        targets = row[:, 1:].copy()
        return {
            **batch,
            "tokens": row[:, :-1].copy(),
            "targets": targets,
            "weights": (targets != self.pad).astype(np.float32),
        }


def within(segments: np.ndarray) -> np.ndarray:
    """[B, L] int32: places counted from the start of each segment [B, L], a run of one number."""
    place = np.arange(segments.shape[1], dtype=np.int32)
    starts = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


@dataclass(frozen=True)
class Documents:
    """Segments and positions [B, L] int32 of stream rows: a document begins at each end-of-text token.

    With them attention stays inside a document and positions restart; without, a row is one stream.
    Segment 0 is padding (weight 0).
    """

    eos: int

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        starts = batch["tokens"] == self.eos
        starts[:, :1] = True
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        positions = within(segments)
        if "weights" in batch:
            real = batch["weights"] > 0
            segments, positions = segments * real, positions * real
        return {**batch, "segments": segments, "positions": positions}


@dataclass(frozen=True)
class TargetBytes:
    """bytes [B, L] f32: UTF-8 bytes of each target, from table [V]; 0 where the weight is 0.

    Bits per byte = sum of nats / (sum of bytes * ln 2).
    """

    table: np.ndarray

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        return {
            **batch,
            "bytes": np.asarray(self.table, np.float32)[batch["targets"]] * (batch["weights"] > 0),
        }


@dataclass(frozen=True)
class MaskTokens:
    """Masked-LM inputs (Devlin et al. 2019, section 3.1; whole words as in their later release).

    Of the n maskable tokens of a row, round(rate * n) are chosen (at least one), up to P slots. A chosen
    token becomes `mask` 8 times in 10, a random ordinary token once in 10, and stays once in 10 (`replace`).

    Attributes:
      vocab_size: ids below it are tokens.
      mask: id of the mask token.
      special: ids that are never chosen and never drawn (padding, end-of-text, mask itself ...).
      rate: share of maskable tokens to choose.
      slots: P, 0 for ceil(rate * L), plus 8 for whole words.
      word_start: [V] bool, "this token starts a word": whole words are chosen. The word on which the
        count is reached is taken with the probability that keeps the expected share at `rate`; a word
        that does not fit the slots is left, so a row of long words may get none.
      static: the same tokens every epoch (drawn by example) instead of new ones (by position).
      replace: shares of the chosen that become `mask`, and that become a random token; the others stay.

    Gives tokens [B, L] int32, segments [B, L] int32 (kept, or 1 where weight > 0), masked_positions and
    masked_targets [B, P] int32, masked_weights [B, P] f32; unused slots are 0. Drops targets and weights.
    """

    vocab_size: int
    mask: int
    special: tuple[int, ...]
    rate: float = 0.15
    slots: int = 0
    word_start: np.ndarray | None = None
    static: bool = False
    replace: tuple[float, float] = (0.8, 0.1)

    def __post_init__(self) -> None:
        shares = tuple(self.replace)
        if len(shares) != 2 or min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise InputError(f"masking: replace {self.replace} should be two shares, masked and random, of at most 1")
        ids = (self.mask, *self.special)
        if not 0 < self.rate < 1 or self.slots < 0 or not all(0 <= i < self.vocab_size for i in ids):
            raise InputError(
                f"masking: rate {self.rate} must lie in (0, 1), slots {self.slots} be 0 or more, "
                f"and mask and special ids {ids} below vocab_size {self.vocab_size}"
            )
        if self.word_start is not None and len(self.word_start) != self.vocab_size:
            raise InputError(f"masking: word_start has {len(self.word_start)} entries, not {self.vocab_size}")
        if len(set(ids)) >= self.vocab_size:
            raise InputError("masking: no ordinary token is left to draw")
        ordinary = np.ones(self.vocab_size, bool)
        ordinary[list(ids)] = False
        object.__setattr__(self, "_maskable", ordinary)
        object.__setattr__(self, "_ordinary", np.flatnonzero(ordinary).astype(np.int32))

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        tokens = batch["tokens"].astype(np.int32)
        rng = rng.fixed if self.static else rng
        count, length = tokens.shape
        segments = batch.get("segments")
        if segments is None:
            real = batch["weights"] > 0 if "weights" in batch else np.ones(tokens.shape, bool)
            segments = real.astype(np.int32)
        free = self._maskable[tokens] & (segments > 0)
        slots = self.slots or int(np.ceil(self.rate * length)) + (0 if self.word_start is None else 8)
        slots = min(slots, length)
        wanted = np.rint(self.rate * free.sum(1)).astype(np.int64).clip(1, slots)
        if self.word_start is None:
            chosen = self._tokens(free, wanted, slots, rng)
        else:
            chosen = self._words(tokens, segments, free, wanted, slots, rng)
        # Chosen places first, each group in reading order.
        places = np.argsort(~chosen, axis=1, kind="stable")[:, :slots]
        used = np.take_along_axis(chosen, places, 1)
        places = np.where(used, places, 0).astype(np.int32)
        targets = np.where(used, np.take_along_axis(tokens, places, 1), 0)
        draw = rng.uniform(length, salt="replace")
        other = self._ordinary[rng.integers(len(self._ordinary), length, salt="token")]
        masked, random = self.replace
        replaced = np.where(draw < masked, np.int32(self.mask), np.where(draw < masked + random, other, tokens))
        kept = {k: v for k, v in batch.items() if k not in ("targets", "weights", "bytes")}
        return {
            **kept, "tokens": np.where(chosen, replaced, tokens), "segments": segments,
            "masked_positions": places, "masked_targets": targets.astype(np.int32),
            "masked_weights": used.astype(np.float32),
        }  # fmt: skip

    def _tokens(self, free: np.ndarray, wanted: np.ndarray, slots: int, rng: RowRng) -> np.ndarray:
        """The `wanted` free tokens of the lowest draws."""
        length = free.shape[1]
        # Draws made unique by the place, so that exactly `wanted` lie at or below the threshold.
        draw = (rng.bits(length, salt="choose") >> np.uint64(24)).astype(np.int64) * length + np.arange(length)
        draw[~free] = np.iinfo(np.int64).max
        lowest = np.sort(np.partition(draw, slots - 1, axis=1)[:, :slots], axis=1)
        threshold = np.take_along_axis(lowest, wanted[:, None] - 1, 1)
        return (draw <= threshold) & free

    def _words(
        self,
        tokens: np.ndarray,
        segments: np.ndarray,
        free: np.ndarray,
        wanted: np.ndarray,
        slots: int,
        rng: RowRng,
    ) -> np.ndarray:
        """Whole words in random order until `wanted` tokens are reached."""
        length = tokens.shape[1]
        place = np.arange(length)
        starts = np.asarray(self.word_start, bool)[tokens] | ~free
        starts[:, :1] = True
        starts[:, 1:] |= (segments[:, 1:] != segments[:, :-1]) | ~free[:, :-1]
        first, end = _runs(starts)
        draw = (rng.bits(length, salt="choose") >> np.uint64(24)).astype(np.int64) * length + place
        draw = np.take_along_axis(draw, first, 1)
        # A word longer than all slots would only end the drawing.
        draw[~free | (end - first > slots)] = np.iinfo(np.int64).max
        order = np.argsort(draw, axis=1, kind="stable")
        seen = np.take_along_axis(draw, order, 1)
        fresh = np.ones(tokens.shape, bool)
        fresh[:, 1:] = seen[:, 1:] != seen[:, :-1]
        # In drawing order: tokens before a word, tokens up to and including it.
        before, until = _runs(fresh)
        size, short = until - before, wanted[:, None] - before
        lucky = rng.uniform(1, salt="last word") * size < short
        take = (short > 0) & (seen < np.iinfo(np.int64).max) & ((until <= wanted[:, None]) | lucky) & (until <= slots)
        chosen = np.zeros(tokens.shape, bool)
        np.put_along_axis(chosen, order, take, 1)
        return chosen


def _runs(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First place of the run that each place is in, and the place after its last; column 0 must start one."""
    length = starts.shape[1]
    place = np.arange(length)
    last = np.ones(starts.shape, bool)
    last[:, :-1] = starts[:, 1:]
    end = np.minimum.accumulate(np.where(last, place + 1, length)[:, ::-1], axis=1)[:, ::-1]
    return np.maximum.accumulate(np.where(starts, place, 0), axis=1), end
