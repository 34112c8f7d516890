"""States to save and compare, shared by the checkpoint tests."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigmodel_jax import record, tree
from bigmodel_jax.checkpoint import Checkpointer

VOCAB = 37


def mesh(rows, columns):
    return Mesh(np.array(jax.devices()[: rows * columns]).reshape(rows, columns), ("a", "b"))


def values(seed=0):
    """A state with an odd vocabulary, many dtypes, scalars, an empty leaf and typed keys."""
    rng = np.random.default_rng(seed)
    return {
        "step": np.int32(seed),
        "params": {
            "embed": rng.standard_normal((VOCAB, 16), np.float32),
            "layers": {"w": rng.standard_normal((8, 16, 8), np.float32).astype(ml_dtypes.bfloat16)},
        },
        "opt": ({"count": np.int32(3)}, {"mu": rng.standard_normal((16, 8), np.float32)}),
        "flags": rng.integers(0, 2, 24).astype(bool),
        "none": np.zeros((0, 3), np.float32),
    }


def place(state, grid):
    def put(x):
        spec = [None] * x.ndim
        for axis, name in zip(range(x.ndim), ("a", "b"), strict=False):
            if x.shape[axis] and x.shape[axis] % grid.shape[name] == 0:
                spec[axis] = name
        return jax.device_put(x, NamedSharding(grid, PartitionSpec(*spec)))

    return {
        **jax.tree.map(put, state),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8), 3),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def raw(x):
    return np.asarray(jax.random.key_data(x) if record.is_key(x) else x)


def same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(
        raw(a[p]).dtype == raw(b[p]).dtype and raw(a[p]).tobytes() == raw(b[p]).tobytes() for p in a
    )


def small(seed):
    return {
        "w": jnp.asarray(np.random.default_rng(seed).standard_normal((64, 16), np.float32)),
        "step": jnp.int32(seed),
    }


def write(directory, steps=(1, 2, 3), **options):
    with Checkpointer(directory, keep_last=10, **options) as saver:
        for step in steps:
            saver.save(step, small(step), {"step": step})


def restore(directory, **options):
    """(step restored, or None; what was said)."""
    said = []
    with Checkpointer(directory, log=said.append) as saver:
        found = saver.restore(small(0), **options)
    if found is None:
        return None, said
    state, meta = found
    assert same(state, small(meta["step"])), "restored something that was never saved"
    return meta["step"], said
