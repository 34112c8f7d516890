"""Recurrent models: the whole network against numpy, documents apart, cache, dropout, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import MODELS
from bigmodel_jax.parallel import mesh as meshes
from bigmodel_jax.parallel import rules

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WIDE = dict(dtype="float64", param_dtype="float64")
LM = dict(vocab_size=11, num_layers=2, embed_dim=6, hidden_dim=5)
jit = functools.partial(jax.jit, compiler_options=QUICK)


def randomised(model, seed=0, dtype=np.float64):
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.5 * r.normal(size=s.shape), dtype), model.abstract()[0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def np_lstm(p, x):
    """x [L, D] -> h [L, H] with our gate order i, o, f, c."""
    h = c = np.zeros(p["recurrent"].shape[-1])
    out = []
    for row in x:
        i, o, f, g = (row @ p["kernel"][n] + h @ p["recurrent"][n] + p["bias"][n] for n in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def logits_of(model, variables, **inputs):
    out = model.apply(variables, train=False, **inputs)
    return out.head(out.hidden)


def test_lm_equals_numpy_and_keeps_documents_apart(x64):
    model = MODELS["recurrent_lm"](**LM, **WIDE)
    v = randomised(model)
    tokens = np.random.default_rng(2).integers(0, 11, (2, 7)).astype(np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 0, 0]], np.int32)
    got = np.asarray(jit(lambda v, t, s: logits_of(model, v, tokens=t, segments=s))(v, tokens, segments))
    p = jax.tree.map(np.asarray, v["params"])

    def reference(row):
        x = p["embed"]["tokens"][row]
        for n in range(2):
            x = np_lstm(p[f"layer{n}"]["forward"], x)
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    for row, a, b in ((0, 0, 4), (0, 4, 7), (1, 0, 5)):
        np.testing.assert_allclose(got[row, a:b], reference(tokens[row, a:b]), atol=1e-12)
    assert np.abs(got[0, 4:] - reference(tokens[0])[4:]).max() > 1e-3  # control: the border matters


def test_classifier_reads_both_ends_of_the_real_tokens(x64):
    model = MODELS["recurrent_classifier"](vocab_size=11, num_classes=3, embed_dim=6, hidden_dim=5, **WIDE)
    v = randomised(model, 1)
    tokens = np.random.default_rng(3).integers(0, 11, (2, 6)).astype(np.int32)
    segments = (np.arange(6) < np.array([[6], [4]])).astype(np.int32)
    run = jit(lambda v, t, s: logits_of(model, v, tokens=t, segments=s))
    got = np.asarray(run(v, tokens, segments))
    p = jax.tree.map(np.asarray, v["params"])
    for row, length in ((0, 6), (1, 4)):
        x = p["embed"]["tokens"][tokens[row, :length]]
        both = [np_lstm(p["layer0"]["forward"], x)[-1], np_lstm(p["layer0"]["backward"], x[::-1])[-1]]
        expected = np.concatenate(both) @ p["head"]["kernel"] + p["head"]["bias"]
        np.testing.assert_allclose(got[row], expected, atol=1e-12)
    # Padding is not read; a real token is.
    changed = tokens.copy()
    changed[1, 5] += 1
    np.testing.assert_array_equal(run(v, changed % 11, segments), got)
    changed[1, 1] += 1
    assert np.abs(np.asarray(run(v, changed % 11, segments))[1] - got[1]).max() > 1e-4


def test_gradients_equal_differences(x64):
    """Along a random direction of all parameters, with padding and a border between documents."""
    model = MODELS["recurrent_lm"](**LM, **WIDE, peepholes=True, tied_embeddings=True)
    v = randomised(model)
    tokens = np.random.default_rng(2).integers(0, 11, (2, 5)).astype(np.int32)
    segments = np.array([[1, 1, 2, 2, 2], [3, 3, 3, 0, 0]], np.int32)
    r = np.random.default_rng(3)
    direction = jax.tree.map(lambda x: jnp.asarray(r.normal(size=x.shape)), v["params"])

    def loss(params, t):
        moved = jax.tree.map(lambda x, d: x + t * d, params, direction)
        z = logits_of(model, {"params": moved, "stats": {}}, tokens=tokens, segments=segments)
        return jnp.sum(jnp.where(segments[..., None] > 0, jax.nn.log_softmax(z), 0)[..., 1])

    @jit
    def both(params):
        gradient = jax.grad(loss)(params, 0.0)
        along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
        difference = jax.lax.map(lambda t: loss(params, t), jnp.array([1e-5, -1e-5]))
        return along, (difference[0] - difference[1]) / 2e-5

    along, difference = both(v["params"])
    np.testing.assert_allclose(along, difference, rtol=1e-6)
    assert abs(along) > 1e-3


def test_cached_decoding_equals_the_full_pass(x64):
    """Prompts of lengths 2 and 4 padded to 4, then token by token: the same logits as all at once."""
    model = MODELS["recurrent_lm"](**LM, **WIDE)
    v = randomised(model)
    tokens = np.random.default_rng(4).integers(0, 11, (2, 7)).astype(np.int32)
    lengths = np.array([2, 4], np.int32)

    @jit
    def both(v, tokens):
        full = logits_of(model, v, tokens=tokens)
        out = model.apply(v, tokens=tokens[:, :4], train=False, cache=model.cache(2, 7, jnp.float64))

        def step(cache, number):
            token = jnp.take_along_axis(tokens, lengths[:, None] + number, axis=1)
            out = model.apply(v, tokens=token, train=False, cache=cache)
            forgot = model.apply(v, tokens=token, train=False, cache={**cache, "length": 0 * lengths})
            return out.cache, (out.head(out.hidden[:, 0]), forgot.head(forgot.hidden[:, 0]))

        _, (steps, forgot) = jax.lax.scan(step, {**out.cache, "length": jnp.asarray(lengths)}, jnp.arange(3))
        return full, steps.swapaxes(0, 1), forgot[0]

    full, steps, forgot = (np.asarray(x) for x in both(v, tokens))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(steps[row], full[row, length : length + 3], atol=1e-12)
    assert np.abs(forgot[1] - full[1, 4]).max() > 1e-3  # control: a cache of length 0 remembers nothing


def test_dropout_belongs_to_the_row_and_trains_only():
    model = MODELS["recurrent_lm"](**LM | dict(num_layers=1), dropout=0.5)
    v = randomised(model, dtype=np.float32)
    tokens = jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 1))

    @jit
    def runs(keys):
        def hidden(train, rows):
            return model.apply(v, tokens=tokens[rows], train=train, rngs={"dropout": keys[rows]}).hidden

        return hidden(True, slice(None)), hidden(True, slice(1, 2)), hidden(False, slice(None))

    both, alone, still = runs(jax.random.split(jax.random.key(1), 2))
    np.testing.assert_allclose(alone[0], both[1], atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.01
    np.testing.assert_allclose(still[0], still[1], atol=1e-6)


def test_sizes_axes_and_flops():
    model = MODELS["recurrent_lm"](vocab_size=50, num_layers=2, embed_dim=8, hidden_dim=16, tied_embeddings=True)
    shapes, axes = model.abstract()
    lstm = lambda d: 4 * 16 * (d + 16 + 1)  # noqa: E731
    assert tree.count(shapes["params"]) == 50 * 8 + lstm(8) + lstm(16) + 16 * 8 + 50
    # Twice the weights that multiply a token: everything but biases (the table counts as head).
    assert model.flops(10) == 2 * (tree.count(shapes["params"]) - 2 * 64 - 50)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    where = rules.shardings(axes["params"], shapes["params"], mesh)
    assert where["layer0"]["forward"]["kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    classifier = MODELS["recurrent_classifier"](vocab_size=9, num_classes=3, embed_dim=8, num_layers=2)
    n = tree.count(classifier.abstract()[0]["params"])
    biases = 4 * 32 + 3
    assert 5 * classifier.flops(5) == 2 * (5 * (n - 9 * 8 - biases - 16 * 3) + 16 * 3)
    with pytest.raises(InputError, match="did you mean 'lstm'"):
        MODELS["recurrent_lm"](vocab_size=5, cell="lstn")
    with pytest.raises(InputError, match="peepholes"):
        MODELS["recurrent_lm"](vocab_size=5, cell="gru", peepholes=True)
