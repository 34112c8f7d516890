"""Cross-entropy: values, gradients, memory; chunked equals whole."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax.learn.losses import cross_entropy
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules

ROWS, LENGTH, DIM, VOCAB = 4, 10, 6, 17


def tied(scale, table, bias, hidden):
    """A head with everything that may come: two float arrays, an integer, a soft cap."""
    return 5 * jnp.tanh((hidden @ table.T + bias) * scale / 5)


def problem():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, DIM))
    head = jax.tree_util.Partial(
        tied, jnp.int32(2), jnp.array(rng.normal(size=(VOCAB, DIM))), jnp.array(rng.normal(size=VOCAB))
    )
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    weights = rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < 0.7)
    targets[weights == 0] = -1  # anything may stand where the weight is 0
    return jnp.array(hidden), head, jnp.array(targets), jnp.array(weights)


def by_hand(hidden, head, targets, weights, z_loss, smoothing):
    """numpy, position by position."""
    _, table, bias = head.args
    total, nll, accuracy, z2 = 0.0, 0.0, 0.0, 0.0
    for b, i in np.ndindex(*weights.shape):
        w, t = float(weights[b, i]), int(targets[b, i])
        if w == 0:
            continue
        logits = 5 * np.tanh((np.asarray(table) @ np.asarray(hidden[b, i]) + bias) * 2 / 5)
        z = np.log(np.sum(np.exp(logits)))
        q = np.full(VOCAB, smoothing / VOCAB)
        q[t] += 1 - smoothing
        total += w * (np.sum(q * (z - logits)) + z_loss * z**2)
        nll, z2 = nll + w * (z - logits[t]), z2 + w * z**2
        accuracy += w * (np.argmax(logits) == t)
    return total, {"nll": nll, "accuracy": accuracy, "z": z2}


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 99])
def test_value_and_gradients(chunk, x64):
    hidden, head, targets, weights = problem()
    options = dict(z_loss=0.01, label_smoothing=0.2)

    def ours(hidden, table, bias):
        own = jax.tree_util.Partial(tied, jnp.int32(2), table, bias)
        loss, aux = cross_entropy(hidden, own, targets, weights, chunk=chunk, **options)
        return 3 * loss, aux  # a factor: the backward pass must scale what the forward pass left

    def plain(hidden, table, bias):
        logits = tied(2, table, bias, hidden)
        log_p = jax.nn.log_softmax(logits)
        z = jax.nn.logsumexp(logits, axis=-1)
        q = jax.nn.one_hot(targets, VOCAB) * 0.8 + 0.2 / VOCAB
        return 3 * jnp.sum(weights * (-jnp.sum(q * log_p, -1) + 0.01 * z**2))

    arrays = (hidden, *head.args[1:])
    (loss, aux), got = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(*arrays)
    want, sums = by_hand(hidden, head, targets, weights, 0.01, 0.2)
    assert loss == pytest.approx(3 * want, rel=1e-12)
    for name, value in sums.items():
        assert aux[name] == pytest.approx(value, rel=1e-12), name
    assert jax.jit(ours)(*arrays)[0] == pytest.approx(3 * want, rel=1e-12), "without gradients"
    for a, b in zip(got, jax.jit(jax.grad(plain, (0, 1, 2)))(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    wrong, _ = by_hand(hidden, head, targets, weights, 0.01, 0.0)
    assert abs(wrong - want) > 1e-2


def test_ties_count_for_the_first_class_only():
    head = jax.tree_util.Partial(lambda h: jnp.zeros((*h.shape[:-1], 4)))
    _, aux = cross_entropy(jnp.ones((1, 4, 2)), head, jnp.arange(4)[None], jnp.ones((1, 4)))
    assert aux["accuracy"] == 1.0


def linear(table, hidden):
    return jnp.einsum("...d,vd->...v", hidden, table)


def compiled(vocab, length, chunk, sharding=None, mesh=None):
    def fn(hidden, table, targets, weights):
        with rules.use(mesh and rules.Layout(mesh)):
            head = jax.tree_util.Partial(linear, table)
            return cross_entropy(hidden, head, targets, weights, chunk=chunk)[0]

    shapes = [(8, length, 16), (vocab, 16), (8, length), (8, length)]
    types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    grad = jax.grad(fn, (0, 1))
    jitted = jax.jit(grad, in_shardings=sharding, out_shardings=sharding and sharding[:2])
    return jitted.lower(*args).compile()


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Twice the length: the whole form needs another [tokens, V], the chunked form next to none."""
    vocab = 4096
    temp = functools.cache(lambda length, chunk: compiled(vocab, length, chunk).memory_analysis().temp_size_in_bytes)
    logits = 8 * 64 * vocab * 4
    assert temp(128, 0) - temp(64, 0) > 0.9 * logits
    assert temp(128, 8) - temp(64, 8) < 0.05 * logits
    assert temp(128, 8) < 0.6 * logits
    sizes = [np.prod([int(n) for n in s.split(",")])
             for s in re.findall(r"f32\[([\d,]+)\]", compiled(vocab, 128, 8).as_text())]  # fmt: skip
    assert max(sizes) == 8 * 8 * vocab, "the logits of one chunk are the largest array"


def loop_bodies(text):
    """The text of all computations that a while loop runs, directly or through a call."""
    parts = {m[1]: m[0] for m in re.finditer(r"^%?([\w.\-]+) \(.*?^}", text, re.M | re.S)}
    todo, seen = re.findall(r"body=%?([\w.\-]+)", text), set()
    while todo:
        name = todo.pop()
        if name in parts and name not in seen:
            seen.add(name)
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", parts[name])
    return "\n".join(parts[name] for name in seen)


def test_on_a_mesh_nothing_is_reduced_or_gathered_inside_the_loop():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    rows = meshes.batch_sharding(mesh, accumulated=False)
    table = rules.shardings({"t": ("vocab", "embed")}, {"t": jnp.zeros((64, 16))}, mesh)["t"]
    places = (rows, table, rows, rows)
    text = compiled(64, 32, 8, places, mesh).as_text()
    collective = r"= .*(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
    assert re.findall(collective, text)
    assert "dot" in loop_bodies(text)
    assert not re.findall(collective, loop_bodies(text))
    # The control: the same program without the mesh context reduces in every iteration.
    assert re.findall(collective, loop_bodies(compiled(64, 32, 8, places, None).as_text()))
