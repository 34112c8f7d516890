"""One uint32 per array that sees every bit and every position, on any mesh.

Each 32-bit word w at row-major position i contributes mix(w + i * golden), and contributions are
added modulo 2^32. Addition commutes, so the sharding cannot change the sum; mix is a bijection, so
a change confined to one word is always seen; the position makes swapped words different. Anything
else is missed with probability about 2^-32.
"""

from __future__ import annotations

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


@jax.jit
def _on_device(x: jax.Array) -> jax.Array:
    words = _as_words(x)
    # Positions come from one iota per axis: flattening a sharded array would gather it.
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        step = np.uint32(stride * _GOLDEN & 0xFFFFFFFF)
        position = position + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * step
        stride *= words.shape[axis]
    return jnp.sum(_mix(words + position), dtype=jnp.uint32)


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


def of_leaves(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Fingerprints of {path: array}. Reads every byte once; no copy and no gather.

    Args:
      leaves: jax arrays with any sharding (typed PRNG keys as their key data) or numpy arrays.

    Returns:
      {path: integer in [0, 2^32)}, the same for every mesh, process count and array library.
    """
    pending: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if math.prod(leaf.shape) == 0:
            pending[path] = 0
        elif isinstance(leaf, jax.Array):
            pending[path] = _on_device(leaf)
        else:
            pending[path] = of_numpy(np.asarray(leaf))
    return {path: int(value) for path, value in jax.device_get(pending).items()}
