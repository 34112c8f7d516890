"""Gradients of the reference families on eight devices equal those on one.

Found here: with the batch cut over two mesh axes and hidden features over a third, XLA's partitioner gives wrong
gradients for plain matrix products; mlp.WHOLE keeps features together.
"""

import functools
import math

import jax
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.learn import objectives
from bigmodel_jax.models import MODELS
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules

ROWS = 16
ONE, ALL = (("data", 1),), (("data", 2), ("fsdp", 2), ("tensor", 2))
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WIDE = dict(dtype="float64", param_dtype="float64")
FAMILIES = {
    "mlp": dict(num_features=12, num_classes=8, hidden=(16, 8)),
    "recurrent_classifier": dict(vocab_size=32, num_classes=8, embed_dim=8),
}


def batch_of(family):
    r = np.random.default_rng(0)
    batch = {"label": r.integers(0, 8, ROWS).astype(np.int32), "weights": r.random(ROWS)}
    if family == "mlp":
        return batch | {"features": r.normal(size=(ROWS, 12))}
    segments = (np.arange(5) < r.integers(2, 6, ROWS)[:, None]).astype(np.int32)
    return batch | {"tokens": r.integers(0, 32, (ROWS, 5)).astype(np.int32), "segments": segments}


@functools.cache
def program(family, layout):
    """(compiled gradients of (params, batch), parameters in place, the sharding of a batch)."""
    model, objective = MODELS[family](**FAMILIES[family], **WIDE), objectives.classification()
    mesh = meshes.make_mesh(dict(layout), jax.devices()[: math.prod(size for _, size in layout)])
    shapes, axes = model.abstract()
    r = np.random.default_rng(1)
    params = jax.tree.map(lambda s: r.normal(size=s.shape), shapes["params"])
    where = rules.shardings(axes["params"], shapes["params"], mesh)

    def loss(params, batch):
        with rules.use(rules.Layout(mesh)):
            terms, _, _ = objective(model.apply, {"params": params, "stats": {}}, batch, None, True)
        return terms["loss"]

    step = jax.jit(jax.grad(loss), out_shardings=where, compiler_options=QUICK)
    return step, jax.device_put(params, where), meshes.batch_sharding(mesh)


def gradients(family, layout, batch):
    step, params, rows = program(family, layout)
    placed = {name: jax.device_put(value[None], rows)[0] for name, value in batch.items()}
    return tree.flatten(jax.device_get(step(params, placed)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_the_layout(family, x64):
    batch = batch_of(family)
    one, many = (gradients(family, layout, batch) for layout in (ONE, ALL))
    for path, value in one.items():
        np.testing.assert_allclose(many[path], value, atol=1e-10 * max(1.0, np.abs(value).max()))
    # Control: two labels on one device exchanged are seen.
    batch["label"][[0, 1]] = (batch["label"][[0, 1]] + [1, 2]) % 8
    other = gradients(family, ALL, batch)
    assert max(np.abs(other[path] - value).max() for path, value in one.items()) > 1e-3
