"""Whole documents as overlapping windows, so that a language model is scored on every token exactly once.

A document is cut every `stride` tokens and read in windows of `context`; a window scores only what
the one before it did not. A token is thus predicted from its whole document where that fits, else from at
least `context - stride` tokens before it. Training rows tell another number: they cut documents anywhere.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

import numpy as np

from bigmodel_jax.data.token_rows import TokenShards
from bigmodel_jax.errors import InputError


class DocumentWindows:
    """Windows of the documents of a split of token shards.

    gather(rows) -> {"tokens", "targets" [n, C] int32, "weights" [n, C] f32}. The first input of a document is
    the end-of-text token before it; its last target is its own.

    Args:
      context: C, tokens that a window holds. stride: new ones in each window but the first, at most C.

    Errors: InputError for a split without documents, or 0 < stride <= context not held.
    """

    def __init__(self, shards: TokenShards, context: int, stride: int):
        if not 0 < stride <= context:
            raise InputError(f"evaluation windows: stride {stride} must lie between 1 and the context {context}")
        self.shards, self.context, self.stride = shards, context, stride
        ends = shards.document_ends()
        starts = [np.concatenate([[1], e[:-1]]) if len(e) else e for e in ends]
        self._shard = np.repeat(np.arange(len(ends)), [len(e) for e in ends])
        self._start = np.concatenate(starts)
        self.sizes = np.concatenate(ends) - self._start
        if not len(self.sizes):
            raise InputError(f"token shards: split '{shards.split}' of {shards.folder} has no documents")
        extra = -(-np.maximum(self.sizes - context, 0) // stride)
        self._first = np.concatenate([[0], np.cumsum(1 + extra)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def documents(self) -> int:
        return len(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        parts = [self.shards.meta["fingerprint"], self.shards.split, self.context, self.stride, "windows 1"]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def groups(self, index: np.ndarray) -> np.ndarray:
        """Document number of each window."""
        return np.searchsorted(self._first, index, side="right") - 1

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        index = np.asarray(index, np.int64)
        document = self.groups(index)
        begin = (index - self._first[document]) * self.stride
        place = begin[:, None] + np.arange(self.context)
        real = place < self.sizes[document][:, None]
        at = self._start[document][:, None] - 1 + np.where(real, place, 0)
        rows = np.empty((2, *place.shape), np.int32)
        for shard in np.unique(self._shard[document]):
            here = np.flatnonzero(self._shard[document] == shard)
            for offset in (0, 1):
                rows[offset, here] = self.shards.take(int(shard), at[here] + offset)
        rows[:, ~real] = int(self.shards.meta["pad"])
        new = np.arange(self.context) >= np.where(begin > 0, self.context - self.stride, 0)[:, None]
        return {"tokens": rows[0], "targets": rows[1], "weights": (real & new).astype(np.float32)}

    def text_tokens(self, document: int, most: int) -> np.ndarray:
        """The first `most` tokens of a document, its end-of-text token left out."""
        count = min(int(self.sizes[document]) - 1, most)
        return self.shards.take(int(self._shard[document]), self._start[document] + np.arange(count))
