"""Span corruption (Raffel et al. 2020, section 3.1.4): runs of tokens are cut out, and are what is to be said.

The source keeps the rest, with a sentinel for each run; the target is each sentinel followed by its run.
Both end with eos. Sentinels are ids behind the tokenizer's, the first run's the highest, as in T5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.pieces import Tokenizer
from bigmodel_jax.errors import InputError

Batch = dict[str, np.ndarray]


class Sentinels(Tokenizer):
    """A tokenizer with sentinels behind its ids, written <extra_id_0>, the highest, and so on downwards."""

    def __init__(self, tokenizer: Tokenizer, number: int):
        names = [f"<extra_id_{number - 1 - i}>".encode() for i in range(number)]
        special = np.flatnonzero(tokenizer.special()).tolist()
        fingerprint = hashlib.sha256(f"{tokenizer.fingerprint} {number}".encode()).hexdigest()
        super().__init__([*tokenizer.table, *names], special, tokenizer.eos, tokenizer.pad, tokenizer.mask, fingerprint)
        self.kind, self._tokenizer = tokenizer.kind, tokenizer

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[np.ndarray]:
        return self._tokenizer.encode_batch(texts, threads)

    def save(self, directory: str) -> str:
        return self._tokenizer.save(directory)


def counts(real: np.ndarray, rate: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to cut out, runs) of rows with `real` tokens each; at least one token is cut and one kept."""
    real = np.asarray(real, np.int64)
    noise = np.clip(np.rint(real * rate).astype(np.int64), 1, np.maximum(real - 1, 1))
    spans = np.clip(np.rint(noise / mean_span).astype(np.int64), 1, np.maximum(np.minimum(noise, real - noise), 1))
    return noise, spans


def lengths(row: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(S, L): tokens of source and target, eos included, of a full row; shorter rows need no more."""
    noise, spans = (int(x[0]) for x in counts(np.array([row]), rate, mean_span))
    return row - noise + spans + 1, noise + spans + 1


def parts(total: np.ndarray, number: np.ndarray, width: int, draw: np.ndarray) -> np.ndarray:
    """Sizes [n, width] of `number` parts of `total` things, all partitions into positive parts alike.

    draw: [n, m] distinct numbers per row, m >= total - 1: the number - 1 smallest of the first total - 1
      say behind which things a part ends.
    """
    place = np.arange(draw.shape[1])
    draw = np.where(place < (total - 1)[:, None], draw, np.iinfo(np.int64).max)
    order = np.argsort(draw, axis=1, kind="stable")[:, : width - 1]
    ends = np.where(np.arange(order.shape[1]) < (number - 1)[:, None], order + 1, total[:, None])
    ends = np.sort(ends, axis=1)
    ends = np.concatenate([ends, np.repeat(total[:, None], width - ends.shape[1], axis=1)], axis=1)
    return np.diff(ends, axis=1, prepend=0)


@dataclass(frozen=True)
class CorruptSpans:
    """tokens [B, n] (weight 0 is padding) -> source, source_segments [B, S], tokens, targets, weights [B, L].

    Runs of kept and of cut tokens alternate; a row begins with kept ones and ends with cut ones. Pure in
    (seed, position): other runs in every epoch. Rows of one token or none give no target.

    Attributes:
      first_sentinel: id of the lowest of `sentinels` sentinels.
      eos, pad: ids; start: the decoder's first input.
      rate: share of tokens to cut out. mean_span: mean length of a run.
    """

    first_sentinel: int
    sentinels: int
    eos: int
    pad: int
    start: int
    rate: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or self.mean_span < 1:
            raise InputError(f"rate {self.rate} must lie in (0, 1) and mean_span {self.mean_span} be at least 1")

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        tokens = batch["tokens"].astype(np.int32)
        rows, width = tokens.shape
        real = (batch["weights"] > 0).sum(1) if "weights" in batch else np.full(rows, width)
        _, most = (int(x[0]) for x in counts(np.array([width]), self.rate, self.mean_span))
        if most > self.sentinels:
            raise InputError(f"rows of {width} tokens have {most} spans, more than {self.sentinels} sentinels")
        noise, spans = counts(real, self.rate, self.mean_span)
        cut, kept = (
            parts(total, spans, most, (rng.bits(width, salt=salt) >> np.uint64(2)).astype(np.int64))
            for total, salt in ((noise, "cut"), (np.maximum(real - noise, 1), "kept"))
        )
        used = (real > 1)[:, None]
        ends = np.cumsum(kept + cut, axis=1)  # of each run
        starts = ends - cut
        place = np.arange(width)
        run = (place[None, :, None] >= ends[:, None, :]).sum(-1)  # runs that lie before each place
        run = np.minimum(run, most - 1)
        gone = (place >= np.take_along_axis(starts, run, 1)) & (place < real[:, None]) & used
        first = gone & (place == np.take_along_axis(starts, run, 1))
        sentinel = (self.first_sentinel + self.sentinels - 1 - run).astype(np.int32)
        source_length, length = lengths(width, self.rate, self.mean_span)
        stays = (place < real[:, None]) & (~gone | first)
        source = self._packed(np.where(first, sentinel, tokens), stays, source_length)
        both = np.stack([sentinel, tokens], axis=2).reshape(rows, 2 * width)  # a sentinel before each token
        said = np.stack([first, gone], axis=2).reshape(rows, 2 * width)
        targets = self._packed(both, said, length)
        weights = ((targets >= 0) & used).astype(np.float32)
        targets = np.where(targets < 0, np.int32(self.pad), targets)
        begin = np.full((rows, 1), self.start, np.int32)
        return {
            "source": np.where(source < 0, np.int32(self.pad), source),
            "source_segments": (source >= 0).astype(np.int32),
            "tokens": np.concatenate([begin, targets[:, :-1]], axis=1),
            "targets": targets,
            "weights": weights,
        }

    def _packed(self, values: np.ndarray, wanted: np.ndarray, width: int) -> np.ndarray:
        """The wanted values of each row in order, then eos, then -1: int32 [B, width]."""
        order = np.argsort(~wanted, axis=1, kind="stable")[:, :width]
        out = np.take_along_axis(values, order, 1).astype(np.int32)
        if out.shape[1] < width:
            out = np.pad(out, ((0, 0), (0, width - out.shape[1])))
        count, place = wanted.sum(1)[:, None], np.arange(width)
        return np.where(place < count, out, np.where(place == count, np.int32(self.eos), np.int32(-1)))
