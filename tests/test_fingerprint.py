"""A fingerprint sees every bit and every position, and never the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bigmodel_jax import fingerprint
from tests.states import mesh

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool", "complex64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_sees_bits_and_order_on_any_mesh(dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((8, 6, 4)) * 9).astype(jnp.dtype(dtype))
    x[0, 0, 0], x[7, 5, 3] = 0, 1
    expected = fingerprint.of_numpy(x)
    for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec("a", None, "b")):
        y = jax.device_put(x, NamedSharding(mesh(4, 2), spec))
        assert fingerprint.of_leaves({"y": y}) == {"y": expected}
    # A batch of two microbatches of four rows is the batch of eight.
    assert fingerprint.digest({"y": x.reshape(2, 4, 6, 4)}) == fingerprint.digest({"y": jax.device_put(x)})
    assert fingerprint.digest({"y": x[::-1]}) != fingerprint.digest({"y": x})
    swapped = x.copy()
    swapped[0, 0, 0], swapped[7, 5, 3] = x[7, 5, 3], x[0, 0, 0]
    assert fingerprint.of_numpy(swapped) != expected
    for _ in range(20 if dtype != "bool" else 0):
        flipped = bytearray(x.tobytes())
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        assert fingerprint.of_numpy(np.frombuffer(bytes(flipped), x.dtype).reshape(x.shape)) != expected
