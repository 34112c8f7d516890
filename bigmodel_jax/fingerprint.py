"""One uint32 per array that sees every bit and every position, on any mesh.

Each 32-bit word w at row-major position i contributes mix(w + i * golden), and contributions are
added modulo 2^32. Addition commutes, so the sharding cannot change the sum; mix is a bijection, so
a change confined to one word is always seen; the position makes swapped words different. Anything
else is missed with probability about 2^-32.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio (Knuth, TAOCP 3, section 6.4)
_MULTIPLIER = 0x85EBCA6B  # MurmurHash3 finaliser
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
_CHUNK = 1 << 22  # words per slice of the numpy twin: keeps its scratch memory small


def _mix(words: Any) -> Any:
    words = (words ^ (words >> 15)) * np.uint32(_MULTIPLIER)
    return words ^ (words >> 16)


def _as_words(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    return bits.astype(jnp.uint32)


@functools.partial(jax.jit, static_argnames="shape")
def _of_shard(x: jax.Array, first: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Contribution of a shard whose element 0 is at index `first` [ndim] of an array of `shape`."""
    words = _as_words(x)
    # Positions come from one iota per axis: flattening would copy.
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis < x.ndim:
            here = here + first[axis]
        position = position + here * np.uint32(stride * _GOLDEN & 0xFFFFFFFF)
        stride *= shape[axis] if axis < x.ndim else words.shape[axis]
    return jnp.sum(_mix(words + position), dtype=jnp.uint32)


def _of_shards(x: jax.Array) -> list[jax.Array]:
    """Contributions of what this process holds, each part of the array once in the whole job."""
    if x.is_fully_addressable and jax.process_index() > 0:
        return []  # every process has it all: the first one counts it
    return [
        _of_shard(shard.data, np.array([cut.start or 0 for cut in shard.index], np.uint32), x.shape)
        for shard in x.addressable_shards
        if shard.replica_id == 0
    ]


def of_numpy(x: np.ndarray) -> int:
    """Fingerprint of a numpy array, any dtype of 1, 2, 4, 8 or 16 bytes; equals the device one."""
    x = np.ascontiguousarray(x)
    word = np.uint32 if x.dtype.kind == "c" else _WORDS[x.dtype.itemsize]
    words = x.reshape(-1).view(word)
    total = 0
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int(_mix(part + index * np.uint32(_GOLDEN)).sum(dtype=np.uint64))
    return total & 0xFFFFFFFF


def digest(leaves: Mapping[str, Any]) -> str:
    """16 hex digits over the fingerprints of {path: array}: equal for bitwise equal arrays on any mesh."""
    return hashlib.sha256(json.dumps(of_leaves(leaves), sort_keys=True).encode()).hexdigest()[:16]


def of_leaves(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Fingerprints of {path: array}. Reads every byte once; no copy and no gather.

    Args:
      leaves: jax arrays with any sharding (typed PRNG keys as their key data) or numpy arrays.

    Returns:
      {path: integer in [0, 2^32)}, the same for every mesh, process count and array library.
    """
    fixed: dict[str, int] = {}
    pending: dict[str, list[jax.Array]] = {}
    for path, leaf in leaves.items():
        if math.prod(leaf.shape) == 0:
            fixed[path] = 0
        elif isinstance(leaf, jax.Array):
            pending[path] = _of_shards(leaf)
        else:
            fixed[path] = of_numpy(np.asarray(leaf))
    parts = jax.device_get(pending)
    sums = np.array([sum(int(part) for part in parts[path]) & 0xFFFFFFFF for path in pending], np.uint32)
    if jax.process_count() > 1:
        # One exchange at the end. A sum over all devices per leaf is many small programs with
        # collectives in flight at once, and those have been seen to wait for each other for ever.
        from jax.experimental import multihost_utils

        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    found = fixed | {path: int(value) for path, value in zip(pending, sums, strict=True)}
    return {path: found[path] for path in leaves}
