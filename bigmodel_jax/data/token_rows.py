"""Token shards as rows of L tokens: a stream cut every L tokens, or whole documents packed.

The directory is what `bigmodel prepare` writes: meta.json, and per shard a .bin of little-endian tokens
(end-of-text, then every document followed by end-of-text) and an .idx of document ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bigmodel_jax.data.packing import Packed, packed_index
from bigmodel_jax.data.storage import Elements, is_url, join, open_elements, read_bytes, size_of
from bigmodel_jax.errors import InputError, nearest

_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_MODES = ("stream", "pack")


@lru_cache(maxsize=8)
def _places(count: int) -> np.ndarray:
    places = np.arange(count, dtype=np.int32)
    places.flags.writeable = False
    return places


def read_meta(folder: str) -> dict[str, Any]:
    """meta.json of a shard directory. Errors: InputError when missing, unreadable or of another version."""
    path = join(folder, "meta.json")
    try:
        meta = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        where = "has no meta.json" if not is_url(folder) and os.path.isdir(folder) else "does not exist"
        raise InputError(f"token shards: {folder} {where}; make it with `bigmodel prepare`") from error
    except (OSError, ValueError) as error:
        raise InputError(f"token shards: {path} cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("version") != 1:
        raise InputError(f"token shards: {path} is not a version 1 shard description")
    wanted = ("dtype", "vocab_size", "eos", "pad", "splits", "fingerprint")
    lacking = [name for name in wanted if name not in meta]
    if lacking:
        raise InputError(f"token shards: {path} lacks {', '.join(lacking)}; prepare the corpus again")
    if meta["dtype"] not in _DTYPES:
        raise InputError(f"token shards: {path} has dtype '{meta['dtype']}'; it must be uint16 or uint32")
    return meta


class TokenShards:
    """Rows of `length` tokens from one split of a shard directory (a path or a URL).

    gather(rows) -> {"tokens", "targets" [n, L] int32, "weights" [n, L] f32}; mode "pack" adds
    "segments" (0 = padding) and "positions" [n, L] int32. Targets are the tokens that follow; every
    token after a shard's first is a target of weight 1 exactly once.
    stream: row j of a shard is tokens j * L ... j * L + L, the last row of a shard padded.
    pack: whole documents; documents longer than L are cut into pieces and counted in `report`.

    Errors: InputError for a missing directory, split or file, a truncated shard, a dtype that the file
    sizes contradict, an empty split, an unknown mode.
    """

    def __init__(self, folder: str, split: str, length: int, mode: str = "stream", cache_dir: str | None = None):
        self.folder, self.split, self.length, self.mode = os.fspath(folder), split, int(length), mode
        self.meta = read_meta(self.folder)
        if mode not in _MODES:
            raise InputError(f"token shards: mode '{mode}' must be stream or pack{nearest(mode, _MODES)}")
        if self.length < 1:
            raise InputError(f"token shards: length {length} must be at least 1")
        splits = self.meta["splits"]
        if split not in splits:
            raise InputError(f"token shards: {folder} has no split '{split}', only {', '.join(splits)}")
        self._dtype, self._pad = _DTYPES[self.meta["dtype"]], int(self.meta["pad"])
        self._shards = splits[split]["shards"]
        self._check_sizes()
        self.tokens = sum(int(shard["tokens"]) for shard in self._shards)
        self._files: list[Elements | None] = [None] * len(self._shards)
        self._packed: Packed | None = None
        if not self.tokens:
            raise InputError(f"token shards: split '{split}' of {folder} is empty")
        if mode == "pack":
            self._packed = packed_index(
                self.folder, split, self.length, self.meta["fingerprint"], self.document_ends, cache_dir
            )
            counts, self.report = self._packed.shard_rows, self._packed.report
        else:
            targets = np.array([max(int(shard["tokens"]) - 1, 0) for shard in self._shards], np.int64)
            counts = -(-targets // self.length)
            self.report = {"rows": int(counts.sum()), "tokens": int(targets.sum())}
        self._first = np.concatenate([[0], np.cumsum(counts)])
        if not len(self):
            raise InputError(f"token shards: split '{split}' of {folder} is empty")

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content (from meta.json) and of how it is cut into rows."""
        parts = [self.meta["fingerprint"], self.split, self.length, self.mode, 1]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _path(self, shard: dict[str, Any], suffix: str = ".bin") -> str:
        return join(self.folder, shard["file"].removesuffix(".bin") + suffix)

    def _check_sizes(self) -> None:
        for shard in self._shards:
            wanted = [(self._path(shard), int(shard["tokens"]) * self._dtype.itemsize)]
            if self.mode == "pack":
                wanted.append((self._path(shard, ".idx"), int(shard["documents"]) * 8))
            for path, size in wanted:
                try:
                    found = size_of(path)
                except (FileNotFoundError, NotADirectoryError) as error:
                    raise InputError(f"token shards: {path} is missing; prepare the corpus again") from error
                if found != size:
                    raise InputError(
                        f"token shards: {path} has {found} bytes, meta.json says {size} "
                        f"({self._dtype.name}): truncated, or of another dtype; prepare the corpus again"
                    )

    def verify(self) -> None:
        """Read every shard and compare its sha256 with meta.json. Errors: InputError naming the file."""
        for shard in self._shards:
            if hashlib.sha256(read_bytes(self._path(shard))).hexdigest() != shard["sha256"]:
                raise InputError(f"token shards: {self._path(shard)} differs from its sha256 in meta.json")

    def take(self, shard: int, at: np.ndarray) -> np.ndarray:
        """Tokens of one shard at positions, of any shape."""
        return self._file(shard).take(at)

    def document_ends(self) -> list[np.ndarray]:
        """Per shard, the position after each document's end-of-text token, int64; the first starts at 1."""
        out = []
        for shard in self._shards:
            path = self._path(shard, ".idx")
            ends = np.frombuffer(read_bytes(path), "<u8").astype(np.int64)
            rising = (np.diff(np.concatenate([[1], ends])) > 0).all()
            if len(ends) and (int(ends[-1]) != int(shard["tokens"]) or not rising):
                raise InputError(f"token shards: {path} does not list rising document ends; prepare the corpus again")
            out.append(ends)
        return out

    def _file(self, shard: int) -> Elements:
        # Opened when first read: a corpus of thousands of shards starts at once.
        file = self._files[shard]
        if file is None:
            file = self._files[shard] = open_elements(self._path(self._shards[shard]), self._dtype)
        return file

    def _by_shard(self, index: np.ndarray) -> list[tuple[int, Any]]:
        """(shard, which of `index`) for the shards that hold these rows."""
        if len(self._shards) == 1:
            return [(0, slice(None))]
        shard = np.searchsorted(self._first, index, side="right") - 1
        return [(int(s), np.flatnonzero(shard == s)) for s in np.unique(shard)]

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by number, each in [0, len)."""
        return self._stream_rows(index) if self._packed is None else self._packed_rows(index)

    def _stream_rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        length = self.length
        weights = np.ones((len(index), length), np.float32)
        rows = np.empty((0, length + 1), self._dtype)
        for shard, at in self._by_shard(index):
            inside = index[at] - self._first[shard]
            whole = (int(self._shards[shard]["tokens"]) - 1) // length
            short = np.flatnonzero(inside >= whole)
            if len(short):
                part, count = self._with_tail(shard, inside, short, whole)
                # The last real token is a target only; as an input it would have nothing to predict.
                weights[np.arange(len(index))[at][short], count - 1 :] = 0.0
            else:
                part = self._file(shard).rows(inside, length)
            if isinstance(at, slice):
                rows = part
            else:
                rows = rows if len(rows) else np.empty((len(index), length + 1), self._dtype)
                rows[at] = part
        tokens, targets = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _with_tail(self, shard: int, inside: np.ndarray, short: np.ndarray, whole: int) -> tuple[np.ndarray, int]:
        """Rows of a shard of which `short` are its last, padded one, and how many tokens that one has."""
        length, file = self.length, self._file(shard)
        part = np.full((len(inside), length + 1), self._pad, self._dtype)
        full = np.flatnonzero(inside < whole)
        if len(full):
            part[full] = file.rows(inside[full], length)
        count = int(self._shards[shard]["tokens"]) - whole * length
        part[short, :count] = file.take(whole * length + np.arange(count))
        return part, count

    def _packed_rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        shape = (len(index), self.length)
        names = ("tokens", "targets", "segments", "positions")
        out = {name: np.empty(shape, np.int32) for name in names}
        out["weights"] = np.ones(shape, np.float32)
        # A few rows at a time: the index arithmetic of 64k tokens stays in the cache of a core.
        step = max((1 << 16) // self.length, 1)
        for start in range(0, len(index), step):
            part = slice(start, start + step)
            self._fill_packed(index[part], {name: value[part] for name, value in out.items()})
        return out

    def _fill_packed(self, index: np.ndarray, out: dict[str, np.ndarray]) -> None:
        packed, count, length = self._packed, len(index), self.length
        first = packed.rows[index]
        many = packed.rows[index + 1] - first
        ends = np.cumsum(many)
        row = np.repeat(np.arange(count), many)
        piece = np.arange(len(row)) + (first - ends + many)[row]
        # Copying a piece costs as much as the index arithmetic of some 200 tokens.
        if count * length > 200 * len(piece) and not is_url(self.folder):
            self._copy_pieces(index, row, piece, piece - first[row] + 1, out)
        else:
            self._index_pieces(index, row, piece, first, ends, out)

    def _copy_pieces(
        self,
        index: np.ndarray,
        row: np.ndarray,
        piece: np.ndarray,
        number: np.ndarray,
        out: dict[str, np.ndarray],
    ) -> None:
        """Rows of few long pieces: slice by slice."""
        starts, sizes = self._packed.starts[piece], self._packed.lengths[piece].astype(np.int64)
        before = np.cumsum(sizes) - sizes
        before -= before[number == 1][row]
        if int(sizes.sum()) < len(index) * self.length:
            out["tokens"][:] = out["targets"][:] = self._pad
            out["segments"][:] = out["positions"][:] = 0
            used = np.bincount(row, weights=sizes)
            out["weights"][:] = _places(self.length) < used[:, None]
        tokens, targets, segments, positions = (
            out[name].reshape(-1) for name in ("tokens", "targets", "segments", "positions")
        )
        shard = (np.searchsorted(self._first, index, side="right") - 1)[row].tolist()
        values = {s: self._file(s).values for s in set(shard)}
        place = _places(self.length)
        at = (row * self.length + before).tolist()
        for s, start, size, n, a in zip(shard, starts.tolist(), sizes.tolist(), number.tolist(), at, strict=True):
            to = slice(a, a + size)
            tokens[to] = values[s][start : start + size]
            targets[to] = values[s][start + 1 : start + size + 1]
            segments[to] = n
            positions[to] = place[:size]

    def _index_pieces(
        self, index: np.ndarray, row: np.ndarray, piece: np.ndarray, first: np.ndarray, ends: np.ndarray,
        out: dict[str, np.ndarray],
    ) -> None:  # fmt: skip
        """Rows of many short pieces, or of a remote file: one gather."""
        packed, count, length = self._packed, len(index), self.length
        taken = packed.lengths[piece]
        used = np.bincount(row, weights=taken, minlength=count).astype(np.int64)
        # Every row ends with a piece of padding (segment 0, maybe of length 0): all rows are then full.
        slot, filler = np.arange(len(piece)) + row, ends + np.arange(count)
        size, begin, number = (np.zeros(len(piece) + count, kind) for kind in (np.int64, np.int64, np.int32))
        size[slot], size[filler] = taken, length - used
        begin[slot] = packed.starts[piece]
        number[slot] = piece - first[row] + 1
        at = np.cumsum(size) - size
        place = _places(count * length)
        positions, segments = out["positions"].reshape(-1), out["segments"].reshape(-1)
        np.subtract(place, np.repeat(at.astype(np.int32), size), out=positions)
        segments[:] = np.repeat(number, size)
        source = np.repeat(begin - at, size)
        source += place
        source = source.reshape(count, length)
        shards = self._by_shard(index)
        for shard, rows in shards:
            out["tokens"][rows] = self._file(shard).take(source[rows])
        # Targets are the tokens one place on, except where a piece ends and another document follows.
        tokens, targets = out["tokens"].reshape(-1), out["targets"].reshape(-1)
        targets[:-1] = tokens[1:]
        last, after = at[slot] + taken - 1, begin[slot] + taken
        for shard, rows in shards:
            here = slice(None) if isinstance(rows, slice) else np.isin(row, rows)
            targets[last[here]] = self._file(shard).take(after[here])
        if int(used.sum()) < count * length:
            empty = segments == 0
            tokens[empty] = targets[empty] = self._pad
            positions[empty] = 0
            out["weights"].reshape(-1)[empty] = 0.0
