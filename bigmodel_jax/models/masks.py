"""Who may look at whom, as a value that each attention backend realises its own way.

Shapes: B batch, L queries, M keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

Index = int | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Query i of a row sees key j when every stated condition holds.

    causal: j <= i, or j < prefix where a prefix [B] is given (prefix LM, Raffel et al. 2020).
    window: |i - j| < window; 0 means no window. A causal window of w is the query and w - 1 keys
      before it.
    segments_q [B, L], segments_kv [B, M] (default: segments_q): equal numbers, so that packed
      documents do not see each other.
    kv_length [B]: j < kv_length; the rest of a cache is empty.
    offset [B or 1]: query 0 is at index `offset` of the keys (cached decoding); default 0.
    zigzag: the length is stored in the order of parallel/context.py; only the ring knows what to do with it.

    i and j are indices in the row, not positions: in packed rows both agree inside a segment.
    A query that sees no key gets zeros.
    """

    causal: bool = field(default=False, metadata={"static": True})
    window: int = field(default=0, metadata={"static": True})
    zigzag: bool = field(default=False, metadata={"static": True})
    segments_q: jax.Array | None = None
    segments_kv: jax.Array | None = None
    prefix: jax.Array | None = None
    kv_length: jax.Array | None = None
    offset: jax.Array | None = None

    def parts(self) -> set[str]:
        """Names of the conditions in force."""
        names = ("segments_q", "segments_kv", "prefix", "kv_length", "offset")
        dynamic = {name for name in names if getattr(self, name) is not None}
        return dynamic | {name for name in ("causal", "window", "zigzag") if getattr(self, name)}

    def distance(self, i0: Index, rows: int, j0: int, cols: int) -> jax.Array:
        """i - j as int32 [B or 1, rows, cols] for queries from i0 and keys from j0."""
        i = jnp.arange(rows, dtype=jnp.int32) + i0
        i = i[None] if self.offset is None else i[None] + self.offset[:, None]
        j = jnp.arange(cols, dtype=jnp.int32) + j0
        return i[:, :, None] - j

    def visible(self, i0: Index, rows: int, j0: int, cols: int) -> jax.Array | None:
        """bool [B or 1, rows, cols], or None when every key is visible."""
        conditions = []
        d = self.distance(i0, rows, j0, cols)
        j = (jnp.arange(cols, dtype=jnp.int32) + j0)[None, None]
        if self.causal:
            seen = d >= 0
            conditions.append(seen if self.prefix is None else seen | (j < _column(self.prefix)))
        if self.window:
            conditions.append(d < self.window)
            if not self.causal or self.prefix is not None:
                conditions.append(d > -self.window)
        if self.segments_q is not None:
            queries = jax.lax.dynamic_slice_in_dim(self.segments_q, i0, rows, axis=1)
            keys = self.segments_q if self.segments_kv is None else self.segments_kv
            keys = keys[:, j0 : j0 + cols]
            conditions.append(queries[:, :, None] == keys[:, None])
        if self.kv_length is not None:
            conditions.append(j < _column(self.kv_length))
        if not conditions:
            return None
        out = conditions[0]
        for condition in conditions[1:]:
            out = out & condition
        return out

    def extent(self, i0: int, rows: int, cols: int) -> tuple[int, int]:
        """Static range [lo, hi) of keys that queries i0 .. i0 + rows can see at all."""
        if self.offset is not None:
            return 0, cols
        lo, hi = 0, cols
        if self.causal and self.prefix is None:
            hi = min(hi, i0 + rows)
        if self.window:
            lo = max(lo, i0 - self.window + 1)
            hi = min(hi, i0 + rows + self.window - 1)
        return min(lo, cols), max(hi, min(lo, cols))


def _column(x: jax.Array) -> jax.Array:
    return x[:, None, None]
