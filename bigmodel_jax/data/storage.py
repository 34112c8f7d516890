"""Files that may be local or behind a URL, read at random.

A local file is memory-mapped. A URL (gs://, s3://, memory:// ...) is never made absolute or mapped: it
is read in ranges through fsspec, in aligned blocks that a bounded cache keeps.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from bigmodel_jax.errors import InputError


def is_url(path: str | os.PathLike[str]) -> bool:
    """True for scheme://..., which only fsspec may open."""
    return "://" in os.fspath(path)


def cache_root() -> str:
    """Where what can be made again is kept: prepared corpora, pack indexes, compiled programs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("BIGMODEL_CACHE") or os.path.join(home, "bigmodel_jax")


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, for paths and URLs."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec file system and path of a URL. Errors: InputError for an unknown or uninstalled scheme."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = url.split("://")[0]
        raise InputError(f"cannot open {url}: no file system for {scheme}:// ({error})") from error


def read_bytes(path: str) -> bytes:
    """Whole content. Errors: FileNotFoundError."""
    if is_url(path):
        fs, inner = filesystem(path)
        return fs.cat_file(inner)
    with open(path, "rb") as file:
        return file.read()


def size_of(path: str) -> int:
    """Bytes in the file. Errors: FileNotFoundError."""
    if is_url(path):
        fs, inner = filesystem(path)
        return int(fs.size(inner))
    return os.path.getsize(path)


class Elements(Protocol):
    """A one-dimensional file of fixed-width numbers."""

    def take(self, index: np.ndarray) -> np.ndarray:
        """Values at these places (any shape, int64); places past the end give the last value."""
        ...

    def rows(self, index: np.ndarray, stride: int) -> np.ndarray:
        """[n, stride + 1] values from index[i] * stride on; all must lie inside the file."""
        ...


class Mapped:
    """A local file of numbers, memory-mapped: `values` [n]."""

    def __init__(self, path: str, dtype: np.dtype):
        # A plain view: slicing np.memmap itself costs microseconds per call.
        mapped = np.memmap(path, dtype, "r") if os.path.getsize(path) else np.zeros(0, dtype)
        self.values = mapped.view(np.ndarray)
        self._views: dict[int, np.ndarray] = {}

    def take(self, index: np.ndarray) -> np.ndarray:
        return self.values.take(index, mode="clip")

    def rows(self, index: np.ndarray, stride: int) -> np.ndarray:
        view = self._views.get(stride)
        if view is None:
            count = max(len(self.values) - 1, 0) // stride
            step = self.values.itemsize
            view = np.lib.stride_tricks.as_strided(
                self.values, (count, stride + 1), (stride * step, step), writeable=False
            )
            self._views[stride] = view
        return view[index]


class Ranged:
    """A remote file of numbers, read in aligned blocks; the last `keep` blocks stay in memory.

    Missing blocks of one call are asked for together, so that an asynchronous file system fetches them
    at the same time. Rows picked at random from all over a remote file cost one block each: use
    block-wise shuffling there.
    """

    def __init__(self, url: str, dtype: np.dtype, block_bytes: int = 1 << 18, keep: int = 512):
        self._fs, self._path = filesystem(url)
        self._dtype, self._keep = np.dtype(dtype), keep
        self._bytes = int(self._fs.size(self._path))
        self._block = max(block_bytes // self._dtype.itemsize, 1)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.fetched = 0

    def _fetch(self, blocks: list[int]) -> dict[int, np.ndarray]:
        with self._lock:
            found = {b: self._cache[b] for b in blocks if b in self._cache}
            for b in found:
                self._cache.move_to_end(b)
        missing = [b for b in blocks if b not in found]
        if missing:
            width = self._block * self._dtype.itemsize
            starts = [b * width for b in missing]
            stops = [min(s + width, self._bytes) for s in starts]
            parts = self._fs.cat_ranges([self._path] * len(missing), starts, stops, on_error="raise")
            fresh = {b: np.frombuffer(p, self._dtype) for b, p in zip(missing, parts, strict=True)}
            found.update(fresh)
            with self._lock:
                self.fetched += len(missing)
                self._cache.update(fresh)
                while len(self._cache) > self._keep:
                    self._cache.popitem(last=False)
        return found

    def take(self, index: np.ndarray) -> np.ndarray:
        places = np.minimum(index.reshape(-1), self._bytes // self._dtype.itemsize - 1)
        which = places // self._block
        order = np.argsort(which, kind="stable")
        names, first = np.unique(which[order], return_index=True)
        blocks = self._fetch([int(b) for b in names])
        out = np.empty(len(places), self._dtype)
        for name, at in zip(names, np.split(order, first[1:]), strict=True):
            out[at] = blocks[int(name)][places[at] - name * self._block]
        return out.reshape(index.shape)

    def rows(self, index: np.ndarray, stride: int) -> np.ndarray:
        return self.take(index[:, None] * stride + np.arange(stride + 1))


def open_elements(path: str, dtype: np.dtype) -> Elements:
    """Mapped for a local path, Ranged for a URL."""
    return Ranged(path, dtype) if is_url(path) else Mapped(path, dtype)
