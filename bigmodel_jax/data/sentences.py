"""Two spans of text in a row, and whether the second follows the first (BERT, Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data.order import RowRng
from bigmodel_jax.errors import InputError

EXTRA = 3  # special tokens of a row: before, between and behind the spans


@dataclass(frozen=True)
class NextSpan:
    """tokens, weights [B, L - 3] -> [sep] A [sep] B [sep] of L tokens: A is the first half of a row, B its second or,
    half of the time, that of another row of the same source.

    Attributes:
      source: where rows come from, {"tokens", "weights"} by index.
      sep: id that opens a row and ends each span, in place of BERT's [CLS] and [SEP].
      static: the same pairs every epoch.

    Gives tokens, segments (0 at padding), token_types (0 for A, 1 for B) [B, L] int32, random [B] int32 (1 where B
    does not follow A) and pair_weights [B] f32, 0 for a row of padding.

    Errors: InputError for a source of less than two rows.
    """

    source: Any
    sep: int
    static: bool = False

    def __post_init__(self) -> None:
        if len(self.source) < 2:
            raise InputError(f"pairs of spans need at least 2 rows of text, there are {len(self.source)}")

    def __call__(self, batch: dict[str, np.ndarray], rng: RowRng) -> dict[str, np.ndarray]:
        rng = rng.fixed if self.static else rng
        tokens, real = batch["tokens"].astype(np.int32), batch["weights"] > 0
        rows, half = len(tokens), tokens.shape[1] // 2
        random = rng.bits(salt="other") >> np.uint64(63) == 1
        # Any row but this one, by its number among the others.
        own = rng.ids if rng.ids is not None else rng.positions
        other = rng.integers(len(self.source) - 1, salt="which")
        drawn = self.source.gather(np.where(other < own, other, other + 1)[random])
        tokens, real = tokens.copy(), real.copy()
        tokens[random, half:] = drawn["tokens"][:, half:]
        real[random, half:] = drawn["weights"][:, half:] > 0
        there = real.any(1)
        edge = np.full((rows, 1), self.sep, np.int32)
        kinds = np.repeat([0, 1], [half + 2, tokens.shape[1] - half + 1]).astype(np.int32)
        return {
            "tokens": np.concatenate([edge, tokens[:, :half], edge, tokens[:, half:], edge], 1),
            "segments": np.concatenate(
                [there[:, None], real[:, :half], there[:, None], real[:, half:], there[:, None]], 1
            ).astype(np.int32),
            "token_types": np.broadcast_to(kinds, (rows, len(kinds))).copy(),
            "random": random.astype(np.int32),
            "pair_weights": there.astype(np.float32),
        }
